"""Rewriting the safetensors files of a model, one tensor in memory at a time: some changed by name, others copied."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ftkit.artifacts.shards import transform_file
from ftkit.errors import CheckFailedError
from ftkit.methods.base import ComputeDelta, NewRows, OnDequantized, merged_weight
from ftkit.models.files import INDEX_NAME, read_json, weight_files


def rewrite(
    source: Path, target: Path, deltas: Mapping[str, ComputeDelta], *, dtype: torch.dtype | None = None
) -> None:
    """Write the weight files of `source` to `target`, adding `deltas`, under the same file names.

    A changed weight is cast(float32(W) + delta), rounded once, to the precision it is stored in.
    A replaced one is the tuned one, cast.

    Args:
        dtype: precision of every floating-point weight in `target`; None keeps each one's own.
    """

    def rewrite_one(name: str, tensor: Tensor) -> Tensor:
        return rewritten(tensor, deltas.get(name), dtype)

    rows = {name: int(delta.ids_K[-1]) + 1 for name, delta in deltas.items() if isinstance(delta, NewRows)}
    total_size = sum(
        transform_file(path, target / path.name, rewrite_one, dtype=dtype, rows=rows) for path in weight_files(source)
    )
    if len(weight_files(source)) > 1:
        index = read_json(source / INDEX_NAME)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total_size}
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_weights(source: Path, target: Path) -> None:
    """Copy the weight files of `source` and their index byte for byte."""
    files = weight_files(source)
    for path in [*files, source / INDEX_NAME] if len(files) > 1 else files:
        shutil.copyfile(path, target / path.name)


def rewritten(weight: Tensor, delta: ComputeDelta | None, dtype: torch.dtype | None) -> Tensor:
    """What a stored weight becomes."""
    dtype = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    if delta is None:
        return weight.to(dtype)
    return merged_weight(weight.float(), delta).to(dtype).contiguous()


@dataclass(frozen=True)
class Changes:
    """What a merge did to the weights that its adapters name; names in the files."""

    altered: tuple[str, ...]
    zero: tuple[str, ...]
    """Unchanged, since nothing was added: B is still zero, or two adapters cancel out."""
    rounded_away: tuple[str, ...]
    """Unchanged, since what was added is less than half a step of the stored precision everywhere."""


def check_tensors(
    source: Path, target: Path, deltas: Mapping[str, ComputeDelta], *, dtype: torch.dtype | None = None
) -> Changes:
    """Read both directories from disk and compare them bit for bit with what `rewrite` promises.

    Raises:
        CheckFailedError: a tensor is missing, added, different or not finite; the first few are named.
    """
    wrong: list[str] = []
    altered: list[str] = []
    zero: list[str] = []
    rounded_away: list[str] = []
    for before, after in zip(weight_files(source), weight_files(target), strict=True):
        if set(_names(before)) != set(_names(after)):
            wrong.append(f"the tensors of {after.name} are not those of the base")
            continue
        with safe_open(after, framework="pt") as written:
            for name, tensor in _tensors(before):
                merged, delta = written.get_tensor(name), deltas.get(name)
                if not same_bits(merged, rewritten(tensor, delta, dtype)):
                    wrong.append(f"{name} is not cast(W + s BA)" if name in deltas else f"{name} was altered")
                elif delta is None:
                    continue
                elif not merged.isfinite().all():
                    wrong.append(f"{name} is not finite in {merged.dtype}")
                    continue
                # What an adapter did to it, apart from what its quantisation in training did.
                base = OnDequantized(delta.quantization, None) if isinstance(delta, OnDequantized) else None
                update = delta.update if isinstance(delta, OnDequantized) else delta
                if update is None:
                    continue
                if not torch.equal(merged, rewritten(tensor, base, dtype)):
                    altered.append(name)
                else:
                    (rounded_away if update(tensor.float()).any() else zero).append(name)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckFailedError(f"the merged files are wrong: {', '.join(wrong[:3])}{more}", how="merge again")
    return Changes(tuple(altered), tuple(zero), tuple(rounded_away))


def check_changed(changes: Changes, dtype: torch.dtype) -> None:
    """Check that a merge of updates that are something has changed something.

    Raises:
        CheckFailedError: every update is lost in rounding.
    """
    if changes.rounded_away and not changes.altered:
        lost, name = len(changes.rounded_away), str(dtype).removeprefix("torch.")
        what = f"nothing has changed: the updates of all {lost} weights are lost in rounding to {name}"
        raise CheckFailedError(what, how="merge with --dtype float32, or train with a larger learning rate")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; unlike `torch.equal`, NaN and -0 included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one in memory at a time (mapped, not read, until it is used)."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)
