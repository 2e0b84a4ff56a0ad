"""Which rows are trained on and which are measured, and rows that say the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.data.advice import warn_overlapping
from ftkit.data.corpus import Corpus
from ftkit.data.duplicates import groups_of, repeated
from ftkit.data.mixture import split_validation
from ftkit.errors import UserError
from ftkit.recipe.schema import Recipe

SAYS_THE_SAME = "says the same as"
"""What the reason begins with for which a repeated row is dropped."""
SAME_AS_EARLIER, SAME_AS_VALIDATION = "an earlier row", "a row of data.eval"


@dataclass
class Split:
    """Which rows are trained on and which are measured."""

    trained: list[np.ndarray]
    """For each training data set int64, places among its chosen rows."""
    held_out: list[np.ndarray]
    """The same of its validation rows."""
    dropped: list[dict[str, list[int]]]
    """For each training data set: reason -> row ids."""
    overlapping: list[dict[str, list[int]]]
    """The same of rows that are trained on though they say the same as another."""
    warnings: list[str]


def split_rows(recipe: Recipe, train: Sequence[Corpus], evaluation: Sequence[Corpus]) -> Split:
    """Hold validation rows back, or take those of data.eval, and find rows that say the same.

    Raises:
        UserError: a data set keeps no row to train on.
    """
    data = recipe.data
    corpora = [*train, *evaluation]
    keys = [corpus.keys for corpus in corpora]
    # A record must not be trained on in one form and measured in another; in two forms it is two rows to train on.
    groups = groups_of(keys, [corpus.record_keys for corpus in corpora])
    again_in_form = repeated(groups_of(keys[: len(train)]))
    trained_groups, measured_groups = groups[: len(train)], groups[len(train) :]
    names = [corpus.name for corpus in train]
    held_out = [np.empty(0, np.int64) for _ in train]
    if not evaluation:
        held_out = split_validation(trained_groups, names, val_size=data.val_size, seed=recipe.seed)
    measured = np.concatenate([*measured_groups, np.empty(0, np.int64)])
    split = Split([], held_out, [], [], [])
    for corpus, rows, out, again in zip(train, trained_groups, held_out, again_in_form, strict=True):
        keep = np.ones(len(rows), bool)
        keep[out] = False
        also_measured = keep & np.isin(rows, measured)
        same_as = {SAME_AS_VALIDATION: also_measured, SAME_AS_EARLIER: again & keep & ~also_measured}
        found = {other: corpus.row_ids(np.flatnonzero(rows)).tolist() for other, rows in same_as.items() if rows.any()}
        if data.deduplicate:
            keep &= ~(also_measured | again)
            split.dropped.append({f"{SAYS_THE_SAME} {other} (data.deduplicate)": ids for other, ids in found.items()})
            split.overlapping.append({})
        else:
            split.dropped.append({})
            split.overlapping.append(found)
            split.warnings += warn_overlapping(corpus.name, found)
        split.trained.append(np.flatnonzero(keep))
    if not evaluation and not any(len(out) for out in held_out) and data.val_size:
        split.warnings.append("too few different rows to split any off; there is no validation")
    for index, places in enumerate(split.trained):
        if len(places) == 0:
            what = f"{names[index]} has no row left to train on"
            how = "all of its rows are validation rows or duplicates; remove it"
            raise UserError(what, how=how, key=(*train[index].key, "path"))
    return split
