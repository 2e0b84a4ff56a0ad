"""`ftkit preview`: what the model will see, token by token, and what was left out and why."""

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.console import Console, human_count, sparkline
from ftkit.errors import FtkitError, UserError
from ftkit.recipe.load import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    from ftkit.data.types import EncodedExample
    from ftkit.training.prepare import Prepared

EXAMPLES_SHOWN = 2
"""Of each data set, where the command line says no number."""
TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE = "⟦", "⟧"
"""Around trained tokens where there are no colours."""
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
    names = prepared.plan.dataset_names
    if dataset is not None and dataset not in names:
        how = f"choose one of {', '.join(names)}; no other is trained on"
        raise UserError(f"the run trains on no data set {dataset}", how=how)
    shown = [name for name in names if dataset in (None, name)]

    # 2. What was left out, or what each data set looks like.
    if dropped:
        _print_dropped(prepared, shown, console, json=json)
        return
    if json:
        for example in _examples(prepared, shown, row, limit):
            sys.stdout.write(json_module.dumps(_as_json(example, prepared), ensure_ascii=False) + "\n")
        return
    prepared.print(console)
    console.line()
    _print_lengths(prepared, shown, console)

    # 3. Examples, trained tokens in colour.
    for example in _examples(prepared, shown, row, EXAMPLES_SHOWN if limit is None else limit):
        _print_example(example, prepared, console)


def _examples(prepared: "Prepared", names: list[str], row: int | None, limit: int | None) -> Iterator["EncodedExample"]:
    """Examples in the order in which training draws them, each form of a row once.

    Raises:
        UserError: none of them is of row `row`.
    """
    import numpy as np

    plan = prepared.plan
    _, first = np.unique(plan.steps.order, return_index=True)
    left = {plan.dataset_names.index(name): limit for name in names}
    found = False
    for index in plan.steps.order[np.sort(first)].tolist():
        number = int(plan.examples.dataset[index])
        if number not in left or left[number] == 0:
            continue
        example = plan.examples[index]
        if row is not None and example.row != row:
            continue
        found = True
        yield example
        wanted = left[number]
        left[number] = None if wanted is None else wanted - 1
    if row is not None and not found:
        what = f"the run draws no example from row {row}"
        raise UserError(what, how="choose another --row, see --dropped, or raise training.max_steps")


def _as_json(encoded: "EncodedExample", prepared: "Prepared") -> dict[str, object]:
    example = encoded.example
    return {
        "dataset": prepared.plan.dataset_names[encoded.dataset],
        "row": encoded.row,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
        "text": prepared.tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False),
    }


def _print_example(encoded: "EncodedExample", prepared: "Prepared", console: Console) -> None:
    example = encoded.example
    name = prepared.plan.dataset_names[encoded.dataset]
    cut = ", cut" if example.truncated else ""
    console.heading(f"{name} row {encoded.row}: {example.num_tokens} tokens, {example.num_targets} trained on{cut}")
    parts = []
    for trained, ids in _runs(encoded):
        text = str(prepared.tokenizer.decode(ids, skip_special_tokens=False))
        if not console.has_colors and trained:
            text = f"{OPEN}{text}{CLOSE}"
        parts.append((text, TRAINED if trained else CONTEXT))
    console.styled(parts)
    console.line()


def _runs(encoded: "EncodedExample") -> Iterator[tuple[bool, list[int]]]:
    """Stretches of trained and of other tokens, in order."""
    from itertools import groupby

    from ftkit.data.types import IGNORE

    pairs = zip(encoded.example.input_ids.tolist(), encoded.example.labels.tolist(), strict=True)
    for trained, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        yield trained, [token for token, _ in stretch]


def _print_lengths(prepared: "Prepared", names: list[str], console: Console) -> None:
    """A histogram of the examples' lengths for each data set, and how much of them is trained on."""
    import numpy as np

    plan = prepared.plan
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
    """Every row that was left out, with the reason."""
    count = 0
    for counts in prepared.plan.counts:
        for reason, rows in counts.dropped.items() if counts.name in names else ():
            for row in rows:
                count += 1
                if json:
                    values = {"dataset": counts.name, "row": row, "reason": reason}
                    sys.stdout.write(json_module.dumps(values, ensure_ascii=False) + "\n")
                else:
                    console.line(f"{counts.name} row {row}: {reason}")
    console.line(f"{human_count(count)} rows left out" if count else "no row was left out")
