"""What a merged model is made of, from the record that its merge left beside it.

A merge of a merge is told as the base that all of it goes back to, with the adapters in total: so an adapter can be
taken off again, or put in another's place, and none is taken off that was never merged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ftkit.errors import UserError
from ftkit.methods.files import BaseIdentity, check_base
from ftkit.models.files import read_json
from ftkit.models.load import BaseModel, local_directory

REPORT_NAME = "merge_report.json"
NOTHING = 1e-6
"""A weight below this in absolute value is what rounding leaves of 0.7 - 0.7."""


@dataclass(frozen=True)
class Contained:
    """An adapter, and how much of it is in a model."""

    path: str
    fingerprint: str
    weight: float

    def __str__(self) -> str:
        return f"{self.path} ({self.fingerprint}) at weight {self.weight:g}"


class Merged(Protocol):
    """An adapter that is to be merged."""

    @property
    def directory(self) -> Path:
        """Where it lies."""

    @property
    def fingerprint(self) -> str:
        """Of its weights and configuration."""

    @property
    def weight(self) -> float:
        """How much of it is added."""


@dataclass(frozen=True)
class Contents:
    """What a model is made of."""

    bases: tuple[BaseIdentity, ...]
    """The model that is nobody's merge, then the merged ones that were built on."""
    adapters: tuple[Contained, ...] = ()
    """In total."""
    passes: int = 0
    """Merges since the first base, each of which rounded once."""
    quantization: str | None = None
    """What the first base was quantised to, and dequantised, before anything was added."""

    def __str__(self) -> str:
        return " + ".join([str(self.bases[0]), *map(str, self.adapters)])

    def after(self, adapters: Sequence[Merged], here: BaseIdentity) -> "Contents":
        """What it is made of once `adapters` have been merged into it.

        Args:
            here: the identity of the model itself.
        """
        total = {contained.fingerprint: contained for contained in self.adapters}
        for adapter in adapters:
            before = total.get(adapter.fingerprint)
            weight = adapter.weight + (before.weight if before else 0.0)
            total[adapter.fingerprint] = Contained(str(adapter.directory.absolute()), adapter.fingerprint, weight)
        kept = tuple(contained for contained in total.values() if abs(contained.weight) > NOTHING)
        # Once something was taken off, what was trained on the whole no longer finds it there.
        grown = all(adapter.weight > 0 for adapter in adapters) and here not in self.bases
        return Contents((*self.bases, here) if grown else self.bases, kept, self.passes + 1, self.quantization)


def read_contents(base: BaseModel, identity: BaseIdentity) -> Contents:
    """What `base` is made of: itself, unless a record of ftkit's lies beside it that is about these very weights.

    Raises:
        UserError: the record is damaged.
    """
    path = local_directory(base, weights=False) / REPORT_NAME
    report = read_json(path) if path.is_file() else {}
    if report.get("fingerprint") != identity.fingerprint:
        return Contents((identity,))
    try:
        return contents_from(report["contents"])
    except (KeyError, TypeError):
        raise UserError("is damaged", how="remove it, or merge again", where=str(path)) from None


def contents_from(values: Mapping[str, Any]) -> Contents:
    """The contents in a report."""
    bases = tuple(BaseIdentity(**base) for base in values["bases"])
    adapters = tuple(Contained(**adapter) for adapter in values["adapters"])
    return Contents(bases, adapters, values["passes"], values.get("quantization"))


def check_base_of(adapter: Merged, trained_on: BaseIdentity, contents: Contents, here: BaseIdentity) -> bool:
    """Check that `adapter` belongs to a model, or to one that the model is made from: in the second case True.

    Args:
        trained_on: the adapter's base, as far as it is known.
        here: the identity of the model.

    Raises:
        UserError: it belongs to another; both are named.
    """
    if trained_on.fingerprint not in {base.fingerprint for base in contents.bases}:
        check_base(adapter.directory, trained_on, here)
    return trained_on.fingerprint != here.fingerprint and contents.passes > 0


def check_subtracted(subtracted: Sequence[Merged], before: Contents, after: Contents, here: BaseIdentity) -> None:
    """Check that a merged model contains what is subtracted from it.

    Args:
        subtracted: adapters that belong to a model that it is made from, at weights below zero.
        before: what the model is made of.
        after: what will be left.
        here: the identity of the model.

    Raises:
        UserError: it does not, or less of it; both identities are named.
    """
    left = {contained.fingerprint: contained.weight for contained in after.adapters}
    there = {contained.fingerprint: contained.weight for contained in before.adapters}
    for adapter in subtracted:
        name, weight = f"{adapter.directory} ({adapter.fingerprint})", there.get(adapter.fingerprint, 0.0)
        if left.get(adapter.fingerprint, 0.0) < 0 and weight > 0:
            what = f"{here} contains {name} at weight {weight:g}, less than is subtracted"
            raise UserError(what, how=f"subtract what there is: {adapter.directory}:{-weight:g}")
        if left.get(adapter.fingerprint, 0.0) < 0:
            raise UserError(f"{here} does not contain {name}: it is {before}", how="subtract what it contains")
