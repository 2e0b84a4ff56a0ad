"""Errors: the line that users see, the exit codes, and places filled in from keys."""

import signal

import pytest

from ftkit import errors
from ftkit.errors import FailedElsewhere, FtkitError, Interrupted, Problem, UserError, dotted

EXIT_CODES = {
    "UserError": 2,
    "NonFiniteError": 3,
    "OutOfMemoryError": 4,
    "StorageError": 5,
    "CheckFailedError": 6,
    "NetworkError": 7,
    "ProcessLostError": 8,
}


def test_every_kind_has_its_exit_code() -> None:
    kinds = {kind.__name__: kind for kind in FtkitError.__subclasses__() if kind.__module__ == errors.__name__}
    assert kinds.keys() == EXIT_CODES.keys() | {"Interrupted", "FailedElsewhere"}
    assert {name: kinds[name].exit_code for name in EXIT_CODES} == EXIT_CODES
    assert Interrupted("stopped", signal_number=signal.SIGINT).exit_code == 130
    assert Interrupted("stopped", signal_number=signal.SIGTERM).exit_code == 143
    assert FailedElsewhere(3).exit_code == 3


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (Problem("no rows"), "no rows"),
        (Problem("no rows", "name a file"), "no rows; name a file"),
        (Problem("no rows", None, "r.yaml:3: data"), "r.yaml:3: data: no rows"),
        (Problem("no rows", "name a file", "r.yaml:3"), "r.yaml:3: no rows; name a file"),
        (Problem("two\nlines", "and\n  more"), "two lines; and more"),
    ],
)
def test_a_problem_is_one_line(problem: Problem, line: str) -> None:
    assert str(problem) == line


def test_dotted() -> None:
    assert dotted(("data", "train", 0, "path")) == "data.train.0.path"


def test_several_problems_are_several_lines() -> None:
    error = UserError.of([Problem("one"), Problem("two", "mend it")])
    assert isinstance(error, UserError)
    assert error.exit_code == 2
    assert str(error) == "one\ntwo; mend it"
    with pytest.raises(AssertionError):
        UserError.of([])


def test_keys_become_places() -> None:
    marks = {("data",): "r.yaml:2", ("data", "train", 0): "r.yaml:4", ("seed",): "command line"}
    error = UserError.of(
        [
            Problem("a", key=("data", "train", 0, "path")),
            Problem("b", key=("data", "eval")),
            Problem("c", key=("seed",)),
            Problem("d", key=("training", "optim")),
            Problem("e", where="x.json:7", key=("data",)),
            Problem("f"),
        ]
    ).located(marks)
    assert isinstance(error, UserError)
    assert [str(problem) for problem in error.problems] == [
        "r.yaml:4: data.train.0.path: a",
        "r.yaml:2: data.eval: b",
        "command line: seed: c",
        "training.optim: d",
        "x.json:7: e",
        "f",
    ]


def test_locating_keeps_the_kind_and_the_exit_code() -> None:
    for kind in FtkitError.__subclasses__():
        if kind.__module__ == errors.__name__ and kind is not Interrupted:
            assert type(kind("x").located({})) is kind
    interrupted = Interrupted("stopped", signal_number=signal.SIGTERM, how="go on with --resume").located({})
    assert (type(interrupted), interrupted.exit_code, str(interrupted)) == (
        Interrupted,
        143,
        "stopped; go on with --resume",
    )
