"""Rows of added tokens in the files of a LoRA: peft's `trainable_token_indices`.

peft keeps the rows themselves, whatever the name of their tensor says, and those of a tied head once, under the
embedding's name. To load such a file it wants a base that has rows for the ids: `resize_token_embeddings` comes first.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods.base import NewRows
from ftkit.methods.targets import matches_name
from ftkit.models.token_rows import Owner, owners, tables_of, train_rows

INDICES = "trainable_token_indices"
"""Key of peft's configuration."""
INSIDE = ".token_adapter."
ENDING = f"{INSIDE}trainable_tokens_delta"
"""Of a tensor's name in the file. Of a resized base peft saves the table too, as PATH.token_adapter.base_layer."""


def saved_rows(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name in the file, without peft's prefix -> rows; tied ones once."""
    found: dict[nn.Parameter, str] = {}
    for path, owner in owners(model):
        # The embedding comes before the head in every model, or lies deeper: peft names it.
        if owner.token_rows not in found or isinstance(owner, nn.Embedding):
            found[owner.token_rows] = f"{path}{ENDING}"
    return {name: rows for rows, name in found.items()}


def indices_for_peft(model: nn.Module) -> dict[str, list[int]] | None:
    """Name of a module -> ids of its rows; None where no tokens were added."""
    paths = [name.removesuffix(ENDING) for name in saved_rows(model)]
    by_path: dict[str, Owner] = dict(owners(model))
    names = {path: path.rpartition(".")[2] for path in paths}
    unique = all(sum(matches_name(other, name) for other, _ in model.named_modules()) == 1 for name in names.values())
    return {names[path] if unique else path: by_path[path].token_ids.tolist() for path in paths} or None


def insert_saved_rows(model: PreTrainedModel, config: Mapping[str, Any], where: Path) -> None:
    """Give the model rows for the ids that a configuration names, to load saved ones into.

    Raises:
        UserError: embedding and head have rows of different tokens, or the model can get none.
    """
    indices = config.get(INDICES)
    if not indices:
        return
    embedding = next(path for path, module in tables_of(model).items() if module is model.get_input_embeddings())
    named = indices if isinstance(indices, dict) else {embedding: indices}
    paths = [path for path in tables_of(model) if any(matches_name(path, name) for name in named)]
    ids = sorted(next(iter(named.values())))
    if len(paths) != len(named) or any(list(own) != ids for own in named.values()):
        what = f"{INDICES} names other modules than embedding and head, other tokens for each, or not in order"
        raise UserError(what, how="merge it into its base with peft's merge_and_unload", where=str(where))
    train_rows(model, ids, paths=paths)


def row_deltas(model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, NewRows]]:
    """Name of a table -> its new rows, as `state` has them; tied tables have the same object."""
    names = {rows: name for name, rows in saved_rows(model).items()}
    deltas: dict[nn.Parameter, NewRows] = {}
    for path, owner in owners(model):
        rows = owner.token_rows
        tuned = state[f"{prefix}{names[rows]}"]
        yield f"{path}.weight", deltas.setdefault(rows, NewRows(tuned, owner.token_ids.to(tuned.device)))


def without_copies(model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A saved state without what peft adds where a base was resized: its tables, and the rows of a tied head again.

    Rows of a head that is tied here, and was trained apart, stay: they do not fit.
    """
    kept = {name: tensor for name, tensor in state.items() if INSIDE not in name or name.endswith(ENDING)}
    names = {rows: name for name, rows in saved_rows(model).items()}
    for path, owner in owners(model):
        own, shared = (kept.get(f"{prefix}{name}") for name in (f"{path}{ENDING}", names[owner.token_rows]))
        if own is not None and own is not shared and shared is not None and torch.equal(own, shared):
            del kept[f"{prefix}{path}{ENDING}"]
    return kept


@torch.no_grad()
def load_rows(model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Copy saved rows back."""
    for name, rows in saved_rows(model).items():
        rows.copy_(state[f"{prefix}{name}"])
