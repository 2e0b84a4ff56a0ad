"""The adapters that a merge is asked for: their names and weights on the command line, and the base that they share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ftkit.errors import UserError
from ftkit.methods import full
from ftkit.methods.files import LORA, WEIGHTS_NAME, BaseIdentity, identify
from ftkit.methods.table import method_of
from ftkit.models.files import ADAPTER_CONFIG_NAME, hash_files, read_json
from ftkit.models.load import BaseModel
from ftkit.runs import Target

_WEIGHT = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


@dataclass(frozen=True)
class WeightedAdapter:
    """A LoRA and how much of it is added to the base; below zero it is subtracted."""

    target: Target
    weight: float = 1.0

    @property
    def directory(self) -> Path:
        """Directory of the LoRA.

        Raises:
            UserError: the target is something else; see `lora_of`.
        """
        return lora_of(self.target)

    @cached_property
    def fingerprint(self) -> str:
        """Of the adapter's weights and of its configuration, which says by how much they count."""
        return hash_files([self.directory / WEIGHTS_NAME, self.directory / ADAPTER_CONFIG_NAME])

    def describe(self) -> dict[str, Any]:
        """What merge_report.json says of it."""
        return {"path": str(self.directory.absolute()), "weight": self.weight, "fingerprint": self.fingerprint}


def parse_adapter(text: str) -> tuple[str, float]:
    """ "runs/a:0.5" -> ("runs/a", 0.5); the weight is what follows the last colon if it is a number.

    Raises:
        UserError: the weight is 0, which would merge nothing.
    """
    match = _WEIGHT.fullmatch(text)
    if match is None or Path(text).exists():
        return text, 1.0
    if float(match[2]) == 0.0:
        raise UserError(f"{text}: an adapter at weight 0 changes nothing", how="leave it out")
    return match[1], float(match[2])


def lora_of(target: Target) -> Path:
    """Directory of the LoRA that `target` names.

    Raises:
        UserError: it is something else; the message says what to do with that.
    """
    if target.adapter is None:
        raise UserError(f"{target.label}: {full.merge_refusal}")
    kind = read_json(target.adapter / ADAPTER_CONFIG_NAME).get("peft_type")
    if kind != LORA:
        raise UserError(f"{target.adapter}: {method_of(target.adapter).merge_refusal}")
    if target.prompt is not None:
        raise UserError(
            f"{target.label}: the LoRA trained with a soft prompt, which no weight of the model can hold",
            how=_without_prompt(target.adapter, target.prompt),
        )
    return target.adapter


def _without_prompt(adapter: Path, prompt: Path) -> str:
    alone = f"merge {adapter}, the LoRA alone," if prompt.parent != adapter else f"move {prompt} away, merge the rest,"
    return f"{alone} and put the prompt before what the merged model reads"


def common_base(adapters: Sequence[WeightedAdapter]) -> tuple[BaseModel, BaseIdentity]:
    """The base that all adapters name, or were given.

    Raises:
        UserError: they name bases whose weights differ; two of them are told.
    """
    first = adapters[0].target
    identity = identify(first.model)
    for other in adapters[1:]:
        if _place(other.target.model) != _place(first.model):
            theirs = identify(other.target.model)
            if theirs.fingerprint != identity.fingerprint:
                what = f"{first.label} belongs to {identity}, and {other.target.label} to {theirs}"
                raise UserError(what, how="merge adapters of one base, or name the base of all of them with --base")
    return first.model, identity


def common_quantization(adapters: Sequence[WeightedAdapter]) -> str | None:
    """What the base of adapters that were trained on it was quantised to then; None where it was not.

    Raises:
        UserError: one trained on another form of it than another did.
    """
    kinds: dict[str | None, str] = {}
    for one in adapters:
        kinds.setdefault(one.target.model.quantization, one.target.label)
    if len(kinds) > 1:
        (kind, first), (other, second) = list(kinds.items())[:2]
        forms = [form or "its own precision" for form in (kind, other)]
        what = f"{first} was trained on the base in {forms[0]}, {second} in {forms[1]}"
        raise UserError(what, how="merge each into a directory of its own")
    return next(iter(kinds), None)


def _place(base: BaseModel) -> tuple[Path | None, str | None, str | None]:
    return base.path, base.repo_id, base.revision
