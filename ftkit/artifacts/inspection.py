"""What training changed: the spectrum of every update dW, and its size beside the weight W that it changes.

The update of a LoRA is read from its factors and decomposed through them. What is no low-rank product (a fully trained
model, modules that trained in full beside a LoRA, DoRA) is compared with the base's files, one matrix in memory at a
time.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.updates import build_skeleton, load_adapter
from ftkit.artifacts.weights import StoredWeights, names_in_files
from ftkit.console import Console
from ftkit.errors import UserError
from ftkit.methods.base import ComputeDelta, Replacement
from ftkit.methods.lora import LowRankDelta, read_saved
from ftkit.methods.spectrum import Spectrum, amplification, decompose, decompose_product, spectrum_of_difference
from ftkit.methods.targets import matches_name
from ftkit.models.load import BaseModel, local_directory
from ftkit.runs import Target

MAX_NAMED = 3
"""Names that a note lists before it counts."""


@dataclass(frozen=True)
class Change:
    """What training changed in one matrix."""

    name: str
    shape: tuple[int, int]
    """Output and input width; of a matrix that trained in full, as it is stored."""
    rank: int | None
    """Of the adapter's factors; None for a matrix that trained in full."""
    spectrum: Spectrum
    """Of dW."""
    relative_norm: float | None
    """|dW| / |W|, Frobenius norms; None without a base, or where W is zero."""
    amplification: float | None
    """See `spectrum.amplification`; None without a base, and for a matrix that trained in full."""


@dataclass(frozen=True)
class Inspection:
    """What training changed in a model."""

    label: str
    base: str | None
    """Name of the base; None where it was not at hand."""
    changes: tuple[Change, ...]
    """In the model's order."""
    notes: tuple[str, ...]
    """What a reader should know about the figures."""


def inspect_factors(label: str, directory: Path, *, names: Sequence[str] = ()) -> Inspection:
    """The spectra of a LoRA whose base is not at hand.

    Args:
        names: only these modules, as `targets` names them; empty for all.

    Raises:
        UserError: the adapter cannot be read, what it changes depends on the base, or a name matches nothing.
    """
    saved = read_saved(directory)
    if saved.section.dora:
        what = f"{label} is a DoRA: what it changes depends on the weights of its base, which is not at hand"
        raise UserError(what, how="name it with --base")
    chosen = choose(saved.deltas, names)
    notes = (f"{_listed(saved.in_full)} trained in full: what changed needs the base",) if saved.in_full else ()
    return Inspection(label, None, tuple(_change(name, saved.deltas[name], None) for name in chosen), notes)


def inspect_adapter(target: Target, *, console: Console, names: Sequence[str] = ()) -> Inspection:
    """The spectra of a LoRA, beside the weights of the base that `target` names.

    Raises:
        UserError: the adapter cannot be read, does not fit the base, or a name matches nothing.
    """
    deltas = load_adapter(WeightedAdapter(target), target.model).deltas
    source = local_directory(target.model, weights=True)
    weights = StoredWeights(source)
    in_files = names_in_files(source, deltas, prefix=build_skeleton(target.model).base_model_prefix)
    places = {delta: name for name, delta in in_files.items()}
    # A tied weight has several names with the same delta: the first one stands.
    names_of: dict[ComputeDelta, str] = {}
    for name, delta in deltas.items():
        names_of.setdefault(delta, name.removesuffix(".weight"))
    by_name = {name: delta for delta, name in names_of.items()}
    changes, vectors = [], []
    chosen = choose(by_name, names)
    with console.progress("inspecting", total=len(chosen)) as bar:
        for number, name in enumerate(chosen):
            delta = by_name[name]
            weight = weights[places[delta]]
            if weight.ndim == 2:
                changes.append(_change(name, delta, weight))
            else:
                vectors.append(name)
            bar.update(number + 1)
    notes = (f"{_listed(vectors)} trained in full too, and has no spectrum",) if vectors else ()
    return Inspection(target.label, target.model.name, tuple(changes), notes)


def inspect_model(
    label: str, model: BaseModel, base: BaseModel, *, console: Console, names: Sequence[str] = ()
) -> Inspection:
    """The spectra of a fully trained model's difference to its base, matrix by matrix from the files of both.

    Raises:
        UserError: files are missing or damaged, the models have no matrix in common, or a name matches nothing.
    """
    tuned = StoredWeights(local_directory(model, weights=True))
    before = StoredWeights(local_directory(base, weights=True))
    places = _pair(tuned, before, prefix=build_skeleton(base).base_model_prefix)
    chosen = choose([name.removesuffix(".weight") for name in tuned], names)
    full_names = {name.removesuffix(".weight"): name for name in tuned}
    changes: list[Change] = []
    vectors: list[float] = []
    unpaired = []
    with console.progress("inspecting", total=len(chosen)) as bar:
        for number, name in enumerate(chosen):
            after, place = tuned[full_names[name]], places.get(full_names[name])
            here = before[place] if place is not None else None
            if here is None or here.shape != after.shape:
                unpaired.append(name)
            elif after.ndim < 2:
                vectors.append(_relative(float(_norm(after.double() - here.double())), here) or 0.0)
            else:
                pairs = zip(_matrices(name, after), _matrices(name, here), strict=True)
                changes += [_difference(one, matrix, weight) for (one, matrix), (_, weight) in pairs]
            bar.update(number + 1)
    if not changes and not vectors:
        how = "name the model that it was trained from with --base"
        raise UserError(f"{label} and {base.name} have no weights of one name and shape", how=how)
    notes = []
    if vectors:
        notes.append(f"{len(vectors)} vectors (norms, biases) moved by {max(vectors):.2%} of their norm at most")
    if unpaired:
        notes.append(f"{_listed(unpaired)}: the base has no weight of this name and shape")
    return Inspection(label, base.name, tuple(changes), tuple(notes))


def _change(name: str, delta: ComputeDelta, weight: Tensor | None) -> Change:
    """What `delta` makes of a weight that is stored as a matrix; without the weight, of a plain LoRA."""
    if isinstance(delta, Replacement):
        assert weight is not None, name
        return _difference(name, delta.tuned, weight)
    assert isinstance(delta, LowRankDelta), name
    rank, shape = len(delta.a_RI), (len(delta.b_OR), delta.a_RI.shape[1])
    if weight is None:
        return Change(name, shape, rank, decompose_product(delta.a_RI, delta.b_OR, delta.scale).spectrum, None, None)
    weight_OI = weight.t() if delta.transposed else weight
    if delta.magnitude_O is None:
        update = decompose_product(delta.a_RI, delta.b_OR, delta.scale)
    else:
        dense = delta(weight.float())
        update = decompose(dense.t() if delta.transposed else dense)
    spectrum = update.spectrum
    ratio = amplification(update.leading(rank), spectrum.norm, weight_OI)
    return Change(name, shape, rank, spectrum, _relative(spectrum.norm, weight), ratio)


def _difference(name: str, tuned: Tensor, weight: Tensor) -> Change:
    spectrum = spectrum_of_difference(tuned, weight)
    return Change(name, (len(weight), weight.shape[1]), None, spectrum, _relative(spectrum.norm, weight), None)


def _relative(norm: float, weight: Tensor) -> float | None:
    whole = float(_norm(weight))
    return norm / whole if whole > 0 else None


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _matrices(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A matrix as it is; experts kept as one tensor [E, O, I] one by one; any other tensor as its rows."""
    if tensor.ndim == 3 and min(tensor.shape[1:]) > 1:
        yield from ((f"{name}[{index}]", matrix) for index, matrix in enumerate(tensor))
    else:
        yield name, tensor.flatten(1)


def _pair(tuned: Iterable[str], before: Mapping[str, Tensor], *, prefix: str) -> dict[str, str]:
    """Name of each weight -> its name in the base's files, which may leave the model's prefix out or have it."""
    candidates = {name: (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") for name in tuned}
    found = {name: next((one for one in several if one in before), None) for name, several in candidates.items()}
    return {name: place for name, place in found.items() if place is not None}


def choose(paths: Iterable[str], names: Sequence[str]) -> list[str]:
    """The paths that end in one of `names`, all where there are none, in the model's order: layer 2 before layer 10.

    Raises:
        UserError: a name matches nothing.
    """
    ordered = sorted(paths, key=lambda path: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in _parts(path)])
    for name in names:
        if not any(matches_name(path, name) for path in ordered):
            there = list(dict.fromkeys(path.rpartition(".")[2] for path in ordered))
            close = difflib.get_close_matches(name, there, n=1)
            how = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
            raise UserError(f"--modules {name} matches nothing that was trained", how=how)
    return [path for path in ordered if not names or any(matches_name(path, name) for name in names)]


def _parts(path: str) -> list[str]:
    return re.split(r"[.\[\]]", path)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
