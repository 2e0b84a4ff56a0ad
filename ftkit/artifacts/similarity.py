"""Which directions two adapters of one model share: section 7.2 of the LoRA paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ftkit.artifacts.inspection import choose, split
from ftkit.errors import UserError
from ftkit.methods.files import read_identity
from ftkit.methods.lora_saved import LowRankDelta, SavedLora, read_saved
from ftkit.methods.spectrum import chance_similarity, decompose_product, directions, subspace_similarity


@dataclass(frozen=True, eq=False)
class ModuleSimilarity:
    """How much two adapters share in one layer."""

    name: str
    width: int
    """Of the space that the directions lie in."""
    phi: Tensor
    """Row i - 1, column j - 1: of the first i directions of the one and the first j of the other, 0 to 1; empty where
    an adapter does nothing."""

    @property
    def chance(self) -> float:
        """What the last value of `phi` would be, on average, of random directions."""
        i, j = self.phi.shape
        return chance_similarity(i, j, self.width)


@dataclass(frozen=True)
class Comparison:
    """How much two adapters share."""

    labels: tuple[str, str]
    modules: tuple[ModuleSimilarity, ...]
    """Those that both adapt, in the model's order."""
    notes: tuple[str, ...]
    """What a reader should know about the figures."""


def compare_adapters(
    labels: tuple[str, str], directories: tuple[Path, Path], *, left: bool, names: Sequence[str] = ()
) -> Comparison:
    """Compare the directions of two LoRAs, layer by layer; their base is not needed.

    Args:
        left: those that the updates write to (left singular vectors of B), in place of those that they read (right
            singular vectors of A), which the paper compares.
        names: only these modules, as `targets` names them; empty for all.

    Raises:
        UserError: one cannot be read, they have no layer in common, or a layer has another width.
    """
    one, other = (read_saved(directory) for directory in directories)
    common = [path for path in one.deltas if path in other.deltas]
    if not common:
        what = f"{labels[0]} and {labels[1]} adapt no layer in common"
        raise UserError(what, how="compare adapters of one model with the same targets")
    of_update = _began_with_the_base(one) or _began_with_the_base(other)
    modules = []
    for path in choose(common, names):
        updates = [split(path, saved.deltas[path]) for saved in (one, other)]
        if len(updates[0]) != len(updates[1]):
            what = f"{path} has {len(updates[0])} experts in {labels[0]} and {len(updates[1])} in {labels[1]}"
            raise UserError(what, how="compare adapters of one model")
        for (name, first), (_, second) in zip(*updates, strict=True):
            found = [_directions(update, left=left, of_update=of_update) for update in (first, second)]
            if len(found[0]) != len(found[1]):
                what = f"{name} is {len(found[0])} wide in {labels[0]} and {len(found[1])} in {labels[1]}"
                raise UserError(what, how="compare adapters of one model")
            modules.append(ModuleSimilarity(name, len(found[0]), subspace_similarity(*found)))
    notes = []
    fingerprints = [read_identity(directory).fingerprint for directory in directories]
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        notes.append("the adapters were trained on bases with different weights")
    if of_update:
        notes.append("a PiSSA's A and B hold what they began with too: these are the directions of the update B A")
    if alone := len(one.deltas) + len(other.deltas) - 2 * len(common):
        notes.append(f"{alone} more layers are adapted by one of them alone")
    return Comparison(labels, tuple(modules), tuple(notes))


def _began_with_the_base(saved: SavedLora) -> bool:
    """Whether the saved factors are [A; A0] and [B, -B0], of which only the product says what was learned."""
    return saved.section.init == "pissa"


def _directions(delta: LowRankDelta, *, left: bool, of_update: bool) -> Tensor:
    """Directions of a layer [D, K], the strongest first."""
    if of_update:
        update = decompose_product(delta.a_RI, delta.b_OR, delta.scale)
        return update.u_OK if left else update.v_IK
    return directions(delta.b_OR if left else delta.a_RI.t())
