"""Which linear layers a method's `targets` and `exclude` choose."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.models.architecture import linear_modules, stacked_experts

ALL_LINEAR = "all-linear"
Value = TypeVar("Value")
Pattern = str | Sequence[str]
"""A regular expression that matches whole paths, or names."""


def select_targets(
    model: PreTrainedModel, targets: Pattern, exclude: Pattern, *, with_experts: bool = False
) -> dict[str, nn.Module]:
    """Path -> linear layer, in the model's order.

    Args:
        with_experts: whether experts that are kept as one tensor are adapted besides, by `method.target_parameters`.
        targets: `all-linear`, names (`q_proj`, `mlp.down_proj`, a whole path), or a regular expression.
        exclude: names or a regular expression; empty for none.

    Raises:
        UserError: a name or an expression matches nothing, or nothing is left; the message lists what there is.
    """
    layers = linear_modules(model)
    if targets == ALL_LINEAR:
        if not with_experts:
            _refuse_stacked_experts(model, layers)
        chosen = set(layers)
    else:
        chosen = _matches(layers, targets, "targets")
    chosen -= _matches(layers, exclude, "exclude") if exclude else set()
    if not chosen:
        raise UserError(
            "method.exclude leaves out every target", how="exclude fewer modules", key=("method", "exclude")
        )
    return {path: module for path, module in layers.items() if path in chosen}


def matching_value(values: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first name or expression that matches the end of `path`, as peft reads `rank_pattern`."""
    return next((value for pattern, value in values.items() if _matches_end(pattern, path)), default)


def check_patterns(patterns: Iterable[str], layers: Iterable[str], key: str) -> None:
    """Check that every pattern of `method.KEY` matches a layer that is adapted.

    Raises:
        UserError: some match none; the message lists what there is.
    """
    layers = list(layers)
    if unmatched := [pattern for pattern in patterns if not any(_matches_end(pattern, path) for path in layers)]:
        raise _unmatched(unmatched, layers, key, "adapted layer: these are")


def matches_name(path: str, name: str) -> bool:
    """Whether `name` is the path or its last components, as peft matches `target_modules`."""
    return path == name or path.endswith(f".{name}")


def shortest_names(model: PreTrainedModel, chosen: Iterable[str]) -> list[str]:
    """Names that peft matches to exactly the chosen paths: last components where these suffice, else whole paths."""
    paths = set(chosen)
    names = sorted({path.rpartition(".")[2] for path in paths})
    matched = {path for path, _ in model.named_modules() if any(matches_name(path, name) for name in names)}
    return names if matched == paths else sorted(paths)


def _matches_end(pattern: str, path: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


def _matches(layers: dict[str, nn.Module], pattern: Pattern, key: Literal["targets", "exclude"]) -> set[str]:
    if isinstance(pattern, str):
        expression = re.compile(pattern)
        matched = {path for path in layers if expression.fullmatch(path)}
        if not matched:
            raise _unmatched([pattern], layers, key)
        return matched
    by_name = {name: {path for path in layers if matches_name(path, name)} for name in pattern}
    unmatched = [name for name, paths in by_name.items() if not paths]
    if unmatched:
        raise _unmatched(unmatched, layers, key)
    return set().union(*by_name.values())


def _unmatched(
    names: list[str],
    layers: Iterable[str],
    key: str,
    what: str = "linear layer of the decoder blocks, which have:",
) -> UserError:
    counts = Counter(path.rpartition(".")[2] for path in layers)
    there = ", ".join(f"{name} ({count})" for name, count in counts.items())
    close = [match for name in names for match in difflib.get_close_matches(name, [*counts, ALL_LINEAR], n=1)]
    return UserError(
        f"{', '.join(names)} matches no {what} {there}",
        how=f"did you mean {', '.join(dict.fromkeys(close))}?" if close else "name some of these",
        key=("method", key),
    )


def _refuse_stacked_experts(model: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
    """`all-linear` promises the experts too: leaving them out in silence would train a part of what was asked for."""
    experts = stacked_experts(model)
    if experts:
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in layers))
        stacks = dict.fromkeys(".".join(weight.split(".")[-2:]) for weight in experts)
        raise UserError(
            f"this model keeps its experts as one tensor ({experts[0]}), which is no linear layer",
            how=f"adapt them too, target_parameters: [{', '.join(stacks)}], or only the others, targets: [{names}]",
            key=("method", "targets"),
        )
