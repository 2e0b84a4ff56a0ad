"""Where the weights of the running model lie in its files: under which names, whole or in pieces.

transformers keeps the experts of a layer as one tensor [E, ...], which the files of the hub hold expert by expert and
projection by projection, and renames modules on the way. Its own map between the two is used here, so that a merged
checkpoint has exactly the names of the base's.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ftkit.artifacts.updates import path_of
from ftkit.artifacts.weights import TensorFiles
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods.base import ComputeDelta, Replacement

SAVE_ANEW = "save the base anew with transformers' save_pretrained, or use the adapter without merging"


@dataclass
class Layout:
    """Name of a weight in the running model -> names of its pieces in the files; one, where it lies there whole."""

    model: PreTrainedModel
    """Tells names and shapes; see `build_skeleton`."""
    pieces: Mapping[str, tuple[str, ...]]
    _cut: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def in_files(self, deltas: Mapping[str, ComputeDelta]) -> dict[str, ComputeDelta]:
        """The deltas under the names that their weights have in the files.

        Raises:
            UserError: one needs the whole weight, of which a file holds but a piece.
        """
        found: dict[str, ComputeDelta] = {}
        for name, delta in deltas.items():
            pieces = self.pieces.get(name, ())
            if not self._is_cut(name):
                found |= dict.fromkeys(pieces, delta)
            elif isinstance(delta, Replacement):
                found |= {piece: Replacement(tuned) for piece, tuned in self._cut_up(name, delta.tuned).items()}
            elif delta.depends_on_weight:
                what = f"the files hold {name} in pieces, and its update needs all of it at once"
                raise UserError(what, how=SAVE_ANEW)
            else:
                found |= {piece: PieceDelta(self, name, piece, delta) for piece in pieces}
        return found

    def read(self, files: TensorFiles, name: str) -> Tensor:
        """The weight `name` as the running model has it, in the precision of the files."""
        pieces = self.pieces[name]
        return self._joined(name, {piece: files[piece] for piece in pieces}) if self._is_cut(name) else files[pieces[0]]

    def piece_of_delta(self, name: str, piece: str, delta: ComputeDelta) -> Tensor:
        """What is added to a piece.

        Those of the last module are kept: files hold its weights one after another, expert by expert.
        """
        if name not in self._cut:
            for other in list(self._cut):
                if path_of(other) != path_of(name):
                    del self._cut[other]
            # Shapes alone: an update that does not depend on the weight does not look at it.
            self._cut[name] = self._cut_up(name, delta(self.model.get_parameter(name)))
        return self._cut[name][piece]

    def _is_cut(self, name: str) -> bool:
        return len(self.pieces.get(name, ())) > 1 and name not in self.pieces[name]

    def _cut_up(self, name: str, whole: Tensor) -> dict[str, Tensor]:
        return revert_weight_conversion(self.model, {name: whole})

    def _joined(self, name: str, pieces: Mapping[str, Tensor]) -> Tensor:
        transforms = get_model_conversion_mapping(self.model, add_legacy=False)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        joining: WeightConverter | None = None
        for piece in sorted(pieces, key=dot_natural_key):
            target, pattern = rename_source_key(piece, renamings, converters)
            assert pattern is not None, piece
            if joining is None:
                joining = deepcopy(next(one for one in converters if pattern in one.source_patterns))
            joining.add_tensor(target, piece, pattern, cast(Any, pieces[piece]))  # typed for what is still to be read
        assert joining is not None, name
        whole = next(iter(joining.convert(name, model=self.model, config=self.model.config).values()))
        return whole[0] if isinstance(whole, list) else whole


@dataclass(frozen=True, eq=False)
class PieceDelta:
    """The `ComputeDelta` of a piece of a weight."""

    layout: Layout
    name: str
    piece: str
    delta: ComputeDelta

    @property
    def depends_on_weight(self) -> bool:
        """Never: such a weight would be needed whole."""
        return False

    def __call__(self, weight: Tensor) -> Tensor:
        """The piece of what is added to the whole."""
        return self.layout.piece_of_delta(self.name, self.piece, self.delta)


def lay_out(model: PreTrainedModel, source: Path, names: Iterable[str]) -> Layout:
    """Find the weights `names` of the running model in the files of `source`.

    A name may be stored as it is, without the model's `base_model_prefix` (GPT-2: `h.0...` for `transformer.h.0...`),
    or as transformers' map says. Of the names of a tied weight files may hold one or all.

    Raises:
        CheckFailedError: a weight is in no file, or in pieces that do not fit; it would stay unmerged in silence.
    """
    with TensorFiles(source) as files:
        shapes = {name: files.shape(name) for name in files.names}
    pieces: dict[str, tuple[str, ...]] = {}
    found: set[int] = set()
    names = list(names)
    for name in names:
        if stored := _stored_as(model, name, shapes):
            pieces[name] = stored
            found.add(id(model.get_parameter(name)))
    for name in names:
        if id(model.get_parameter(name)) not in found:
            what = f"{name} is adapted, but no weight file of {source} holds it under this name"
            raise CheckFailedError(what, how=SAVE_ANEW)
    return Layout(model, pieces)


def _stored_as(model: PreTrainedModel, name: str, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    whole = model.get_parameter(name)
    plain = (name, name.removeprefix(f"{model.base_model_prefix}."))
    if stored := tuple(candidate for candidate in dict.fromkeys(plain) if candidate in shapes):
        return stored
    # Without numbers this tells names and shapes alone.
    cut = revert_weight_conversion(model, {name: torch.empty(whole.shape, device="meta")})
    fits = all(list(piece.shape) == list(shapes.get(own, ())) for own, piece in cut.items())
    return tuple(cut) if fits and sum(piece.numel() for piece in cut.values()) == whole.numel() else ()
