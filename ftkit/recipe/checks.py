"""What must hold between the keys of a recipe, each of which is valid by itself."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ftkit.errors import KeyPath, Problem
from ftkit.recipe.names import explain_unknown
from ftkit.recipe.schema import DatasetSection, Recipe

PLACEHOLDERS = ("name", "n", "method", "time")
"""What `output_dir` may hold in braces."""


def has_validation(recipe: Recipe) -> bool:
    """Whether the run has validation rows: data sets of their own, or a share of the training rows."""
    return bool(recipe.data.eval) or recipe.data.val_size > 0


def check(recipe: Recipe) -> list[Problem]:
    """All conflicts between keys."""
    return [problem for find in CHECKS for problem in find(recipe)]


def _quantization(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.quantization is not None and recipe.method.type == "full":
        what = "a quantized weight is frozen, and method.type: full trains every weight"
        yield Problem(what, "set method.type: lora, or leave it out", key=("model", "quantization"))


def _new_tokens(recipe: Recipe) -> Iterator[Problem]:
    model, seen = recipe.model, set[str]()
    for name, tokens in (("add_tokens", model.add_tokens), ("add_special_tokens", model.add_special_tokens)):
        key: KeyPath = ("model", name)
        if tokens and recipe.method.type != "lora":
            what = f"method.type: {recipe.method.type} trains no rows of new tokens in this version"
            yield Problem(what, "set method.type: lora, or leave it out", key=key)
        for token in tokens:
            if token in seen or token != token.strip():
                why = "is named twice" if token in seen else "begins or ends in white space"
                yield Problem(f"{token!r} {why}", "name each token once, without white space around it", key=key)
            seen.add(token)


def _prompts(recipe: Recipe) -> Iterator[Problem]:
    attention, method = recipe.model.attn_implementation, recipe.method.type
    if method in ("prefix", "llama_adapter") and attention not in ("auto", "ftkit"):
        what = f"{attention} knows nothing of the prompts that method.type: {method} trains in every layer"
        yield Problem(what, "set it to auto, or leave it out", key=("model", "attn_implementation"))


def _mixing(recipe: Recipe) -> Iterator[Problem]:
    mixing = recipe.data.mixing
    key: KeyPath = ("data", "mixing")
    weighted = "set data.mixing.strategy: weights, or remove it"
    for name, strategies in (("maximum", ("proportional", "temperature")), ("temperature", ("temperature",))):
        if getattr(mixing, name) is not None and mixing.strategy not in strategies:
            how = f"set data.mixing.strategy: {strategies[0]}, or remove it"
            yield Problem(f"{mixing.strategy} has no {name}", how, key=(*key, name))
    if mixing.strategy == "concat":
        if mixing.epoch_size is not None:
            yield Problem("concat takes every row once an epoch", weighted, key=(*key, "epoch_size"))
        if mixing.stopping is not None:
            yield Problem("concat takes every row once an epoch", weighted, key=(*key, "stopping"))
        for index, dataset in enumerate(recipe.data.train):
            if dataset.weight != 1.0:
                yield Problem(
                    "concat takes every row once an epoch, at no rate", weighted, key=("data", "train", index, "weight")
                )
    elif mixing.epoch_size is not None and mixing.stopping is not None:
        yield Problem("epoch_size and stopping both end an epoch", "keep one of them", key=(*key, "stopping"))
    for index, dataset in enumerate(recipe.data.eval):
        if dataset.weight != 1.0:
            yield Problem("validation rows are not drawn", "remove it", key=("data", "eval", index, "weight"))


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    """Keys that choose or draw training rows, in data sets that are measured: each row once, in one form."""
    for index, dataset in enumerate(recipe.data.eval):
        unused = {
            "clusters": "validation rows of all clusters are measured",
            "exclude_clusters": "validation rows of all clusters are measured",
            "few_shot": "validation rows are asked without solved examples",
            "rationale": "validation rows are asked without reasoning",
            "repeat": "each validation row is measured once",
        }
        for name, what in unused.items():
            if getattr(dataset, name) not in ((), 0.0, "never", None):
                yield Problem(what, "remove it, or set it in data.train", key=("data", "eval", index, name))


def _dataset_names(recipe: Recipe) -> Iterator[Problem]:
    lists: tuple[tuple[str, tuple[DatasetSection, ...]], ...] = (
        ("train", recipe.data.train),
        ("eval", recipe.data.eval),
    )
    for kind, datasets in lists:
        first: dict[str, int] = {}
        for index, dataset in enumerate(datasets):
            if dataset.name is None:
                continue
            if dataset.name in first:
                what = f"data.{kind}.{first[dataset.name]} has the name {dataset.name} too"
                yield Problem(what, "give each data set a name of its own", key=("data", kind, index, "name"))
            first.setdefault(dataset.name, index)


def _columns(recipe: Recipe) -> Iterator[Problem]:
    for kind, datasets in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, dataset in enumerate(datasets):
            key: KeyPath = ("data", kind, index)
            if dataset.templates is None:
                for name in dataset.columns.model_extra or {}:
                    yield explain_unknown((*key, "columns", name))
                for name in ("labels", "few_shot"):
                    if getattr(dataset, name):
                        yield Problem("only templates use it", "set templates, or remove it", key=(*key, name))
                if dataset.rationale not in ("never", 0.0):
                    yield Problem("only templates use it", "set templates, or remove it", key=(*key, "rationale"))


def _intervals(recipe: Recipe) -> Iterator[Problem]:
    evaluate, save = recipe.training.eval_steps, recipe.training.save_steps
    if save is None or not has_validation(recipe) or isinstance(save, int) is not isinstance(evaluate, int):
        return
    times = save / evaluate
    if times < 1 or abs(times - round(times)) > 1e-6:
        what = f"checkpoints are saved at evaluations, and {save} is no multiple of training.eval_steps, {evaluate}"
        yield Problem(what, "make it one, or leave it out", key=("training", "save_steps"))


def _best(recipe: Recipe) -> Iterator[Problem]:
    metric = recipe.training.metric_for_best_model
    key: KeyPath = ("training", "metric_for_best_model")
    names = [dataset.name for dataset in recipe.data.eval or recipe.data.train]
    if not has_validation(recipe):
        how = "set data.val_size or data.eval, or remove it"
        if recipe.training.early_stopping_patience is not None:
            what = "early stopping needs validation rows"
            yield Problem(what, how, key=("training", "early_stopping_patience"))
        if metric != "eval_loss":
            yield Problem("there are no validation rows", how, key=key)
    elif metric != "eval_loss" and None not in names and metric.removeprefix("eval_loss_") not in names:
        known = ", ".join(["eval_loss", *(f"eval_loss_{name}" for name in names)])
        yield Problem(
            f"there is no validation data set {metric.removeprefix('eval_loss_')}", f"choose one of {known}", key=key
        )


def _trackers(recipe: Recipe) -> Iterator[Problem]:
    named = recipe.training.report_to
    for index, tracker in enumerate(named):
        if tracker in named[:index]:
            what = f"{tracker} is named twice"
            yield Problem(what, "name each tracker once", key=("training", "report_to", index))
    for name in ("run_name", "project"):
        if getattr(recipe.training, name) is not None and not named:
            how = "set training.report_to, e.g. [wandb], or remove it"
            yield Problem("only trackers use it, and none is named", how, key=("training", name))


def _output_dir(recipe: Recipe) -> Iterator[Problem]:
    key: KeyPath = ("output_dir",)
    known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    for name in re.findall(r"\{([^{}]*)\}", recipe.output_dir):
        if name not in PLACEHOLDERS:
            yield Problem(f"unknown placeholder {{{name}}}", f"choose among {known}", key=key)
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", recipe.output_dir)):
        yield Problem("a brace without its partner", f"write placeholders as {known}", key=key)
    if Path(recipe.output_dir).name in ("", ".."):
        yield Problem(f"{recipe.output_dir} is no place for a run", "name a directory of its own", key=key)


CHECKS: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
    _quantization,
    _new_tokens,
    _prompts,
    _mixing,
    _evaluation,
    _dataset_names,
    _columns,
    _intervals,
    _best,
    _trackers,
    _output_dir,
)
