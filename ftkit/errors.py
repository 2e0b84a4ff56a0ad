"""What can go wrong for a user, in one line each, and the exit code that tells the kind.

A traceback means a bug in ftkit; everything else is an `FtkitError`, printed by the command line as
`ftkit: error: [WHERE: ]WHAT; HOW TO MEND IT`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

KeyPath = tuple[str | int, ...]
"""Path of a key in a recipe or suite, e.g. ("data", "train", 0, "path")."""


def dotted(key: KeyPath) -> str:
    """("data", "train", 0, "path") -> "data.train.0.path"."""
    return ".".join(str(part) for part in key)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: what, where, and how to mend it."""

    what: str
    how: str | None = None
    """The fix, as an imperative phrase without a full stop."""
    where: str | None = None
    """`file:line[: key]`, `file`, or None where no place can be named."""
    key: KeyPath = ()
    """The recipe key at fault. The command that knows the file's line marks turns it into `where`."""

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return " ".join((text if self.how is None else f"{text}; {self.how}").split())


class FtkitError(Exception):
    """Base of all errors that users see; `exit_code` is the process's exit code."""

    exit_code = 1
    last_line: str | None = None
    """What standard output is to end with, where a program reads it."""

    def __init__(self, what: str, *, how: str | None = None, where: str | None = None, key: KeyPath = ()) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, how, where, key),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> Self:
        """One error that reports several problems, a line each."""
        problems = tuple(problems)
        assert problems, "an error needs a problem"
        error = cls(problems[0].what)
        error.problems = problems
        error.args = ("\n".join(str(problem) for problem in problems),)
        return error

    def located(self, where: dict[KeyPath, str]) -> Self:
        """The same error with `where` filled in for problems that name only a key (nearest marked ancestor)."""
        # Not through `of`: a subclass may ask for more than a text, and may have no problem left to tell.
        error = type(self).__new__(type(self))
        error.__dict__.update(self.__dict__)
        error.problems = tuple(replace(p, where=p.where or _nearest(p.key, where)) for p in self.problems)
        error.args = ("\n".join(str(problem) for problem in error.problems),)
        return error


def _nearest(key: KeyPath, where: dict[KeyPath, str]) -> str | None:
    for length in range(len(key), 0, -1):
        if (place := where.get(key[:length])) is not None:
            return f"{place}: {dotted(key)}"
    return dotted(key) or None


class UserError(FtkitError):
    """The user's input: recipe, data, arguments, a directory that is already taken."""

    exit_code = 2


class NonFiniteError(FtkitError):
    """A loss or gradient that is not finite."""

    exit_code = 3


class OutOfMemoryError(FtkitError):
    """A device or the machine has too little memory."""

    exit_code = 4


class StorageError(FtkitError):
    """Disk full, permission denied, or other I/O."""

    exit_code = 5


class CheckFailedError(FtkitError):
    """A check that was asked for did not hold: merge proof, evaluation threshold."""

    exit_code = 6


class NetworkError(FtkitError):
    """Network or hub, worth a retry."""

    exit_code = 7


class ProcessLostError(FtkitError):
    """A training process or node died."""

    exit_code = 8


class Interrupted(FtkitError):
    """Ctrl-C (SIGINT, 130) or SIGTERM (143), after the state was saved."""

    def __init__(self, what: str, *, signal_number: int, how: str | None = None) -> None:
        super().__init__(what, how=how)
        self.exit_code = 128 + signal_number


class FailedElsewhere(FtkitError):
    """Another process of this run failed and prints the error itself; only its exit code is left to pass on."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process failed with exit code {exit_code}")
        self.problems = ()
        self.exit_code = exit_code
