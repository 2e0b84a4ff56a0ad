"""The one root module that a run prepares: a batch in, its summed loss out.

What DDP, `fully_shard` or `torch.compile` wraps is `Objective(model)`. Nothing calls a part of it from outside: under
DDP that would skip the gradient synchronisation in silence, under FSDP2 it would fail.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.data.batches import Batch
from ftkit.errors import UserError
from ftkit.models.architecture import describe
from ftkit.models.attention import bounds_kwargs, document_kwargs
from ftkit.models.loss import chunked_cross_entropy
from ftkit.models.precision import CastLinear
from ftkit.models.token_rows import TokenRowsLinear

ROUTER_KEYS = ("router_aux_loss_coef", "aux_loss_coef")
"""Configurations' names for the weight of the router loss."""

Head = Literal["chunked", "logits_to_keep"]
"""How logits are made: by our own product of hidden states and head, or by the model itself."""


class LossSums(NamedTuple):
    """Sums over the targets of one micro-batch; the loop divides by the number of targets of the global batch."""

    loss: Tensor
    """float32 scalar, with gradients."""
    by_dataset: Tensor
    """float32 [num_datasets], without."""


class Objective(nn.Module):
    """The model and its loss: backbone, head at the target positions, cross-entropy summed over the targets."""

    def __init__(
        self, model: PreTrainedModel, *, num_datasets: int, packed_attention: bool, head: Head | None = None
    ) -> None:
        """
        Args:
            model: with its method applied and its precision set, not sharded yet.
            num_datasets: length of `LossSums.by_dataset`.
            packed_attention: whether the model's attention takes document bounds (`attn_implementation="ftkit"`).
                Where it does not, packed batches are told apart by their position_ids alone.
            head: how logits are made, where it is known already; default to find out.

        Raises:
            UserError: a mixture of experts is set to train its router loss, or the head cannot be used.
        """
        super().__init__()
        self.model = model
        self.num_datasets = num_datasets
        self.packed_attention = packed_attention
        # No module of its own, only references: state dict and sharding see each part once, under `model`.
        self.architecture = describe(model)
        router_note = check_router_loss(model)
        self.head, head_note = (head, None) if head else verify_head(model, packed_attention=packed_attention)
        self.notes: tuple[str, ...] = tuple(note for note in (head_note, router_note) if note is not None)
        """What a user should know about this model's loss."""

    def forward(self, batch: Batch) -> LossSums:
        """The summed cross-entropy of the batch's targets; without targets zero, with a gradient of zeros."""
        inputs = {"input_ids": batch.input_ids, "use_cache": False, **self._row_kwargs(batch)}
        if self.head == "chunked":
            hidden_BTD = self.architecture.backbone(**inputs).last_hidden_state
            hidden_ND = hidden_BTD.flatten(0, 1)[batch.target_positions]
            head = self.architecture.head
            assert isinstance(head, nn.Linear), "checked by verify_head"
            loss, by_dataset = chunked_cross_entropy(
                hidden_ND,
                head.weight,
                head.bias,
                batch.target_ids,
                batch.target_datasets,
                self.num_datasets,
                rows_KD=head.token_rows if isinstance(head, TokenRowsLinear) else None,
                ids_K=head.token_ids if isinstance(head, TokenRowsLinear) else None,
            )
            return LossSums(loss, by_dataset)
        logits_NV = logits_at(self.model, inputs, batch.target_positions)
        losses_N = F.cross_entropy(logits_NV.float(), batch.target_ids, reduction="none")
        by_dataset = losses_N.new_zeros(self.num_datasets)
        by_dataset.index_add_(0, batch.target_datasets, losses_N.detach())
        return LossSums(losses_N.sum(), by_dataset)

    def _row_kwargs(self, batch: Batch) -> dict[str, Any]:
        """What tells the model which tokens belong together."""
        if batch.cu_seq_lens is None:
            # Rows are padded on the right: positions count from 0 without being told, and some models take none.
            return {"attention_mask": batch.attention_mask}
        bounds = document_kwargs(batch) if self.packed_attention else {}
        return {"position_ids": batch.position_ids, **bounds}


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], positions_N: Tensor) -> Tensor:
    """The model's own logits [N, V] at positions of its flattened [B * T] input."""
    length = inputs["input_ids"].shape[1]
    # The index picks positions of every row alike: ask for those that any row needs, then pick from the rows.
    columns_C, column_N = torch.unique(positions_N % length, return_inverse=True)
    logits_BCV = model(**inputs, logits_to_keep=columns_C).logits
    return logits_BCV[positions_N // length, column_N]


def check_router_loss(model: PreTrainedModel) -> str | None:
    """A note for a mixture of experts, whose load-balancing loss transformers leaves out by default, and ftkit too.

    Raises:
        UserError: the configuration asks for that loss. It is a mean over the tokens of one micro-batch, so it would
            change with how a batch is split.
    """
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", None)
    coefficients = [value for name in ROUTER_KEYS if (value := getattr(config, name, None)) is not None]
    if asked is None or (coefficients and not any(coefficients)):
        return None
    if asked:
        raise UserError(
            "the model's configuration asks for a router loss (output_router_logits), which depends on how a batch is "
            "split into micro-batches: not in this version",
            how="set output_router_logits to false in the model's config.json",
            key=("base_model",),
        )
    return "the experts' load-balancing loss is off, as in the model's configuration (output_router_logits: false)"


# ------------------------------------------------------------------------------------------- which head may be used


def verify_head(model: PreTrainedModel, *, packed_attention: bool = False) -> tuple[Head, str | None]:
    """Whether logits are just `head(hidden)`, found out by running the model; and a note where they are not.

    Two facts are observed during one forward of a few tokens, both exactly, so that the model's precision does not
    matter: the head is handed the backbone's last hidden state, and what it returns is the logits. For the second,
    float32 noise of size 100 takes the place of the head's output, which no scale or soft-cap leaves alone.

    Raises:
        UserError: the model does not return logits at the positions asked for either.
    """
    architecture = describe(model)
    device = model.device
    with _evaluating(model), torch.no_grad():
        inputs: dict[str, Any] = {"input_ids": torch.arange(3, 11, device=device)[None], "use_cache": False}
        if packed_attention:
            inputs |= bounds_kwargs(torch.tensor([0, 8], dtype=torch.int32))
        reason = _why_not_chunked(model, architecture.backbone, architecture.head, inputs)
        if reason is None:
            return "chunked", None
        positions = torch.tensor([6, 1, 2], device=device)
        kept, own = logits_at(model, inputs, positions).float(), model(**inputs).logits[0, positions].float()
    # The same product over other shapes may differ in the last bits.
    tolerance = 1e-5 if model.dtype == torch.float32 else 1e-2
    if not torch.allclose(kept, own, rtol=0, atol=tolerance * float(own.abs().max())):
        raise UserError(
            f"{type(model).__name__} has a head that ftkit cannot use: {reason}, and it ignores logits_to_keep",
            how="choose another base model",
            key=("base_model",),
        )
    return "logits_to_keep", f"the model makes its logits itself, all targets of a micro-batch at once: {reason}"


def _why_not_chunked(
    model: PreTrainedModel, backbone: nn.Module, head: nn.Module, inputs: dict[str, Any]
) -> str | None:
    if type(head) not in (nn.Linear, CastLinear, TokenRowsLinear):
        return f"its head is a {type(head).__name__}"
    seen: dict[str, Tensor] = {}

    def see_hidden(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state

    def replace_logits(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        seen["input"] = args[0]
        seen["output"] = 100 * torch.randn(output.shape, generator=generator).to(output.device)
        return seen["output"]

    hooks = [backbone.register_forward_hook(see_hidden), head.register_forward_hook(replace_logits)]
    try:
        logits = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"hidden", "input", "output"}:
        return "it does not call its head as a module"
    if not torch.equal(seen["input"], seen["hidden"]):
        return "it transforms the hidden states before the head"
    # A model may round logits to its own dtype.
    if not torch.equal(logits, seen["output"].to(logits.dtype)):
        return "it scales or soft-caps the logits"
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout while inside; every module's mode is as before afterwards."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
