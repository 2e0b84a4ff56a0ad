"""One training step on tensors without numbers: which bytes it holds at once, and how many operations it takes.

The model lies on the meta device and does what it does in training; what every operation of torch returns is followed
from its birth to its release. So the figures are those of the code that will run, not of a table by architecture. Two
things are put in place of what meta tensors cannot do: the fused attention kernels, which keep their inputs, the output
and one number a query (Dao et al. 2022, https://arxiv.org/abs/2205.14135, section 3.1), and the check of the head,
which looks at numbers and is made on a small copy of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from ftkit.data.batches import Batch
from ftkit.models.architecture import describe
from ftkit.models.live_tensors import LiveTensors
from ftkit.models.objective import Head, Objective


@dataclass(frozen=True)
class TracedStep:
    """What one micro-batch takes."""

    activations: int
    """Bytes at the fullest moment beyond weights, all gradients and what is of the loss."""
    logits: int
    """Bytes of the loss at that moment: logits of a chunk of targets, or of all, and the gradient formed of them."""
    flops_per_token: float
    """Floating-point operations of forward and backward pass but for attention and head."""
    flops_per_target: float
    """Of the head."""
    flops_per_pair: float
    """Of attention, for each pair of a token and one that it sees; a document of L tokens has about L^2 / 2."""
    forward_share: float
    """Of all operations, those of a forward pass without gradients."""


def trace_step(
    model: PreTrainedModel, batch: Batch, *, head: Head, packed_attention: bool, accumulates: bool = True
) -> TracedStep:
    """Run forward and backward on the meta device.

    Args:
        model: on the meta device, set for training: method, precision, checkpointing.
        batch: on the meta device, the bounds of its documents on the CPU.
        head: how the loss makes logits (`verify_head` of a small copy).
        packed_attention: as `Objective` has it.
        accumulates: whether gradients of a micro-batch before are there from the start. Otherwise they arise while
            activations are freed, and their places are not needed twice.

    Raises:
        Exception: whatever torch raises where an operation depends on the numbers in a tensor, or has no meta form.
    """
    objective = Objective(model, num_datasets=1, packed_attention=packed_attention, head=head).train()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if accumulates and parameter.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    known: list[Tensor] = [*model.parameters(), *model.buffers(), *gradients]
    with _Counting(known) as live, _fused_attention() as attention, _marking(objective, live) as counted:
        loss = objective(batch).loss
        live.mark("backward")
        counted["forward"] = live.flops
        loss.backward()
    arisen = 0 if accumulates else sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    for parameter in model.parameters():
        parameter.grad = None

    begin, end = dict(live.marks)["loss"], dict(live.marks)["backward"]
    series = live.live_bytes(lambda life: life.operation != "")
    peak = max(range(len(series)), key=series.__getitem__)
    of_loss = sum(life.bytes for life in live.lives if begin < life.born <= end and life.lives_at(peak))
    beyond = max(0, series[peak] - arisen)
    total, of_head = live.flops, counted["forward"] - counted["loss"]
    pairs = sum(int(length) ** 2 / 2 for length in _lengths(batch))
    # The loss forms its gradients in the forward pass: one product more, or two where the head trains.
    products = 3 if any(p.requires_grad for p in describe(model).head.parameters()) else 2
    forward = counted["loss"] + of_head / products + attention.forward_flops
    everything = total + attention.forward_flops + attention.backward_flops
    return TracedStep(
        activations=beyond - min(of_loss, beyond),
        logits=min(of_loss, beyond),
        flops_per_token=(total - of_head) / batch.input_ids.numel(),
        flops_per_target=of_head / max(1, len(batch.target_ids)),
        flops_per_pair=(attention.forward_flops + attention.backward_flops) / pairs,
        forward_share=forward / everything,
    )


def _lengths(batch: Batch) -> list[int]:
    if batch.cu_seq_lens is not None:
        return [int(length) for length in batch.cu_seq_lens.diff()]
    return [batch.input_ids.shape[1]] * len(batch.input_ids)


class _Counting(LiveTensors):
    """Counts operations besides, by torch's formulas; its own mode would hold on to what checkpointing frees."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, look at what it returned, and count."""
        returned = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        # torch knows it only where it is not in place.
        formula = flop_registry.get(torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=returned)
        return returned


@contextmanager
def _marking(objective: Objective, live: "_Counting") -> Iterator[dict[str, int]]:
    """Mark where the backbone ends and the loss begins; yields the operations counted until then."""
    counted = {"loss": 0}
    architecture = describe(objective.model)

    def begin_loss(*_: Any) -> None:
        live.mark("loss")
        counted["loss"] = live.flops

    # Where the model makes its own logits, their making is the head's as well.
    hook = architecture.backbone.register_forward_hook(begin_loss)
    try:
        yield counted
    finally:
        hook.remove()


@dataclass
class _Attention:
    """Operations of attention."""

    forward_flops: float = 0.0
    backward_flops: float = 0.0


@contextmanager
def _fused_attention() -> Iterator[_Attention]:
    """Put a stand-in with the memory of a fused kernel in the place of torch's attention, and count its operations.

    torch itself would choose the kernel by a device, and take the plain one, with its L x L scores, for meta tensors.
    A mode for functions would not do: it is off inside of `backward`, where blocks may run forward again.
    """
    counter, own = _Attention(), functional.scaled_dot_product_attention

    def stand_in(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        output: Tensor = _StandIn.apply(query, key, value, attn_mask, counter)
        return output

    functional.scaled_dot_product_attention = stand_in  # type: ignore[assignment]
    try:
        yield counter
    finally:
        functional.scaled_dot_product_attention = own


class _StandIn(torch.autograd.Function):
    """[B, H, L, D] queries, [B, K, S, D] keys and [B, K, S, Dv] values -> [B, H, L, Dv], all of them empty."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, counter: _Attention
    ) -> Tensor:
        """Two products, of which the causal half."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # The kernels add a mask of numbers.
        added = None if mask is None else mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, normaliser, added)
        ctx.counter, ctx.flops = counter, 2 * output.numel() / value.shape[-1] * key.shape[2] / 2
        ctx.flops *= query.shape[-1] + value.shape[-1]
        counter.forward_flops += ctx.flops
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Five products: the scores again, and the gradients of values, weights, keys and queries."""
        query, key, value, *_ = ctx.saved_tensors
        ctx.counter.backward_flops += 2.5 * ctx.flops
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def meta_batch(documents: int, length: int, *, packed: bool, targets: int | None = None) -> Batch:
    """A batch without numbers: documents of equal length, of whose tokens so many are targets; default all but the
    first of each."""
    tokens = documents * length
    count = documents * (length - 1) if targets is None else targets

    def ids(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    shape = (1, tokens) if packed else (documents, length)
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32) if packed else None
    mask = None if packed else ids(*shape)
    return Batch(ids(*shape), ids(*shape), mask, bounds, length, ids(count), ids(count), ids(count), tokens)


def lay_on_meta(model: nn.Module) -> None:
    """Move the few buffers that models make on the CPU whatever the device; let no check look at token ids."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[method-assign]
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type != "meta":
                setattr(module, name, buffer.to("meta"))


def _no_warning(*_: Any) -> None:
    return None
