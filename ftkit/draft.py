"""A first recipe for somebody's data: what `ftkit init DATA` looks at, and what it writes."""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml

from ftkit.console import Console, human_bytes, human_count
from ftkit.data.corpus import Corpus
from ftkit.data.formats import suggested
from ftkit.data.split import SAYS_THE_SAME
from ftkit.data.types import Conversation
from ftkit.errors import UserError
from ftkit.estimate import Estimator, Place
from ftkit.fit import Fit, find_fit, free_memory
from ftkit.recipe.load import LoadedRecipe, load_recipe
from ftkit.recipe.schema import METHOD_DEFAULTS
from ftkit.training.prepare import Prepared, prepare, prepare_model

LONGEST = 32_768
"""Tokens that rows are looked at with, at most."""
KEPT = 0.99
"""Share of the rows that are to be kept whole."""
SAMPLE = 1000
"""Rows whose turns are counted."""
STEP = 64
"""Lengths are rounded up to a multiple."""
MOST_VALIDATION, VALIDATION = 500, 0.05
ENOUGH_TO_VALIDATE, PLENTY = 100, 1000
METHOD_LINES = {
    "lora": ["  rank: 16", "  alpha: 32", "  targets: all-linear"],
    "adapter": ["  bottleneck: 64"],
    "soft_prompt": ["  num_virtual_tokens: 20"],
    "prefix": ["  num_virtual_tokens: 20"],
    "llama_adapter": ["  num_virtual_tokens: 10"],
}


@dataclass(frozen=True)
class DataFacts:
    """What the data is like."""

    kind: str
    """In words: texts, or conversations of so many answers."""
    rows: int
    """That can be trained on."""
    dropped: int
    """For another reason than the next."""
    repeated: int
    """Rows that say the same as another."""
    median: int
    """Tokens, as are the next two."""
    percentile: int
    """Length that KEPT of the rows do not exceed."""
    longest: int
    trained: float
    """Share of the tokens that are trained on."""


@dataclass(frozen=True)
class Draft:
    """A recipe, and why it is so."""

    text: str
    facts: DataFacts
    warnings: tuple[str, ...]


def draft(
    data: str,
    base_model: str,
    method: str,
    directory: Path,
    *,
    console: Console,
    offline: bool,
    trust_remote_code: bool,
) -> Draft:
    """Look at the data with the model's tokenizer, and at the model's configuration.

    Args:
        data: a file, directory or hub id, as the recipe is to name it; relative to `directory`.
        base_model: likewise.
        directory: where the recipe will lie.

    Raises:
        FtkitError: the model or the data cannot be had or read.
    """
    keys = {"offline": offline, "trust_remote_code": trust_remote_code}
    section, dataset = {"type": method}, {"path": data}
    first = _load(directory, {"base_model": base_model, "data": {"train": [dataset]}, "method": section})
    context = _context(prepare_model(first, **keys).config)

    def read(dataset: dict[str, Any]) -> Prepared:
        whole = {"train": [dataset], "max_length": context, "val_size": 0, "deduplicate": True}
        looked_at = {"base_model": base_model, "data": whole, "method": section, "training": {"num_train_epochs": 1}}
        return prepare(_load(directory, looked_at), console, **keys)

    warnings: list[str] = []
    try:
        prepared = read(dataset)
    except UserError as error:
        # Columns of other names: what the error proposes is what its reader would write.
        proposed = suggested(error.problems[0].how or "") if len(error.problems) == 1 else None
        if proposed is None:
            raise
        dataset |= proposed
        prepared = read(dataset)
        taken = ", ".join(f"{ours}: {theirs}" for ours, theirs in proposed.get("columns", {}).items())
        warnings.append(f"columns are taken by their names ({taken}): check them in the recipe")
        if "chosen" in proposed.get("columns", {}).values():
            warnings.append("preferred answers are trained on, and rejected ones ignored: ftkit does supervised tuning")
    facts = look_at(prepared)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = free_memory(device)
    model: dict[str, Any] = {}

    def fitting() -> Fit:
        """With documents of the length that the recipe will have."""
        data = {"train": [dataset], "max_length": _max_length(facts, context)}
        values = {"base_model": base_model, "model": model, "data": data, "method": section}
        drafted = prepare_model(_load(directory, values), **keys)
        return find_fit(Estimator(drafted, Place.here(drafted)), memory)

    fit = fitting()
    if not fit.fits and method != "full" and find_spec("bitsandbytes"):
        model = {"quantization": "nf4"}
        fit = fitting()
    if not fit.fits:
        warnings.append(
            f"a step takes {human_bytes(fit.needed)}, and {human_bytes(memory)} of memory may be filled: choose a "
            "smaller --model" + (", or --method lora" if method == "full" else "")
        )
    text = _write(dataset, base_model, method, model, facts, context, fit, device)
    if prepared.template.warning:
        warnings.append(prepared.template.warning)
    return Draft(text, facts, tuple(warnings))


def look_at(prepared: Prepared) -> DataFacts:
    """What the rows of the one data set are like."""
    (counts,), plan = prepared.plan.counts, prepared.plan
    lengths = np.asarray(plan.examples.num_tokens)
    repeated = sum(len(rows) for why, rows in counts.dropped.items() if why.startswith(SAYS_THE_SAME))
    return DataFacts(
        kind=_kind(plan.corpora[0]),
        rows=counts.rows_used,
        dropped=sum(map(len, counts.dropped.values())) - repeated,
        repeated=repeated,
        median=int(np.median(lengths)),
        percentile=int(np.quantile(lengths, KEPT, method="higher")),
        longest=int(lengths.max()),
        trained=float(np.asarray(plan.examples.num_targets).sum() / max(1, lengths.sum())),
    )


def _kind(corpus: Corpus) -> str:
    documents = [corpus.store.content(int(position)) for position in corpus.chosen[:SAMPLE]]
    conversations = [document for document in documents if isinstance(document, Conversation)]
    if not conversations:
        return "texts"
    answers = [sum(message.role == "assistant" for message in one.messages) for one in conversations]
    average = sum(answers) / len(answers)
    systems = sum(one.messages[0].role == "system" for one in conversations) / len(conversations)
    tools = sum(bool(one.tools) for one in conversations)
    words = "one answer each" if average == 1 else f"{average:.1f} answers each, {max(answers)} at most"
    return (
        f"conversations, {words}"
        + (f", {100 * systems:.0f}% with a system prompt" if systems else "")
        + (f", {100 * tools / len(conversations):.0f}% with tools" if tools else "")
    )


def _load(directory: Path, values: dict[str, Any]) -> LoadedRecipe:
    """A recipe that lies in `directory`, for a moment."""
    with TemporaryDirectory(prefix=".ftkit-init-", dir=directory) as place:
        path = Path(place) / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        loaded = load_recipe(path)
    return LoadedRecipe(loaded.recipe, directory / "recipe.yaml", {})


def _context(config: Any) -> int:
    known = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(int(known or LONGEST), LONGEST)


def _max_length(facts: DataFacts, context: int) -> int:
    return min(context, max(2 * STEP, STEP * math.ceil(facts.percentile / STEP)))


def _write(
    dataset: dict[str, Any],
    base_model: str,
    method: str,
    model: dict[str, Any],
    facts: DataFacts,
    context: int,
    fit: Fit,
    device: torch.device,
) -> str:
    max_length, size = _max_length(facts, context), fit.estimate
    validation, batch, epochs = _shares(facts.rows, method)
    steps = epochs * math.ceil((facts.rows - validation) / batch)
    kept = f"keeps {100 * KEPT:g}% of the rows whole" if max_length < context else "all that the model reads"
    held_back = "rows held back, never trained on" if validation else "too few rows to hold some back"
    where = "this GPU" if device.type == "cuda" else "this machine"
    lines = [
        f"# Made by `ftkit init` from {facts.rows:,} rows: {facts.kind}.",
        f"# {facts.median:,} tokens in the middle, {facts.percentile:,} at most in {100 * KEPT:g}% of them, "
        f"{facts.longest:,} in the longest; {100 * facts.trained:.0f}% are trained on.",
        f"# Trains {human_count(size.trainable_parameters)} of {human_count(size.parameters)} parameters. A step takes "
        f"about {human_bytes(fit.needed)}: {size.micro_batch};",
        f"# {human_bytes(fit.available)} of {where} may be filled.",
        "",
        f"base_model: {_scalar(base_model)}",
        "",
        *(
            ["model:", _line("quantization", model["quantization"], "frozen layers in 4 bits, so that it fits"), ""]
            if model
            else []
        ),
        "data:",
        _line("max_length", max_length, f"{kept}; longer conversations lose their oldest turns"),
        _line("val_size", validation, held_back),
        *([_line("deduplicate", "true", f"{facts.repeated:,} rows say the same as another")] if facts.repeated else []),
        "  train:",
        f"    - path: {_scalar(dataset['path'])}",
        *_columns(dataset),
        "",
        "method:",
        f"  type: {method}",
        *METHOD_LINES.get(method, []),
        "",
        "training:",
        _line("num_train_epochs", epochs, f"{steps:,} steps"),
        _line("global_batch_size", batch, "examples an optimizer step, whatever the number of devices"),
        _line("learning_rate", f"{METHOD_DEFAULTS[method]['learning_rate']:g}", "a usual one for this method"),
        _line("gradient_checkpointing", "auto", "recomputes activations where memory is short"),
    ]
    return "\n".join(lines) + "\n"


def _columns(dataset: dict[str, Any]) -> list[str]:
    """Lines of a data set whose columns have other names than the format's."""
    if "columns" not in dataset:
        return []
    pairs = ", ".join(f"{ours}: {_scalar(theirs)}" for ours, theirs in dataset["columns"].items())
    return [f"      format: {dataset['format']}", f"      columns: {{{pairs}}}   # by their names: check them"]


def _shares(rows: int, method: str) -> tuple[int, int, int]:
    """Rows to hold back, examples an optimizer step, and epochs: small data wants small batches."""
    defaults = METHOD_DEFAULTS[method]
    epochs = int(defaults["num_train_epochs"])
    if rows < ENOUGH_TO_VALIDATE:
        return 0, 4, epochs
    validation = min(MOST_VALIDATION, max(20, round(VALIDATION * rows)))
    return validation, int(defaults["global_batch_size"]) if rows >= PLENTY else 8, epochs


def _line(key: str, value: object, comment: str) -> str:
    return f"{f'  {key}: {value}':<32} # {comment}"


def _scalar(text: str) -> str:
    """As YAML, quoted where it must be."""
    return yaml.safe_dump(text, default_style=None, width=1000).splitlines()[0]
