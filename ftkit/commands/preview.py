"""`ftkit preview`: what the model will see, token by token, and what was left out and why."""

import json as json_module
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.console import Console, human_count, sparkline
from ftkit.errors import FtkitError, UserError
from ftkit.recipe.load import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftkit.data.corpus import Corpus
    from ftkit.data.plan import Plan
    from ftkit.data.types import EncodedExample, Example
    from ftkit.training.prepare import Prepared

EXAMPLES_SHOWN = 2
"""Of each data set, where the command line says no number."""
TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE = "⟦", "⟧"
"""Around trained tokens where there are no colours."""
TRAIN, VALIDATION = "train", "validation"
"""The parts of a run's data."""
BUCKETS = 24


def preview(
    recipe: Path,
    overrides: list[str],
    *,
    dataset: str | None = None,
    row: int | None = None,
    dropped: bool = False,
    json: bool = False,
    limit: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Plan RECIPE and print examples as the model gets them.

    Args:
        dataset: only this one, by its label.
        row: only this row, by its number from 0.
        dropped: print the rows that were left out instead, with the reasons.
        json: one object a line: dataset, row, input_ids, labels (-100 where not trained on), text.
        limit: examples of each data set; default 2, with `json` all of them.
    """
    loaded = load_recipe(recipe, overrides)
    try:
        _preview(loaded, dataset, row, dropped, json, limit, offline=offline, trust_remote_code=trust_remote_code)
    except FtkitError as error:
        raise error.located(loaded.marks) from error


def _preview(
    loaded: LoadedRecipe,
    dataset: str | None,
    row: int | None,
    dropped: bool,
    json: bool,
    limit: int | None,
    *,
    offline: bool,
    trust_remote_code: bool,
) -> None:
    from ftkit.training.prepare import prepare

    # 1. The whole plan: the same rows, draws and examples that training takes.
    console = Console(quiet=json)
    prepared = prepare(loaded, console, offline=offline, trust_remote_code=trust_remote_code, begins=False)
    plan = prepared.plan
    names = list(dict.fromkeys((*plan.dataset_names, *plan.validation)))
    if dataset is not None and dataset not in names:
        raise UserError(f"the run has no data set {dataset}", how=f"choose one of {', '.join(names)}")
    shown = [name for name in names if dataset in (None, name)]
    # Validation rows are of interest where somebody asks for them.
    parts = [TRAIN, VALIDATION] if dataset is not None or row is not None else [TRAIN]
    examples = _examples(plan, parts, shown, row, limit if limit is not None or json else EXAMPLES_SHOWN)

    # 2. What was left out, or what each data set looks like.
    if dropped:
        _print_dropped(prepared, shown, console, json=json)
        return
    if json:
        for example in examples:
            sys.stdout.write(json_module.dumps(example.as_json(prepared.tokenizer), ensure_ascii=False) + "\n")
        return
    prepared.print(console)
    console.line()
    _print_lengths(prepared, shown, console)

    # 3. Examples, trained tokens in colour.
    for example in examples:
        _print_example(example, prepared, console)


@dataclass(frozen=True, slots=True)
class _Shown:
    """An example, and where it comes from."""

    dataset: str
    part: str
    row: int
    where: str
    example: "Example"

    def as_json(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, object]:
        return {
            "dataset": self.dataset,
            "part": self.part,
            "row": self.row,
            "where": self.where,
            "input_ids": self.example.input_ids.tolist(),
            "labels": self.example.labels.tolist(),
            "text": tokenizer.decode(self.example.input_ids.tolist(), skip_special_tokens=False),
        }


def _examples(
    plan: "Plan", parts: Sequence[str], names: Sequence[str], row: int | None, limit: int | None
) -> Iterator[_Shown]:
    """Examples of the data sets `names`, `limit` of each: those trained on in the order of training, each form of a
    row once, and those measured in the order of their rows.

    Raises:
        UserError: none of them is of row `row`.
    """
    left: Counter[tuple[str, str]] = Counter()
    found = False
    for part in parts:
        for name, corpus, encoded in _trained(plan) if part == TRAIN else _measured(plan):
            if name not in names or left[part, name] == limit or (row is not None and encoded.row != row):
                continue
            found = True
            left[part, name] += 1
            yield _Shown(name, part, encoded.row, corpus.where(encoded.row), encoded.example)
    if row is not None and not found:
        raise UserError(f"the run has no example of row {row}", how=_why_missing(plan, names, row))


def _trained(plan: "Plan") -> Iterator[tuple[str, "Corpus", "EncodedExample"]]:
    import numpy as np

    _, first = np.unique(plan.steps.order, return_index=True)
    for index in plan.steps.order[np.sort(first)].tolist():
        number = int(plan.examples.dataset[index])
        yield plan.dataset_names[number], plan.corpora[number], plan.examples[index]


def _measured(plan: "Plan") -> Iterator[tuple[str, "Corpus", "EncodedExample"]]:
    for name, examples in plan.validation.items():
        for encoded in examples:
            yield name, plan.validation_documents[name].corpus, encoded


def _why_missing(plan: "Plan", names: Sequence[str], row: int) -> str:
    for counts in (*plan.counts, *plan.validation_counts):
        for reason, rows in counts.dropped.items() if counts.name in names else ():
            if row in rows:
                return f"it was left out: {reason}"
    return "choose another --row, or raise training.max_steps: rows are counted from 0, and not every row is drawn"


def _print_example(shown: _Shown, prepared: "Prepared", console: Console) -> None:
    example = shown.example
    part = ", validation" if shown.part == VALIDATION else ""
    cut = ", cut" if example.truncated else ""
    size = f"{human_count(example.num_tokens)} tokens, {human_count(example.num_targets)} trained on"
    console.heading(f"{shown.dataset} row {shown.row} ({shown.where}{part}): {size}{cut}")
    texts = []
    for trained, ids in _runs(example):
        text = str(prepared.tokenizer.decode(ids, skip_special_tokens=False))
        if not console.has_colors and trained:
            text = f"{OPEN}{text}{CLOSE}"
        texts.append((text, TRAINED if trained else CONTEXT))
    console.styled(texts)
    console.line()


def _runs(example: "Example") -> Iterator[tuple[bool, list[int]]]:
    """Stretches of trained and of other tokens, in order."""
    from itertools import groupby

    from ftkit.data.types import IGNORE

    pairs = zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    for trained, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        yield trained, [token for token, _ in stretch]


def _print_lengths(prepared: "Prepared", names: list[str], console: Console) -> None:
    """A histogram of the examples' lengths for each data set, and how much of them is trained on."""
    import numpy as np

    plan = prepared.plan
    names = [name for name in names if name in plan.dataset_names]
    if not names:
        return
    longest = max(1, int(plan.examples.num_tokens.max()))
    width = max(map(len, names))
    console.heading(f"lengths, from 1 to {human_count(longest)} tokens")
    for name in names:
        lengths = plan.examples.num_tokens[plan.examples.dataset == plan.dataset_names.index(name)]
        targets = plan.examples.num_targets[plan.examples.dataset == plan.dataset_names.index(name)]
        if not len(lengths):
            continue
        heights, _ = np.histogram(lengths, bins=BUCKETS, range=(0, longest))
        bars = sparkline(heights.tolist())
        share = 100 * int(targets.sum()) / int(lengths.sum())
        middle, nearly_all = int(np.median(lengths)), int(np.quantile(lengths, 0.99)) + 1
        console.line(f"{name:{width}}  {bars}  median {middle}, 99% below {nearly_all}, {share:.0f}% trained on")
    console.line()


def _print_dropped(prepared: "Prepared", names: list[str], console: Console, *, json: bool) -> None:
    """Every row that was left out, with the reason, and every row that says the same as another."""
    from ftkit.data.problems import count_rows

    plan = prepared.plan
    validation = {name: measured.corpus for name, measured in plan.validation_documents.items()}
    parts = [(TRAIN, plan.counts, dict(zip(plan.dataset_names, plan.corpora, strict=True)))]
    parts += [(VALIDATION, [counts for counts in plan.validation_counts if counts.name in validation], validation)]
    count = 0
    for part, all_counts, corpora in parts:
        for counts in all_counts:
            if counts.name not in names:
                continue
            left_out = [(row, reason, True) for reason, rows in counts.dropped.items() for row in rows]
            kept = [
                (row, f"says the same as {other}", False) for other, rows in counts.overlapping.items() for row in rows
            ]
            count += len(left_out)
            for row, reason, is_dropped in (*left_out, *kept):
                where = corpora[counts.name].where(row)
                if json:
                    values = {"dataset": counts.name, "part": part, "row": row, "where": where, "reason": reason}
                    values["dropped"] = is_dropped
                    sys.stdout.write(json_module.dumps(values, ensure_ascii=False) + "\n")
                else:
                    kept_all_the_same = "" if is_dropped else "; trained on all the same"
                    console.line(f"{counts.name} row {row} ({where}): {reason}{kept_all_the_same}")
    console.line(f"{count_rows(count)} left out" if count else "no row was left out")
