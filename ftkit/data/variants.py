"""How each drawn row is asked: its phrasing, with or without the reasoning, and the solved examples before it."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ftkit.data.mixture import random_generator
from ftkit.data.phrasings import PhrasingSet, phrase
from ftkit.data.store import RowStore
from ftkit.data.types import Conversation, Document, TaskRecord
from ftkit.recipe.schema import DatasetSection


def job_type(shots: int) -> np.dtype:
    """A job is a row in one form: data set, position in its store, phrasing, positions of examples before it; -1: none.

    Big-endian, so that jobs sorted as bytes are sorted by data set, then position.

    Args:
        shots: so many examples at most; with none a job takes 14 bytes.
    """
    return np.dtype([("dataset", ">i4"), ("position", ">i8"), ("phrasing", ">i2"), ("shots", ">i8", (shots,))])


def most_shots(sections: Iterable[DatasetSection]) -> int:
    """Examples that a row of these data sets is shown at most."""
    return max((section.shots for section in sections if section.few_shot > 0), default=0)


def plain_jobs(dataset: int, positions: np.ndarray, shots: int = 0) -> np.ndarray:
    """Jobs of rows that are always put alike; `shots` is the width of their type."""
    jobs = np.empty(len(positions), job_type(shots))
    jobs["dataset"], jobs["position"], jobs["phrasing"], jobs["shots"] = dataset, positions, -1, -1
    return jobs


def choose_variants(
    dataset: int,
    positions: np.ndarray,
    phrasings: PhrasingSet,
    section: DatasetSection,
    has_rationale: np.ndarray,
    others: np.ndarray,
    *,
    shots: int,
    name: str,
    epoch: int,
    seed: int,
) -> np.ndarray:
    """One form for each draw of an epoch; a pure function of seed, data set and epoch.

    Args:
        dataset: its index.
        positions: int64 [N], the drawn rows' positions in the store.
        phrasings: of the data set.
        section: of the recipe.
        has_rationale: bool [N], whether the row has a rationale.
        others: int64, positions of the rows that may be shown as examples.
        shots: width of the jobs' type.
        name: the data set's label.
        epoch: number of the epoch.
        seed: the recipe's.
    """
    rng = random_generator(seed, "phrasing", name, epoch)
    jobs = plain_jobs(dataset, positions, shots)
    share = {"never": 0.0, "always": 1.0}.get(section.rationale, section.rationale)  # type: ignore[arg-type]
    reasons = has_rationale & (rng.random(len(jobs)) < share) if phrasings.reasoned else np.zeros(len(jobs), bool)
    jobs["phrasing"] = rng.choice(phrasings.plain, len(jobs))
    if reasons.any():
        jobs["phrasing"][reasons] = rng.choice(phrasings.reasoned, int(reasons.sum()))
    shown = np.flatnonzero(rng.random(len(jobs)) < section.few_shot)
    for index in shown:
        pool = others[others != positions[index]] if len(others) <= 64 else others
        drawn = rng.choice(pool, min(section.shots + 1, len(pool)), replace=False)
        drawn = drawn[drawn != positions[index]][: section.shots]
        jobs["shots"][index, : len(drawn)] = drawn
    return jobs


def measured_jobs(dataset: int, positions: np.ndarray, phrasings: PhrasingSet, *, name: str, seed: int) -> np.ndarray:
    """Validation rows: each asked in one of the phrasings that ask for the answer, the same in every evaluation."""
    jobs = plain_jobs(dataset, positions)
    jobs["phrasing"] = random_generator(seed, "phrasing", name, "validation").choice(phrasings.direct, len(jobs))
    return jobs


def document_of(job: np.ndarray, store: RowStore, phrasings: PhrasingSet | None, section: DatasetSection) -> Document:
    """The row of a job in the job's form, with the data set's keywords for the chat template.

    Raises:
        RowError: the phrasing names a column that the row lacks.
    """
    content = store.content(int(job["position"]))
    if isinstance(content, TaskRecord):
        assert phrasings is not None, "a record is put into words"
        shots = [store.content(int(position)) for position in job["shots"] if position >= 0]
        content = phrase(content, phrasings, int(job["phrasing"]), [s for s in shots if isinstance(s, TaskRecord)])
    if isinstance(content, Conversation) and section.chat_template_kwargs:
        kwargs = section.chat_template_kwargs | content.chat_template_kwargs
        content = replace(content, chat_template_kwargs=kwargs)
    return content
