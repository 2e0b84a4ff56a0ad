"""Work in other processes: in order, a few parts ahead, and an end of it when one dies."""

import os
import signal

import pytest

from ftkit.data import processes
from ftkit.data.processes import work
from ftkit.errors import ProcessLostError, UserError


def process_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    raise UserError(f"{number} is wrong", how="take another", where="data.jsonl:3")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 2)


def test_the_first_parts_are_worked_on_here_and_the_rest_elsewhere_in_order() -> None:
    results = list(work(process_and_square, range(20), here=3))
    assert [square for _, square in results] == [number * number for number in range(20)]
    pids = [pid for pid, _ in results]
    assert set(pids[:3]) == {os.getpid()}
    assert os.getpid() not in pids[3:]


def test_few_parts_start_no_process() -> None:
    assert {pid for pid, _ in work(process_and_square, range(3), here=3)} == {os.getpid()}


def test_parts_are_taken_a_few_ahead() -> None:
    parts = iter(range(100))
    results = work(process_and_square, parts, here=0)
    assert next(results)[1] == 0
    assert next(parts) <= 10
    results.close()  # type: ignore[attr-defined]


def test_a_killed_process_ends_the_work() -> None:
    with pytest.raises(ProcessLostError, match="was killed"):
        list(work(die, range(20), here=0))


def test_errors_arrive_whole() -> None:
    with pytest.raises(UserError) as caught:
        list(work(refuse, range(20), here=0))
    assert str(caught.value) == "data.jsonl:3: 0 is wrong; take another"
    assert caught.value.problems[0].where == "data.jsonl:3"
