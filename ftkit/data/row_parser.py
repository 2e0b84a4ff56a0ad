"""Rows of any format, read one by one: by the columns of a format, or for the phrasings of a data set."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from ftkit.data.formats import (
    FORMATS,
    check_columns,
    check_section,
    detect_format,
    missing_columns,
    overlooked_columns,
    source_columns,
)
from ftkit.data.phrasings import PhrasingSet, find_phrasings, phrase
from ftkit.data.problems import Problems, RowError
from ftkit.data.task_rows import SkippedRow, read_record
from ftkit.data.types import Conversation, Document, Row, RowContent, TaskRecord, Text
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.schema import DatasetSection


class RowParser:
    """Reads the rows of one data set, whatever their format."""

    def __init__(
        self, sample: Sequence[Row], dataset: DatasetSection, phrasings: PhrasingSet | None, *, key: KeyPath
    ) -> None:
        """
        Args:
            sample: the first rows, which tell the format where the recipe does not.
            dataset: the data set's section of the recipe.
            phrasings: those of its `templates`.
            key: the section's place in the recipe, for errors.

        Raises:
            UserError: the format is unknown, its columns are missing, or it has none that phrasings could read.
        """
        self.phrasings = phrasings
        """Where rows are put into words anew in each epoch."""
        self.dataset = dataset
        self.overlooked: dict[str, str] = {}
        """Columns of the sample that are not read -> what each seems to be."""
        if phrasings is not None:
            self._check_phrasings(key)
            return
        self._format = dataset.format or detect_format(sample, dataset, key)
        check_section(self._format, dataset, key)
        check_columns(sample, self._format, dataset, key)
        self._sources = source_columns(self._format, dataset)
        self.overlooked = overlooked_columns(sample, self._format, dataset)

    def parse(self, row: Row) -> RowContent:
        """What the row holds.

        Raises:
            RowError: what is wrong with it.
            SkippedRow: it has no answer, and says so.
        """
        if self.phrasings is not None:
            columns = self.dataset.columns.model_dump(exclude_none=True)
            content: RowContent = read_record(self.phrasings, row.fields, columns, self.dataset.labels)
        else:
            sources = self._sources.items()
            fields = {column: row.fields[source] for column, source in sources if source in row.fields}
            try:
                content = FORMATS[self._format].parse(Row(row.index, fields, row.where), self.dataset)
            except RowError as error:
                raise missing_columns(row, self._format, self.dataset) or error from None
        _check_unicode(content)
        return content

    def _check_phrasings(self, key: KeyPath) -> None:
        if self.dataset.format not in (None, "task"):
            what = f"format {self.dataset.format} is not phrased by templates"
            raise UserError(what, how="remove one of them", key=(*key, "format"))
        if self.dataset.template is not None:
            raise UserError("template and templates exclude each other", how="keep one", key=(*key, "template"))


def parse_rows(
    rows: Sequence[Row], dataset: DatasetSection, *, key: KeyPath, base: Path = Path(), seed: int = 0
) -> list[tuple[Row, Document]]:
    """Each row with its document, of a small data set at once; rows that say that they have no answer are left out.

    Args:
        rows: rows of `read_rows`.
        dataset: their section of the recipe.
        key: the section's place in the recipe, for errors.
        base: the directory that a file of phrasings is looked for in.
        seed: chooses each row's phrasing, where there are several.

    Raises:
        UserError: the format is unknown, its columns are missing, or rows are wrong (all of them at once).
    """
    phrasings = None
    if dataset.templates is not None:
        phrasings = find_phrasings(dataset.templates, base=base, key=(*key, "templates"))
    parser = RowParser(rows, dataset, phrasings, key=key)
    documents: list[tuple[Row, Document]] = []
    problems = Problems()
    for row in rows:
        try:
            content = parser.parse(row)
            if isinstance(content, TaskRecord):
                assert phrasings is not None, "only phrasings make records"
                choices = phrasings.direct
                content = phrase(content, phrasings, choices[_choice(seed, row.index, len(choices))])
            documents.append((row, content))
        except SkippedRow:
            continue
        except RowError as error:
            problems.add(Problem(error.what, error.how, row.where))
    problems.raise_any(of=dataset.path)
    return documents


def _choice(seed: int, row: int, count: int) -> int:
    """A number below `count` that depends on seed and row alone."""
    return zlib.crc32(f"{seed} {row}".encode()) % count


def _check_unicode(content: RowContent) -> None:
    """Half a surrogate pair ("\\ud83d" in JSON) is no text: no tokenizer takes it."""
    texts = [content.text] if isinstance(content, Text) else []
    if isinstance(content, Conversation):
        texts = [message.content for message in content.messages]
    elif isinstance(content, TaskRecord):
        texts = [str(value) for value in (*content.fields.values(), content.target)]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"half a surrogate pair at character {error.start}", "remove or complete it") from None
