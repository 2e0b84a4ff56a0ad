"""Which rows are trained on and which are measured, and rows that say the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.data.advice import warn_duplicates
from ftkit.data.corpus import Corpus
from ftkit.data.duplicates import groups_of, repeated
from ftkit.data.mixture import split_validation
from ftkit.errors import UserError
from ftkit.recipe.schema import Recipe

SAME_AS_EARLIER = "says the same as an earlier row (data.deduplicate)"
SAME_AS_VALIDATION = "says the same as a validation row (data.deduplicate)"


@dataclass
class Split:
    """Which rows are trained on and which are measured."""

    trained: list[np.ndarray]
    """For each training data set int64, places among its chosen rows."""
    held_out: list[np.ndarray]
    """The same of its validation rows."""
    dropped: list[dict[str, list[int]]]
    """For each training data set: reason -> row ids."""
    duplicates: list[int]
    """For each training data set: rows that say the same as an earlier one, dropped or not."""
    warnings: list[str]


def split_rows(recipe: Recipe, train: Sequence[Corpus], evaluation: Sequence[Corpus]) -> Split:
    """Hold validation rows back, or take those of data.eval, and find rows that say the same.

    Raises:
        UserError: a data set keeps no row to train on.
    """
    data = recipe.data
    groups = groups_of([corpus.keys for corpus in (*train, *evaluation)])
    trained_groups, measured_groups = groups[: len(train)], groups[len(train) :]
    names = [corpus.name for corpus in train]
    held_out = [np.empty(0, np.int64) for _ in train]
    if not evaluation:
        held_out = split_validation(trained_groups, names, val_size=data.val_size, seed=recipe.seed)
    measured = np.concatenate([*measured_groups, np.empty(0, np.int64)])
    split = Split([], held_out, [], [], [])
    for corpus, rows, out, again in zip(train, trained_groups, held_out, repeated(trained_groups), strict=True):
        keep = np.ones(len(rows), bool)
        keep[out] = False
        also_measured = keep & np.isin(rows, measured)
        split.duplicates.append(int((again & keep).sum()))
        dropped: dict[str, list[int]] = {}
        if data.deduplicate:
            for reason, unwanted in ((SAME_AS_VALIDATION, also_measured), (SAME_AS_EARLIER, again & ~also_measured)):
                if (gone := np.flatnonzero(unwanted & keep)).size:
                    dropped[reason] = corpus.row_ids(gone).tolist()
                    keep[gone] = False
        split.trained.append(np.flatnonzero(keep))
        split.dropped.append(dropped)
        split.warnings += warn_duplicates(corpus, again & keep, also_measured & keep)
    if not evaluation and not any(len(out) for out in held_out) and data.val_size:
        split.warnings.append("too few different rows to split any off; there is no validation")
    for index, places in enumerate(split.trained):
        if len(places) == 0:
            what = f"{names[index]} has no row left to train on"
            how = "all of its rows are validation rows or duplicates; remove it"
            raise UserError(what, how=how, key=(*train[index].key, "path"))
    return split
