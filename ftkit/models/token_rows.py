"""Rows of embedding and head that train by themselves: those of tokens that a recipe added.

The table itself stays as it is, frozen and shared. Rows whose ids it has take the place of its own (a base may have
rows in reserve), the others follow after its last. Where the base ties embedding and head, both have the same rows.

Shape suffixes: K rows, V rows of the table, D width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.errors import KeyPath, UserError

KEY: KeyPath = ("model", "add_tokens")
ROWS = "token_rows"
"""Name of the parameter."""


class TokenRowsEmbedding(nn.Embedding):
    """An `nn.Embedding` with `token_rows` [K, D] in place of, and after, those of its table."""

    token_rows: nn.Parameter
    token_ids: Tensor
    """int64 [K], ascending."""
    rows_enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """int64 [...] -> [..., D]"""
        known = F.embedding(input.clamp_max(self.weight.shape[0] - 1), self.weight)
        if self.rows_enabled:
            slots = torch.searchsorted(self.token_ids, input).clamp_max(len(self.token_ids) - 1)
            is_new = self.token_ids[slots] == input
            # Every row takes part in every backward pass, as DDP wants it: with a gradient of zero where no token asks.
            rows = F.embedding(slots, self.token_rows).to(known.dtype)
            known = torch.where(is_new[..., None], rows, known)
        # Gemma's embedding multiplies what it looks up.
        scale = getattr(self, "embed_scale", None)
        return known if scale is None else known * scale.to(known.dtype)


class TokenRowsLinear(nn.Linear):
    """A head with `token_rows` [K, D] likewise."""

    token_rows: nn.Parameter
    token_ids: Tensor
    rows_enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> logits [..., V], or more where rows follow the table's."""
        logits = F.linear(input, self.weight)
        if not self.rows_enabled:
            return logits
        return with_columns(logits, F.linear(input, self.token_rows.to(input.dtype)), self.token_ids)


Owner = TokenRowsEmbedding | TokenRowsLinear


def with_columns(logits: Tensor, columns: Tensor, ids_K: Tensor) -> Tensor:
    """[..., V] -> [..., max(V, last id + 1)], with `columns` [..., K] at `ids_K`."""
    beyond = max(0, int(ids_K[-1]) + 1 - logits.shape[-1])
    return F.pad(logits, (0, beyond)).index_copy(-1, ids_K, columns)


def with_rows(table_VD: Tensor, rows_KD: Tensor, ids_K: Tensor) -> Tensor:
    """A copy of the table [max(V, last id + 1), D] with these rows."""
    return with_columns(table_VD.t(), rows_KD.t(), ids_K).t().contiguous()


@torch.no_grad()
def train_rows(model: PreTrainedModel, ids: Sequence[int], *, paths: Sequence[str] | None = None) -> None:
    """Let rows of their own train for the tokens `ids`, float32, from the mean of the rows of all tokens before them.

    Args:
        ids: ascending; those beyond the table follow its last row without a gap.
        paths: the modules that get them; default embedding and head. Tied ones share theirs in any case.

    Raises:
        UserError: the model's embedding or head is of a kind that ftkit cannot add rows to, or trains in full.
    """
    ids_K = torch.tensor(ids)
    shared: dict[nn.Parameter, nn.Parameter] = {}
    tables = {id(module.weight) for path, module in tables_of(model).items() if paths is None or path in paths}
    for path, module in tables_of(model).items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if id(weight) not in tables:
            if ids[-1] >= weight.shape[0]:
                what = f"{path} would have no rows for the tokens from {weight.shape[0]} on"
                raise UserError(what, how="merge the adapter with the tool that wrote it")
            continue
        _check(path, module, weight, ids)
        if weight not in shared:
            mean_1D = weight[: ids[0]].float().mean(0, keepdim=True)
            shared[weight] = nn.Parameter(mean_1D.repeat(len(ids), 1))
        module.__class__ = TokenRowsEmbedding if isinstance(module, nn.Embedding) else TokenRowsLinear
        assert isinstance(module, Owner)
        module.token_rows, module.rows_enabled = shared[weight], True
        module.register_buffer("token_ids", ids_K.to(weight.device), persistent=False)


def tables_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> embedding and head, whether they are tied or not."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return {path: module for path, module in model.named_modules() if any(module is part for part in parts)}


def owners(model: nn.Module) -> Iterator[tuple[str, Owner]]:
    """Path and module that has rows of its own, or shares them."""
    for path, module in model.named_modules():
        if isinstance(module, Owner):
            yield path, module


def _check(path: str, module: nn.Module, weight: nn.Parameter, ids: Sequence[int]) -> None:
    what = None
    if weight.requires_grad:
        what = f"method.modules_to_save trains all of {path}, and model.add_tokens only the rows of new tokens"
        raise UserError(what, how="leave one of them out", key=("method", "modules_to_save"))
    beyond = [token for token in ids if token >= weight.shape[0]]
    if beyond and beyond != list(range(weight.shape[0], ids[-1] + 1)):
        what = f"its new tokens {beyond} do not follow the last of {weight.shape[0]} rows"
    scaled = hasattr(module, "embed_scale") and isinstance(module, nn.Embedding)
    if not scaled and type(module) not in (nn.Embedding, nn.Linear):
        what = f"{path} is a {type(module).__name__}"
    if isinstance(module, nn.Linear) and module.bias is not None:
        what = f"{path} has a bias"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        what = f"{path} limits the norms of its rows"
    if what is not None:
        raise UserError(f"this model can get no new tokens: {what}", how="leave model.add_tokens out", key=KEY)
