"""The recipe of a smoke run: the user's, as long and as large as a minute allows."""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.errors import FtkitError, StorageError, UserError
from ftkit.methods.llama_adapter import LAYERS_WITHOUT
from ftkit.methods.targets import check_patterns, select_targets
from ftkit.models.architecture import linear_modules, linear_shape
from ftkit.models.isolation import FLASH
from ftkit.models.small_copy import build_random, plain_copy, text_config
from ftkit.recipe.load import LoadedRecipe
from ftkit.recipe.method_schema import AdapterMethod, LlamaAdapterMethod, LoraMethod
from ftkit.recipe.schema import DatasetSection, Recipe
from ftkit.runs import fill_output
from ftkit.training.prepare import Prepared

ROWS, FIRST_ROWS = 8, 1000
"""Rows of each data set that are used, out of so many that are read."""
STEPS, BATCH = 2, 4
"""Optimizer steps, and examples of one at most."""
VALIDATION = 0.25
"""Share of the rows that is held back, where the recipe holds any back."""
OUTPUT_KEY = ("output_dir",)


def with_base(loaded: LoadedRecipe, directory: Path, quantization: str | None) -> LoadedRecipe:
    """The recipe with a local base in the place of its own."""
    changes = {"revision": None, "quantization": quantization}
    if loaded.recipe.model.attn_implementation == FLASH:
        # A kernel of GPUs; the copy runs on the CPU.
        changes["attn_implementation"] = "auto"
    model = loaded.recipe.model.model_copy(update=changes)
    recipe = loaded.recipe.model_copy(update={"base_model": str(directory), "model": model})
    return replace(loaded, recipe=recipe)


def shortened(loaded: LoadedRecipe, output: Path, method: Any) -> LoadedRecipe:
    """The recipe with few rows and steps and a method that fits the copy; what else it says stays as it is."""
    recipe = loaded.recipe
    data = {
        "train": _few_rows(recipe.data.train),
        "eval": _few_rows(recipe.data.eval),
        "val_size": VALIDATION if recipe.data.val_size else recipe.data.val_size,
    }
    training = {
        "max_steps": STEPS,
        "global_batch_size": min(BATCH, recipe.training.global_batch_size),
        # The recipe's may be longer than this run.
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": STEPS,
        "early_stopping_patience": None,
        "final": "last",
        # Their projects are for real runs, and they want a network.
        "report_to": (),
    }
    return replace(
        loaded,
        recipe=recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update=data),
                "method": method,
                "training": recipe.training.model_copy(update=training),
                "output_dir": str(output),
            }
        ),
    )


def _few_rows(datasets: Iterable[DatasetSection]) -> tuple[DatasetSection, ...]:
    # Without `repeat`, which few rows would use up.
    return tuple(
        dataset.model_copy(update={"max_samples": min(ROWS, dataset.max_samples or ROWS), "repeat": None})
        for dataset in datasets
    )


def fitting_method(recipe: Recipe, config: PreTrainedConfig, copy: PreTrainedModel) -> tuple[Any, list[str]]:
    """The recipe's method section for the small copy, and what had to be changed for it, in words.

    What a section says of layers that the copy lacks has been checked against the whole model before.

    Args:
        config: of the whole model.
        copy: the small one; left as it is.
    """
    section, update = recipe.method, dict[str, Any]()
    if getattr(section, "init_from", None) is not None:
        update["init_from"] = None
    if isinstance(section, LoraMethod):
        update |= _fitting_lora(section, config, copy)
    if isinstance(section, AdapterMethod) and section.reduction_factor is not None:
        width = text_config(copy.config).hidden_size
        update |= {"reduction_factor": float(width)} if section.reduction_factor > width else {}
    if isinstance(section, LlamaAdapterMethod):
        depth = text_config(copy.config).num_hidden_layers
        layers = min(depth, section.num_layers or max(1, depth - LAYERS_WITHOUT))
        update |= {"num_layers": layers} if layers != section.num_layers else {}
    notes = [
        f"method.{name}: {_shown(value)} in place of {_shown(getattr(section, name))}"
        for name, value in update.items()
        if value != getattr(section, name)
    ]
    return section.model_copy(update=update), notes


def _fitting_lora(section: LoraMethod, config: PreTrainedConfig, copy: PreTrainedModel) -> dict[str, Any]:
    update: dict[str, Any] = {}
    with_experts = bool(section.target_parameters)
    targets, exclude = section.targets, section.exclude
    try:
        layers = select_targets(copy, targets, exclude, with_experts=with_experts)
    except UserError:
        # Layers are named that the copy lacks: take those of the same name in the layers that it has.
        whole = build_random(plain_copy(config), device="meta")
        chosen = {_last(path) for path in select_targets(whole, targets, exclude, with_experts=with_experts)}
        update = {"targets": tuple(sorted(chosen & {_last(path) for path in linear_modules(copy)})), "exclude": ()}
        layers = select_targets(copy, update["targets"], (), with_experts=with_experts)
    adapted = [*layers, *section.target_parameters]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(section, key)
        fitting = {pattern: value for pattern, value in patterns.items() if _matches(pattern, adapted, key)}
        update |= {key: fitting} if fitting != patterns else {}
    if section.init == "pissa":
        most = min(min(linear_shape(layer)) for layer in layers.values())
        update |= {"rank": most} if section.rank > most else {}
        ranks = {pattern: min(rank, most) for pattern, rank in section.rank_pattern.items()}
        update |= {"rank_pattern": ranks} if ranks != section.rank_pattern else {}
    return update


def _matches(pattern: str, layers: list[str], key: str) -> bool:
    try:
        check_patterns([pattern], layers, key)
    except FtkitError:
        return False
    return True


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else "null" if value is None else str(value)


def check_output(pattern: str, *, name: str, method: str) -> Path:
    """Check that a run's directory could be made where `output_dir` says, and leave nothing there; returns where.

    Raises:
        UserError: a file is in the way.
        StorageError: nothing can be written there.
    """
    text = fill_output(pattern, name=name, method=method)
    places = (Path(text.replace("{n}", str(number))).absolute() for number in count(1))
    path = next(place for place in places if "{n}" not in text or not place.exists())
    try:
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if not there.is_dir():
            raise UserError(f"{there} is a file", key=OUTPUT_KEY, how="choose another output_dir")
        with tempfile.TemporaryDirectory(prefix=".ftkit-smoke-", dir=there):
            return there
    except OSError as error:
        what = f"cannot write to {path.parent}: {(error.strerror or str(error)).lower()}"
        raise StorageError(what, key=OUTPUT_KEY, how="choose another output_dir, or change its permissions") from None


def check_vocabulary(prepared: Prepared) -> None:
    """Check that the base has an embedding for every token of the data and for those that end turns.

    Raises:
        UserError: it has not.
    """
    examples = [int(example.example.input_ids.max()) for example in prepared.plan.examples]
    highest = max(examples + list(prepared.template.end_of_turn_ids))
    rows = max([text_config(prepared.config).vocab_size, *(token + 1 for token in prepared.new_token_ids)])
    if highest >= rows:
        token = prepared.tokenizer.convert_ids_to_tokens(highest)
        what = f"the tokenizer's token {token} has the id {highest}, and the base has embeddings for {rows} tokens"
        raise UserError(what, how="name the tokenizer that belongs to the base", key=("model", "tokenizer"))


def copy_size(copy: PreTrainedModel) -> dict[str, int]:
    """Layers, width and parameters of the small copy."""
    text = text_config(copy.config)
    return {"layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "parameters": copy.num_parameters()}
