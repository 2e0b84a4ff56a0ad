"""Many bad rows, one error: the first ones in full, then a count."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ftkit.errors import FtkitError, Problem, UserError

MAX_SHOWN = 20
"""Problems of one kind that are shown in full."""
MAX_PLACES = 5
"""Further places that are told of a problem that many rows have."""


def problems_error(problems: Sequence[Problem], *, of: str, total: int | None = None) -> FtkitError:
    """One `UserError` with the first `MAX_SHOWN` problems and a count of the rest.

    Args:
        of: what they are in.
        total: how many there are, where `problems` are the first of them only.
    """
    total = len(problems) if total is None else total
    rest = total - min(len(problems), MAX_SHOWN)
    if rest <= 0:
        return UserError.of(problems)
    count = Problem(f"{rest} more of {total} problems are not shown", where=of)
    return UserError.of([*problems[:MAX_SHOWN], count])


class Problems:
    """Problems of many rows; what is wrong with several of them alike is one problem, told at the first of them."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str | None], Problem] = {}
        self._further: defaultdict[tuple[str, str | None], list[str]] = defaultdict(list)
        """Where else: the first places, one more than are told."""
        self._times: Counter[tuple[str, str | None]] = Counter()

    def add(self, problem: Problem) -> None:
        """Note one."""
        same = (problem.what, problem.how)
        self._times[same] += 1
        if same in self._first:
            if len(self._further[same]) <= MAX_PLACES:
                self._further[same].append(problem.where or "")
        elif len(self._first) < MAX_SHOWN:
            self._first[same] = problem

    def raise_any(self, *, of: str) -> None:
        """Raise what was noted, if anything was.

        Args:
            of: what the rows are of.

        Raises:
            UserError: as `problems_error`.
        """
        if not self._first:
            return
        shown = [replace(problem, what=self._counted(same)) for same, problem in self._first.items()]
        raise problems_error(shown, of=of, total=len(self._times))

    def _counted(self, same: tuple[str, str | None]) -> str:
        more = self._times[same] - 1
        if not more:
            return same[0]
        return f"{same[0]} (and {count_rows(more)} more: {_places(self._first[same].where or '', self._further[same])})"


def _places(first: str, further: Sequence[str]) -> str:
    """Further places, in short where they are in the file of the first: "5, 9" of "rows.jsonl:5", "rows.jsonl:9"."""
    file = first.rpartition(":")[0]
    short = [where.removeprefix(f"{file}:").strip() if file else where for where in further[:MAX_PLACES]]
    return ", ".join(short) + (", ..." if len(further) > MAX_PLACES else "")


def count_rows(number: int) -> str:
    """ "1 row", "2 rows"."""
    return f"{number:,} row{'' if number == 1 else 's'}"


def list_rows(rows: Sequence[int], *, limit: int = 5) -> str:
    """ "row 7", "rows 7, 8, 9, 10, 11, ..."."""
    listed = ", ".join(map(str, rows[:limit])) + (", ..." if len(rows) > limit else "")
    return f"row{'' if len(rows) == 1 else 's'} {listed}"


def shorten(value: object, *, width: int = 60) -> str:
    """The value's text on one line, cut to `width` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def quoted(value: object) -> str:
    """The value as Python writes it, shortened."""
    return shorten(repr(value))


class RowError(ValueError):
    """What is wrong with one row; `parse_rows` adds the place and reports all rows together."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(what)
        self.what, self.how = what, how
