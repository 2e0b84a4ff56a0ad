"""What training changed: the spectrum of every update dW, and its size beside the weight W that it changes.

The update of a LoRA is read from its factors and decomposed through them. What is no low-rank product (a fully trained
model, modules that trained in full beside a LoRA, DoRA) is compared with the base's files, one matrix in memory at a
time.
"""

import difflib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.layout import lay_out
from ftkit.artifacts.updates import build_skeleton, load_adapter
from ftkit.console import Console
from ftkit.errors import UserError
from ftkit.methods.base import ComputeDelta, NewRows, Replacement
from ftkit.methods.lora_experts import ExpertsDelta
from ftkit.methods.lora_saved import LowRankDelta, expert_by_expert, read_saved
from ftkit.methods.spectrum import (
    Spectrum,
    amplification,
    chance_amplification,
    decompose,
    decompose_product,
    spectrum_of_difference,
)
from ftkit.methods.targets import matches_name
from ftkit.models.files import TensorFiles
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

    @property
    def chance(self) -> float | None:
        """What `amplification` would be if the directions of dW had nothing to do with W; None where that is."""
        if self.rank is None or self.relative_norm is None or self.amplification is None:
            return None
        count = min(self.rank, int((self.spectrum.values_K > 0).sum()))
        return chance_amplification(self.relative_norm, count, self.shape)


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
    one_by_one = [pair for name in chosen for pair in split(name, saved.deltas[name])]
    return Inspection(label, None, tuple(_low_rank_change(name, delta, None) for name, delta in one_by_one), notes)


def inspect_adapter(target: Target, *, console: Console, names: Sequence[str] = ()) -> Inspection:
    """The spectra of a LoRA, beside the weights of the base that `target` names.

    Raises:
        UserError: the adapter cannot be read, does not fit the base, or a name matches nothing.
        CheckFailedError: the base's files lack a weight that is adapted.
    """
    deltas = load_adapter(WeightedAdapter(target), target.model).deltas
    source = local_directory(target.model, weights=True)
    layout = lay_out(build_skeleton(target.model), source, deltas)
    # A tied weight has several names with the same delta: the first one that files know stands.
    names_of: dict[ComputeDelta, str] = {}
    for name, delta in deltas.items():
        if name in layout.pieces:
            names_of.setdefault(delta, name)
    by_path = {name.removesuffix(".weight"): name for name in names_of.values()}
    chosen = choose(by_path, names)
    changes: list[Change] = []
    vectors = []
    with TensorFiles(source) as files, console.progress("inspecting", total=len(chosen)) as bar:
        for number, path in enumerate(chosen):
            weight = layout.read(files, by_path[path])
            if weight.ndim > 1:
                changes += _changes(path, deltas[by_path[path]], weight)
            else:
                vectors.append(path)
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
    changes: list[Change] = []
    vectors: list[float] = []
    unpaired = []
    directories = [local_directory(one, weights=True) for one in (model, base)]
    prefix = build_skeleton(base).base_model_prefix
    with TensorFiles(directories[0]) as tuned, TensorFiles(directories[1]) as before:
        places = _pair(tuned.names, set(before.names), prefix=prefix)
        by_path = {name.removesuffix(".weight"): name for name in tuned.names}
        chosen = choose(by_path, names)
        with console.progress("inspecting", total=len(chosen)) as bar:
            for number, path in enumerate(chosen):
                place = places.get(by_path[path])
                if place is None or tuned.shape(by_path[path]) != before.shape(place):
                    unpaired.append(path)
                else:
                    after, here = tuned[by_path[path]], before[place]
                    if after.ndim > 1:
                        changes += _differences(path, after, here)
                    else:
                        vectors.append(_relative(float(_norm(after.double() - here.double())), here) or 0.0)
                bar.update(number + 1)
    if not changes and not vectors:
        how = "name the model that it was trained from with --base"
        raise UserError(f"{label} and {base.name} have no weights of one name and shape", how=how)
    notes = []
    if vectors:
        notes.append(f"{len(vectors)} vectors (norms, biases) moved by {max(vectors):.2%} of their norm at most")
    if unpaired:
        remedy = "save both with the same transformers' save_pretrained to compare them"
        notes.append(f"{_listed(unpaired)}: the base's files hold no weight of this name and shape; {remedy}")
    return Inspection(label, base.name, tuple(changes), tuple(notes))


def split(name: str, delta: LowRankDelta | ExpertsDelta) -> list[tuple[str, LowRankDelta]]:
    """A layer as it is, and a stack of experts expert by expert, each with its name."""
    if isinstance(delta, LowRankDelta):
        return [(name, delta)]
    return [(f"{name}[{index}]", one) for index, one in enumerate(expert_by_expert(delta))]


def _changes(name: str, delta: ComputeDelta, weight: Tensor) -> Iterator[Change]:
    """What `delta` makes of a weight: one matrix, or one for each expert; of rows of new tokens there is no before."""
    if isinstance(delta, NewRows):
        return
    if isinstance(delta, Replacement):
        yield from _differences(name, delta.tuned, weight)
        return
    assert isinstance(delta, LowRankDelta | ExpertsDelta), name
    matrices = weight if isinstance(delta, ExpertsDelta) else [weight]
    for (own_name, one), matrix in zip(split(name, delta), matrices, strict=True):
        yield _low_rank_change(own_name, one, matrix)


def _low_rank_change(name: str, delta: LowRankDelta, weight: Tensor | None) -> Change:
    """What `delta` makes of a weight; without the weight, of a plain LoRA."""
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


def _differences(name: str, tuned: Tensor, weight: Tensor) -> Iterator[Change]:
    for (own_name, after), (_, before) in zip(_matrices(name, tuned), _matrices(name, weight), strict=True):
        spectrum = spectrum_of_difference(after, before)
        shape = (len(before), before.shape[1])
        yield Change(own_name, shape, None, spectrum, _relative(spectrum.norm, before), None)


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


def _pair(tuned: Iterable[str], before: Container[str], *, prefix: str) -> dict[str, str]:
    """Name of each weight -> its name in the base's files, which may leave the model's prefix out or have it."""
    candidates = {name: (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") for name in tuned}
    found = {name: next((one for one in several if one in before), None) for name, several in candidates.items()}
    return {name: place for name, place in found.items() if place is not None}


def choose(paths: Iterable[str], names: Sequence[str]) -> list[str]:
    """The paths that end in one of `names`, all where there are none, in the model's order: layer 2 before layer 10.

    Raises:
        UserError: a name matches nothing.
    """
    ordered = sorted(paths, key=dot_natural_key)
    for name in names:
        if not any(matches_name(path, name) for path in ordered):
            there = list(dict.fromkeys(path.rpartition(".")[2] for path in ordered))
            close = difflib.get_close_matches(name, there, n=1)
            how = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
            raise UserError(f"--modules {name} matches nothing that was trained", how=how)
    return [path for path in ordered if not names or any(matches_name(path, name) for name in names)]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
