"""What is left of a merge once all of it was taken off again: the base, bit for bit or up to rounding.

Storing a merged weight rounds it, and so does storing what is left when the update is subtracted. Both roundings are
half a step at most, so the distance from the base is bounded, weight by weight: what exceeds that has another cause.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ftkit.artifacts.contents import Contents
from ftkit.errors import CheckFailedError, NetworkError, UserError
from ftkit.methods.base import ComputeDelta, merged_weight
from ftkit.methods.files import BaseIdentity
from ftkit.models.files import TensorFiles, hash_files, weight_files
from ftkit.models.load import BaseModel, find_base, fingerprint, local_directory
from ftkit.recipe.schema import ModelSection

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 22
"""Elements that are compared at a time."""


@dataclass(frozen=True)
class Distance:
    """How far the weights of two models are apart, element by element, in the precision of the second."""

    elements: int
    differing: int
    max_ulps: int
    """Largest number of steps between two values, a step being the distance of neighbours in that precision."""
    max_abs_difference: float
    beyond_rounding: int
    """Elements that are further apart than the roundings of one merge and its undoing explain."""


@dataclass(frozen=True)
class Restored:
    """How well a base came back."""

    base: str
    fingerprint: str | None
    """The one that the base has."""
    exact: bool
    """Whether the weight files are those of the base, byte for byte."""
    distance: Distance | None
    """From the base; None where it is exact, or the base cannot be reached."""
    reason: str
    """Why it is exact or not, in words."""


def compare_with_base(
    contents: Contents, source: Path, result: Path, original: BaseModel | None, held: Mapping[str, ComputeDelta]
) -> Restored:
    """Compare `result`, from which everything was taken off, with the base that it goes back to.

    Args:
        contents: of the merged model, before.
        source: the merged model.
        original: the base, where it can be reached; see `find_original`.
        held: name of a weight in the files -> what the base was turned into before anything was merged: quantised.
    """
    base = contents.bases[0]
    name = base.name if contents.quantization is None else f"{base.name} in {contents.quantization}, dequantized"
    if hash_files(weight_files(result)) == base.fingerprint:
        return Restored(base.name, base.fingerprint, True, None, "the weight files are those of the base")
    if original is None:
        reason = f"the weight files are not those of the base, which is no longer at {base.name}: distance unknown"
        return Restored(base.name, base.fingerprint, False, None, reason)
    distance = measure(local_directory(original, weights=True), source, result, held)
    if distance.differing == 0:
        reason = "every value is the base's, in files of another layout or precision, or with another sign of a zero"
    elif contents.passes > 1:
        reason = f"{contents.passes} merges rounded the weights before"
    elif distance.beyond_rounding:
        reason = f"{distance.beyond_rounding} values are further off than rounding explains"
    else:
        reason = "rounding: once when the adapter was merged, once when it was subtracted"
    return Restored(name, base.fingerprint, False, distance, reason)


def check_restored(restored: Restored, passes: int) -> None:
    """Check that rounding explains the distance from the base, where one merge alone lies between.

    Raises:
        CheckFailedError: it does not: something else was subtracted than had been added.
    """
    if passes == 1 and restored.distance is not None and restored.distance.beyond_rounding:
        raise CheckFailedError(
            f"the result is not {restored.base}: {restored.reason}, by {restored.distance.max_abs_difference:.2g}",
            how="something else was merged than was subtracted: use the base itself",
        )


def find_original(identity: BaseIdentity) -> BaseModel | None:
    """The model of this identity at the place where it lay, if it is still there; nothing is downloaded."""
    try:
        base = find_base(identity.name, ModelSection(revision=identity.revision), base=Path.cwd(), offline=True)
        return base if fingerprint(base, remembered=True) == identity.fingerprint else None
    except (UserError, NetworkError):
        return None


def measure(original: Path, merged: Path, result: Path, held: Mapping[str, ComputeDelta] | None = None) -> Distance:
    """The distance of `result` from `original`, with the merged model between them; all three hold the same names."""
    held = held or {}
    elements = differing = ulps = beyond = 0
    difference = 0.0
    with TensorFiles(original) as first, TensorFiles(merged) as middle, TensorFiles(result) as last:
        for name in last.names:
            whole = merged_weight(first[name].float(), held[name]) if name in held else first[name]
            for base, between, left in _chunks(whole, middle[name], last[name]):
                cast = base.to(left.dtype)
                elements += left.numel()
                differing += int((cast != left).sum())
                if not left.is_floating_point():
                    continue
                ulps = max(ulps, int(steps_between(cast, left).max()))
                gap = (base.double() - left.double()).abs()
                difference = max(difference, float((cast.double() - left.double()).abs().max()))
                # Twice what two roundings can be: several adapters may be summed in another order than before.
                beyond += int((gap > _step(between) + _step(left)).sum())
    return Distance(elements, differing, ulps, difference, beyond)


def steps_between(one: Tensor, other: Tensor) -> Tensor:
    """int64: how many steps to the neighbouring value lead from each value to the other's (ulp)."""
    return (_ordered(one) - _ordered(other)).abs()


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.reshape(-1).split(CHUNK) for tensor in tensors), strict=True)


def _ordered(values: Tensor) -> Tensor:
    """int64 numbers that count the representable values from zero; neighbours differ by one."""
    bits = values.view(_INTEGERS[values.itemsize]).long()
    magnitude = bits & torch.iinfo(_INTEGERS[values.itemsize]).max
    return torch.where(bits < 0, -magnitude, magnitude)


def _step(values: Tensor) -> Tensor:
    """float64: distance from each value's magnitude to the next larger one in its precision."""
    precision = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double()).exponent
    step = torch.exp2(exponent.double() - 1) * precision.eps
    return torch.where(values == 0, 0.0, step).clamp_min(precision.tiny * precision.eps)
