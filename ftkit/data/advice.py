"""What is allowed but seldom meant: warnings of a plan, each with what to change."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ftkit.data.chat import ChatTemplate
from ftkit.data.corpus import Corpus
from ftkit.data.problems import count_rows, list_rows
from ftkit.data.types import DatasetCounts
from ftkit.recipe.schema import TrainingSection

FEW_STEPS, GOOD_STEPS = 50, 100
"""Optimizer steps below which a run hardly learns, and what the warning aims at."""

MAX_SHARE_CUT = 0.01
"""Share of rows that may be too long without a warning."""

MIN_SHARE_THINKING = 0.05
"""Share of rows with thoughts below which a thinking model unlearns them; mixtures of both kinds are above it."""

MANY_EPOCHS = 10
"""Passes over a data set that is drawn far more often than others."""


def warn_cut(names: Sequence[str], dataset: np.ndarray, uncut: np.ndarray, max_length: int) -> list[str]:
    """More than 1% of the rows of a data set are longer than `max_length`: a mixture's share would hide it.

    Args:
        names: of the data sets.
        dataset: int [rows], index into `names`.
        uncut: int32 [rows], their lengths before any cut.
        max_length: `data.max_length`.
    """
    warnings = []
    for index, name in enumerate(names):
        lengths = np.sort(uncut[(dataset == index) & (uncut > 0)])
        too_long = int((lengths > max_length).sum())
        if too_long > MAX_SHARE_CUT * len(lengths):
            enough = int(lengths[math.ceil((1 - MAX_SHARE_CUT) * len(lengths)) - 1])
            share = f"{too_long:,} of {len(lengths):,} rows of {name} ({too_long / len(lengths):.0%})"
            warnings.append(f"{share} are longer than data.max_length {max_length}; {enough} keeps 99% whole")
    return warnings


def warn_thinking(template: ChatTemplate, with_thoughts: int, rows: int) -> list[str]:
    """A model that thinks is about to learn not to.

    Args:
        template: of the run.
        with_thoughts: rows that are trained on with thoughts (`EncodeResult.has_thoughts`).
        rows: all of them.
    """
    if not template.expects_thoughts or with_thoughts >= MIN_SHARE_THINKING * rows:
        return []
    how = "train on rows with thoughts (reasoning_content, or <think>...</think> before the answer)"
    if template.knows_enable_thinking:
        how = f"set data.chat_template_kwargs: {{enable_thinking: false}}, or {how}"
    few = f"{with_thoughts:,} of {rows:,} rows have thoughts" if with_thoughts else "no trained turn has thoughts"
    return [f"the chat template is a thinking model's, and {few}: it would unlearn them; {how}"]


def warn_few_steps(steps: Sequence[Sequence[int]], training: TrainingSection) -> list[str]:
    """Few optimizer steps, though `max_steps` did not ask for them."""
    if len(steps) >= FEW_STEPS or training.max_steps is not None:
        return []
    num_examples = sum(len(step) for step in steps)
    if num_examples >= GOOD_STEPS:
        how = f"training.global_batch_size: {num_examples // GOOD_STEPS}"
    else:
        how = f"training.num_train_epochs: {math.ceil(GOOD_STEPS * training.num_train_epochs / len(steps))}"
    return [f"{len(steps)} optimizer steps are few; {how} gives at least {GOOD_STEPS}"]


def warn_repeats(counts: Sequence[DatasetCounts]) -> list[str]:
    """A data set that is seen far more often than the others."""
    if len(counts) < 2:
        return []
    usual = sorted(count.epochs for count in counts)[len(counts) // 2]
    return [
        f"{count.name} is seen {count.epochs:.0f} times; `repeat` sets a limit, a smaller `weight` lowers its rate"
        for count in counts
        if count.epochs >= MANY_EPOCHS and count.epochs > 3 * usual
    ]


def warn_no_reasoning(corpora: Sequence[Corpus]) -> list[str]:
    """Data sets whose `rationale` asks for reasoning that none of their rows has."""
    asked = [corpus for corpus in corpora if corpus.section.rationale not in ("never", 0.0)]
    return [
        f"{corpus.why_no_reasoning}: `rationale: {corpus.section.rationale}` changes nothing"
        for corpus in asked
        if corpus.why_no_reasoning
    ]


def warn_overlooked(corpora: Sequence[Corpus]) -> list[str]:
    """Columns that are not read, though they seem to be an optional one under another name."""
    return [
        f"column {column} of {corpus.name} is not read; if it is {meant}, say so: `columns: {{{meant}: {column}}}`"
        for corpus in corpora
        for column, meant in corpus.overlooked.items()
    ]


def warn_left_out(names: Sequence[str]) -> list[str]:
    """Data sets of which data.clusters or data.exclude_clusters leave nothing: meant for held-out tasks, but told."""
    return [f"not trained on, since all rows are of a cluster that is left out: {', '.join(names)}"] if names else []


def warn_no_such_cluster(names: Sequence[str]) -> list[str]:
    """Clusters that the recipe names and none of its rows is of: a held-out task may go by another name here."""
    return [f"no row of data.train is of the cluster {', '.join(names)}, which the recipe names"] if names else []


def warn_overlapping(name: str, overlapping: Mapping[str, Sequence[int]]) -> list[str]:
    """Rows of a data set that are trained on though they say the same as an earlier or as a validation row.

    Args:
        name: of the data set.
        overlapping: `DatasetCounts.overlapping`.
    """
    return [
        f"{count_rows(len(rows))} of {name} say{'s' if len(rows) == 1 else ''} the same as {other} "
        f"({list_rows(rows)}); data.deduplicate: true drops them, `ftkit preview --dropped` lists them"
        for other, rows in overlapping.items()
    ]
