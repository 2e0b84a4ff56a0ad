"""The weights in a model's safetensors files: read one at a time, or rewritten file by file, changed by name."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftkit.errors import CheckFailedError, UserError
from ftkit.methods.base import ComputeDelta, merged_weight
from ftkit.models.files import INDEX_NAME, read_json, weight_files


class StoredWeights(Mapping[str, Tensor]):
    """Name -> tensor of a model directory; each is read from its file when it is asked for, and kept nowhere."""

    def __init__(self, directory: Path) -> None:
        """Read the names.

        Raises:
            UserError: weight files are missing or damaged.
        """
        self._files: dict[str, Path] = {}
        for path in weight_files(directory):
            try:
                self._files |= dict.fromkeys(_names(path), path)
            except SafetensorError as error:
                raise UserError(f"is damaged ({error})", how="copy or download it again", where=str(path)) from None

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def names_in_files(source: Path, names: Mapping[str, ComputeDelta], *, prefix: str) -> dict[str, ComputeDelta]:
    """The deltas under the names that their weights have in the files of `source`.

    Args:
        names: name in the running model -> delta.
        prefix: the model's `base_model_prefix`, which some files leave out (GPT-2: `h.0...` for `transformer.h.0...`).

    Raises:
        CheckFailedError: a weight is in no file; it would stay unmerged in silence.
    """
    stored = StoredWeights(source)
    found: dict[str, ComputeDelta] = {}
    for name, delta in names.items():
        candidates = (name, name.removeprefix(f"{prefix}."))
        found |= {candidate: delta for candidate in candidates if candidate in stored}
    # A tied weight has several names with the same delta, of which files may hold one or all.
    in_files = set(found.values())
    for name, delta in names.items():
        if delta not in in_files:
            raise CheckFailedError(
                f"{name} is adapted, but no weight file of {source} holds it under this name",
                how="save the base anew with transformers' save_pretrained, or use the adapter without merging",
            )
    return found


def rewrite(
    source: Path, target: Path, deltas: Mapping[str, ComputeDelta], *, dtype: torch.dtype | None = None
) -> None:
    """Write the weight files of `source` to `target`, adding `deltas`, under the same file names.

    A changed weight is cast(float32(W) + delta), rounded once, to the precision it is stored in.
    A replaced one is the tuned one, cast.

    Args:
        dtype: precision of every floating-point weight in `target`; None keeps each one's own.
    """
    total_size = 0
    for path in weight_files(source):
        tensors = {name: rewritten(tensor, deltas.get(name), dtype) for name, tensor in _tensors(path)}
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, target / path.name, metadata={"format": "pt"})
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


def check_tensors(
    source: Path, target: Path, deltas: Mapping[str, ComputeDelta], *, dtype: torch.dtype | None = None
) -> None:
    """Read both directories from disk and compare them bit for bit with what `rewrite` promises.

    Raises:
        CheckFailedError: a tensor is missing, added, different or not finite; the first few are named.
    """
    wrong: list[str] = []
    for before, after in zip(weight_files(source), weight_files(target), strict=True):
        if set(_names(before)) != set(_names(after)):
            wrong.append(f"the tensors of {after.name} are not those of the base")
            continue
        with safe_open(after, framework="pt") as written:
            for name, tensor in _tensors(before):
                merged = written.get_tensor(name)
                if not same_bits(merged, rewritten(tensor, deltas.get(name), dtype)):
                    wrong.append(f"{name} is not cast(W + s BA)" if name in deltas else f"{name} was altered")
                elif name in deltas and not merged.isfinite().all():
                    wrong.append(f"{name} is not finite in {merged.dtype}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckFailedError(f"the merged files are wrong: {', '.join(wrong[:3])}{more}", how="merge again")


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
