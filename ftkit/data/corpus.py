"""One data set of the recipe: its rows read once into a file of documents, and which of them are used."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ftkit.data.cache import code_version, digest_of, prepared
from ftkit.data.duplicates import content_key, record_key
from ftkit.data.mixture import choose_subset
from ftkit.data.phrasings import PhrasingSet, find_phrasings, library_clusters
from ftkit.data.problems import MAX_SHOWN, Problems, RowError
from ftkit.data.processes import MIN_PARALLEL, work
from ftkit.data.readers import BadRecord
from ftkit.data.row_parser import RowParser
from ftkit.data.sources import find_source, no_rows
from ftkit.data.store import BATCH, ROW_SCHEMA, ROWS, RowStore, read_facts, write_facts, write_table
from ftkit.data.task_rows import SkippedRow
from ftkit.data.types import Row, RowContent, TaskRecord, content_to_json
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.schema import DataSection, DatasetSection

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: not known)."""

SAMPLE = 1000
"""Rows that tell the format."""

Found = Row | BadRecord | Problem


@dataclass(frozen=True)
class Corpus:
    """The rows of one data set that could be read, cut to clusters and `max_samples`."""

    name: str
    key: KeyPath
    """The section's place in the recipe."""
    section: DatasetSection
    store: RowStore
    chosen: np.ndarray
    """int64 [rows], positions in the store, ascending."""
    phrasings: PhrasingSet | None
    """Where rows are put into words anew in each epoch."""
    rows_read: int
    """In the source, bad ones included."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> row ids."""
    unread: dict[int, str] = field(default_factory=dict)
    """Row id -> `file:line`, of rows that are in no store."""
    overlooked: dict[str, str] = field(default_factory=dict)
    """Columns that are not read -> the format's column that each seems to be (`overlooked_columns`)."""

    def where(self, row: int) -> str:
        """`file:line` of a row, by its id."""
        position = int(np.searchsorted(self._indices, row))
        if position < len(self._indices) and self._indices[position] == row:
            return self.store.where(position)
        return self.unread[row]

    @cached_property
    def _indices(self) -> np.ndarray:
        return self.store.column("index")

    @property
    def keys(self) -> np.ndarray:
        """16 bytes for each of the chosen rows, equal where rows are read as the same (`content_key`)."""
        return self.store.column("key")[self.chosen]

    @property
    def record_keys(self) -> np.ndarray:
        """16 bytes for each of the chosen rows, equal where their columns are (`record_key`)."""
        return self.store.column("record_key")[self.chosen]

    @property
    def why_no_reasoning(self) -> str | None:
        """What is missing for a row to be asked for its reasoning; None if nothing is."""
        if self.phrasings is not None and not self.phrasings.reasoned:
            return f"no phrasing of {self.phrasings.name} asks for the reasoning ({self.name})"
        if not self.store.column("has_rationale")[self.chosen].any():
            return f"no row of {self.name} has reasoning to ask for"
        return None

    def row_ids(self, places: np.ndarray) -> np.ndarray:
        """`Row.index` of chosen rows."""
        indices: np.ndarray = self.store.column("index")[self.chosen[places]]
        return indices


def load_corpus(
    section: DatasetSection,
    name: str,
    data: DataSection,
    *,
    directory: Callable[[KeyPath], Path],
    key: KeyPath,
    seed: int,
    progress: Progress,
    first_rows: int | None = None,
) -> Corpus:
    """Read and parse a data set, unless that has been done before, and take its subset.

    Clusters are held out of training data only.

    Args:
        directory: of a key, where a relative path there starts (`LoadedRecipe.directory`).
        first_rows: read no more; all of them where clusters choose some.

    Raises:
        FtkitError: no such data set, the format is unknown, or rows are bad (all of them at once).
    """
    source = find_source(section, base=directory((*key, "path")), key=key)
    if not any(part.clusters or part.exclude_clusters for part in (section, data)):
        source = replace(source, first=first_rows)
    phrasings = None
    if section.templates is not None:
        templates_key = (*key, "templates")
        phrasings = find_phrasings(section.templates, base=directory(templates_key), key=templates_key)
    entry = prepared(
        _entry_key(section, data, source.digest(), phrasings),
        lambda entry: _write_rows(entry, source.stream(), section, phrasings, data, name, key, progress),
    )
    store, facts = RowStore(entry), read_facts(entry)
    dropped: dict[str, list[int]] = dict(facts["dropped"])
    unread = dict(zip(facts["unread"]["rows"], facts["unread"]["places"], strict=True))
    chosen = np.arange(len(store))
    if key[1] == "train":
        chosen = _in_clusters(store, section, data, dropped)
        if len(chosen) == 0 and (section.clusters or section.exclude_clusters):
            clusters = ", ".join(sorted({str(cluster) for cluster in set(store.column("cluster"))} - {""})) or "none"
            what = f"{section.path} has no rows of these clusters (its own: {clusters})"
            raise UserError(what, how="look at clusters and exclude_clusters", key=(*key, "path"))
    chosen = chosen[choose_subset(len(chosen), section.max_samples, seed=seed, name=name)]
    rows_read, overlooked = facts["rows_read"], facts["overlooked"]
    return Corpus(name, key, section, store, chosen, phrasings, rows_read, dropped, unread, overlooked)


def check_clusters(data: DataSection, train: Sequence[Corpus]) -> list[str]:
    """Check that every cluster that the recipe names exists, in a data set of it or in the library.

    A misspelt name in `exclude_clusters` would leave a held-out task in the training data.

    Returns:
        Names that are clusters of the library, of which the recipe's data has no row.

    Raises:
        UserError: one does not; all that do are named.
    """
    known = {str(cluster) for corpus in train for cluster in set(corpus.store.column("cluster"))} - {""}
    named: list[tuple[KeyPath, str]] = []
    sections: list[tuple[KeyPath, DataSection | DatasetSection]] = [(("data",), data)]
    sections += [(corpus.key, corpus.section) for corpus in train]
    for key, section in sections:
        for option, names in (("clusters", section.clusters), ("exclude_clusters", section.exclude_clusters)):
            named += [((*key, option), name) for name in names]
    unknown = [(key, name) for key, name in named if name not in known | library_clusters()]
    if unknown:
        how = f"name one of {', '.join(sorted(known))}" if known else "no row has a cluster; leave it out"
        raise UserError.of(
            [Problem(f"there is no cluster {name} in data.train", how, key=key) for key, name in unknown]
        )
    return sorted({name for _, name in named} - known)


def _entry_key(section: DatasetSection, data: DataSection, digest: str, phrasings: PhrasingSet | None) -> str:
    read_by = section.model_dump(include={"format", "columns", "roles", "template", "labels", "cluster"})
    return digest_of("rows", code_version(), digest, read_by, phrasings and phrasings.as_json(), data.on_bad_row)


def _in_clusters(
    store: RowStore, section: DatasetSection, data: DataSection, dropped: dict[str, list[int]]
) -> np.ndarray:
    """Positions of the rows whose cluster is wanted."""
    wanted = [set(names) for names in (section.clusters, data.clusters) if names]
    unwanted = {*section.exclude_clusters, *data.exclude_clusters}
    if not wanted and not unwanted:
        return np.arange(len(store))
    clusters = store.column("cluster")
    kept = {name for name in set(clusters) if all(name in names for names in wanted) and name not in unwanted}
    mask = np.array([cluster in kept for cluster in clusters], bool)
    if not mask.all():
        dropped["of a cluster that is left out"] = [int(index) for index in store.column("index")[~mask]]
    return np.flatnonzero(mask)


# --------------------------------------------------------------------------------------------------- reading rows


def _write_rows(
    directory: Path,
    stream: Iterator[Found],
    section: DatasetSection,
    phrasings: PhrasingSet | None,
    data: DataSection,
    name: str,
    key: KeyPath,
    progress: Progress,
) -> None:
    """Read the rows, a batch in memory at a time."""
    first = list(islice(stream, SAMPLE))
    while not any(isinstance(found, Row) for found in first) and (more := list(islice(stream, SAMPLE))):
        first += more
    sample = [found for found in first if isinstance(found, Row)]
    reading = _Reading(skip_bad=data.on_bad_row == "skip")
    if not sample:
        for found in first:
            reading.note(found)
        reading.finish(section, key)
        raise no_rows(section, key)
    parser = RowParser(sample, section, phrasings, key=key)
    worker = _RowReader(parser)
    parts = _in_parts(chain(first, stream))

    def batches() -> Iterator[pa.RecordBatch]:
        for read in work(worker, parts, here=MIN_PARALLEL // BATCH):
            reading.add(read)
            if reading.kept >= BATCH:
                progress(f"reading {name}", reading.kept, 0)
            yield read.rows

    write_table(directory / ROWS, ROW_SCHEMA, batches())
    reading.finish(section, key)
    unread = {"rows": list(reading.unread), "places": list(reading.unread.values())}
    facts = {"rows_read": reading.rows_read, "dropped": reading.dropped, "unread": unread}
    write_facts(directory, {**facts, "overlooked": parser.overlooked})


@dataclass
class _Read:
    """What became of some records."""

    rows: pa.RecordBatch
    records: int
    problems: list[tuple[int | None, Problem]]
    """Row ids, and what is wrong with these rows; None: a file cannot be read on."""
    skipped: list[tuple[int, Problem]]
    """The same of rows that are left out in any case."""


class _RowReader:
    """Reads the rows of a part of the stream."""

    def __init__(self, parser: RowParser) -> None:
        self._parser = parser

    def __call__(self, part: tuple[int, list[Found]]) -> _Read:
        index, found_rows = part
        rows: list[tuple[Row, RowContent]] = []
        problems: list[tuple[int | None, Problem]] = []
        skipped: list[tuple[int, Problem]] = []
        records = 0
        for found in found_rows:
            if isinstance(found, Problem):
                problems.append((None, found))
                continue
            if isinstance(found, BadRecord):
                problems.append((index + records, found.problem))
            else:
                try:
                    rows.append((found, self._parser.parse(found)))
                except RowError as error:
                    problems.append((found.index, Problem(error.what, error.how, found.where)))
                except SkippedRow as reason:
                    skipped.append((found.index, Problem(str(reason), where=found.where)))
            records += 1
        return _Read(_to_batch(rows, self._parser), records, problems, skipped)


class _Reading:
    """Counts rows and collects what is wrong with them."""

    def __init__(self, *, skip_bad: bool) -> None:
        self.rows_read = self.kept = 0
        self.dropped: dict[str, list[int]] = {}
        """Reason -> row ids."""
        self.unread: dict[int, str] = {}
        """Row id -> `file:line`, of all of these."""
        self._skip_bad = skip_bad
        self._problems = Problems()
        self._mend: str | None = None
        """How the first row that was left out is mended."""

    def add(self, read: _Read) -> None:
        """Take over what is known of the next part."""
        self.rows_read += read.records
        self.kept += read.rows.num_rows
        for row, problem in read.problems:
            if row is None:
                self._problems.add(problem)
            else:
                self._bad(problem, row)
        for row, problem in read.skipped:
            self._leave_out(row, problem, problem.what)

    def note(self, found: Found) -> None:
        """Count what was read; a file that cannot be read on is an error in any case."""
        self.rows_read += not isinstance(found, Problem)
        if isinstance(found, BadRecord):
            self._bad(found.problem, self.rows_read - 1)
        elif isinstance(found, Problem):
            self._problems.add(found)

    def finish(self, section: DatasetSection, key: KeyPath) -> None:
        """Raise all that was wrong, or that every row was left out."""
        self._problems.raise_any(of=section.path)
        if self.kept == 0 and self.dropped:
            reasons = "; ".join(f"{len(ids)}: {reason}" for reason, ids in self.dropped.items())
            what = f"{section.path} has no row that can be used ({reasons}), first {next(iter(self.unread.values()))}"
            raise UserError(what, how=self._mend, key=(*key, "path"))

    def _bad(self, problem: Problem, row: int) -> None:
        if self._skip_bad:
            reason = problem.what if len(self.dropped) < MAX_SHOWN else "something else is wrong"
            self._leave_out(row, problem, f"{reason} (data.on_bad_row: skip)")
        else:
            self._problems.add(problem)

    def _leave_out(self, row: int, problem: Problem, reason: str) -> None:
        if not self.dropped:
            self._mend = problem.how
        self.dropped.setdefault(reason, []).append(row)
        self.unread[row] = problem.where or ""


def _in_parts(stream: Iterator[Found]) -> Iterator[tuple[int, list[Found]]]:
    """The stream in parts, each with the number of records before it."""
    records = 0
    while part := list(islice(stream, BATCH)):
        yield records, part
        records += sum(not isinstance(found, Problem) for found in part)


def _to_batch(rows: Sequence[tuple[Row, RowContent]], parser: RowParser) -> pa.RecordBatch:
    own = parser.dataset.cluster or (parser.phrasings.section.cluster if parser.phrasings is not None else None)
    columns: list[list[Any]] = [
        [content_to_json(content) for _, content in rows],
        [row.where for row, _ in rows],
        [own or str(row.fields.get("cluster") or "") for row, _ in rows],
        [row.index for row, _ in rows],
        [content_key(content) for _, content in rows],
        [record_key(row.fields) for row, _ in rows],
        [isinstance(content, TaskRecord) and content.rationale is not None for _, content in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=ROW_SCHEMA)
