"""Many bad rows, one error: the first ones in full, then a count."""

from collections.abc import Sequence

from ftkit.errors import FtkitError, Problem, UserError

MAX_SHOWN = 20
"""Problems of one kind that are shown in full."""


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
