"""Encodes a run's rows into a file of examples: in parallel, and only what has not been encoded before."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ftkit.data.cache import code_version, digest_of, prepared
from ftkit.data.corpus import Corpus, Progress
from ftkit.data.encode import Encoder, EncodeResult
from ftkit.data.encode_many import Found, encode_many
from ftkit.data.problems import MAX_SHOWN, Problems, RowError
from ftkit.data.processes import MIN_PARALLEL, work
from ftkit.data.store import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    ExampleColumns,
    ExampleStore,
    read_facts,
    write_facts,
    write_table,
)
from ftkit.data.truncation import TooLongError
from ftkit.data.types import IGNORE, Example
from ftkit.data.variants import document_of
from ftkit.errors import Problem, UserError

CHUNK = 512
"""Jobs that a process encodes at once."""
JOBS = "jobs.npz"
OTHER = "something else is wrong (data.on_bad_row: skip)"


@dataclass
class Encoded:
    """What became of jobs."""

    examples: ExampleStore
    first: np.ndarray
    """int64 [jobs + 1]: job j has the examples first[j] to first[j + 1]."""
    reason: np.ndarray
    """int16 [jobs], index into `reasons`, -1 where every part of it became an example."""
    reasons: list[str]
    uncut: np.ndarray
    """int32 [jobs], tokens of the longest example before anything was cut."""
    with_thoughts: int
    """Whether any trained conversation holds thoughts."""


def encode_jobs(
    jobs: np.ndarray, corpora: Sequence[Corpus], encoder: Encoder, *, skip_bad: bool, progress: Progress
) -> Encoded:
    """Encode every job once, or find them encoded.

    Args:
        jobs: sorted, each once; `dataset` is an index into `corpora`.
        corpora: their data sets.
        encoder: turns documents into examples.
        skip_bad: whether rows that the chat template does not take drop out.
        progress: told how far it is.

    Raises:
        UserError: the chat template does not take some rows (all of them at once).
    """
    sources = [corpus.store.directory.name for corpus in corpora]
    forms = [[c.section.chat_template_kwargs, c.phrasings and c.phrasings.as_json()] for c in corpora]
    of_jobs = hashlib.sha256(jobs.tobytes()).hexdigest()
    key = digest_of("examples", code_version(), sources, forms, encoder.digest, of_jobs, skip_bad)
    entry = prepared(key, lambda directory: _write(directory, jobs, corpora, encoder, skip_bad, progress))
    facts = read_facts(entry)
    with np.load(entry / JOBS) as arrays:
        counts, reason, uncut = arrays["counts"], arrays["reason"], arrays["uncut"]
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return Encoded(ExampleStore(entry / EXAMPLES), first, reason, facts["reasons"], uncut, facts["with_thoughts"])


# ------------------------------------------------------------------------------------------------------- a chunk


@dataclass
class _Chunk:
    """Some jobs, encoded."""

    examples: pa.RecordBatch | None = None
    counts: list[int] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    uncut: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    with_thoughts: int = 0


class _ChunkEncoder:
    """Encodes chunks."""

    def __init__(self, corpora: Sequence[Corpus], encoder: Encoder, *, skip_bad: bool) -> None:
        self._corpora, self._encoder, self._skip_bad = corpora, encoder, skip_bad
        self._indices = [corpus.store.column("index") for corpus in corpora]

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process reads the columns from the file.
        return partial(type(self), skip_bad=self._skip_bad), (self._corpora, self._encoder)

    def __call__(self, jobs: np.ndarray) -> _Chunk:
        chunk, columns = _Chunk(), ExampleColumns()
        for job, result in zip(jobs, encode_many(self._encoder, map(self._document, jobs)), strict=True):
            self._note(job, result, chunk, columns)
        # Made here, in one of many processes: a batch goes to the process that writes it as it is.
        chunk.examples = columns.to_batch()
        return chunk

    def _document(self, job: np.ndarray) -> Found:
        corpus = self._corpora[int(job["dataset"])]
        where = corpus.store.where(int(job["position"]))
        try:
            return document_of(job, corpus.store, corpus.phrasings, corpus.section), where
        except RowError as error:
            return UserError(error.what, how=error.how, where=where)

    def _note(self, job: np.ndarray, result: EncodeResult | UserError, chunk: _Chunk, columns: ExampleColumns) -> None:
        if isinstance(result, UserError):
            skipped = f"{result.problems[0].what} (data.on_bad_row: skip)" if self._skips(result) else None
            chunk.problems += [] if skipped else result.problems
            result = EncodeResult([], reason=skipped)
        number, position = int(job["dataset"]), int(job["position"])
        for example in result.examples:
            _add(columns, example, number, int(self._indices[number][position]))
        chunk.counts.append(len(result.examples))
        chunk.reasons.append(result.reason)
        chunk.uncut.append(result.uncut)
        chunk.with_thoughts += result.has_thoughts

    def _skips(self, error: UserError) -> bool:
        # A row that is too long is not bad: `truncation: error` asks for an error.
        return self._skip_bad and not isinstance(error, TooLongError)


def _add(columns: ExampleColumns, example: Example, dataset: int, row: int) -> None:
    ids, labels = example.input_ids.astype("<i4", copy=False), example.labels.astype("<i4", copy=False)
    is_target = np.zeros(len(labels) + 2, bool)
    is_target[1:-1] = labels != IGNORE
    trained = np.flatnonzero(is_target[1:] != is_target[:-1])
    columns.input_ids.append(ids)
    columns.spans.append(trained.astype(np.int32))
    columns.num_targets.append(int((trained[1::2] - trained[::2]).sum()))
    columns.truncated.append(example.truncated)
    columns.dataset.append(dataset)
    columns.row.append(row)
    columns.digest.append(hashlib.blake2b(ids.tobytes() + labels.tobytes(), digest_size=16).digest())


# ------------------------------------------------------------------------------------------------------ all of them


def _write(
    directory: Path,
    jobs: np.ndarray,
    corpora: Sequence[Corpus],
    encoder: Encoder,
    skip_bad: bool,
    progress: Progress,
) -> None:
    summary = _Summary(len(jobs))
    chunks = _encoded_chunks(jobs, _ChunkEncoder(corpora, encoder, skip_bad=skip_bad))

    def batches() -> Iterator[pa.RecordBatch]:
        for chunk in chunks:
            summary.add(chunk)
            progress("encoding", summary.done, len(jobs))
            yield chunk.examples

    write_table(directory / EXAMPLES, EXAMPLE_SCHEMA, batches())
    summary.problems.raise_any(of=", ".join(corpus.name for corpus in corpora))
    np.savez(directory / JOBS, counts=summary.counts, reason=summary.reason, uncut=summary.uncut)
    write_facts(directory, {"reasons": summary.reasons, "with_thoughts": summary.with_thoughts})


class _Summary:
    """What is known of each job, and what went wrong."""

    def __init__(self, num_jobs: int) -> None:
        self.done = 0
        self.counts = np.zeros(num_jobs, np.int32)
        self.reason = np.full(num_jobs, -1, np.int16)
        self.uncut = np.zeros(num_jobs, np.int32)
        self.reasons: list[str] = []
        self.with_thoughts = 0
        self.problems = Problems()

    def add(self, chunk: _Chunk) -> None:
        """Take over the next chunk's figures and problems."""
        end = self.done + len(chunk.counts)
        self.counts[self.done : end] = chunk.counts
        self.uncut[self.done : end] = chunk.uncut
        for place, reason in enumerate(chunk.reasons, start=self.done):
            if reason is not None:
                if reason not in self.reasons:
                    # Templates may name what is in the row: a reason for each would be no list to read.
                    reason = reason if len(self.reasons) < MAX_SHOWN else OTHER
                    self.reasons += [] if reason in self.reasons else [reason]
                self.reason[place] = self.reasons.index(reason)
        self.with_thoughts += chunk.with_thoughts
        for problem in chunk.problems:
            self.problems.add(problem)
        self.done = end


def _encoded_chunks(jobs: np.ndarray, encoder: _ChunkEncoder) -> Iterator[_Chunk]:
    """The chunks in order."""
    parts = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    here = 0 if len(jobs) >= MIN_PARALLEL else len(parts)
    yield from work(encoder, parts, here=here)
