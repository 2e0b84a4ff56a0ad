import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ftkit.errors import FailedElsewhere, ProcessLostError, UserError
from ftkit.launch import LaunchPlan, at_fault, read_launch_config, run_processes
from tests.tiny_runs import wait_until_ended


def write(tmp_path, text):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    return path


def test_processes_are_shared_by_the_machines(tmp_path):
    text = "num_machines: 2\nnum_processes: 16\nmachine_rank: 1\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\n"
    assert read_launch_config(write(tmp_path, text)) == LaunchPlan(8, 2, 1, "10.0.0.1", 29500)


def test_one_machine_needs_only_a_number(tmp_path):
    assert read_launch_config(write(tmp_path, "num_processes: 4\n")) == LaunchPlan(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: many\n", r"launch.yaml:1: num_processes: expected a whole number"),
        ("num_machines: 2\nnum_processes: 5\n", r"launch.yaml:2: num_processes: 5 processes cannot be shared"),
        ("num_machines: 2\nnum_processes: 4\n", "add main_process_ip and main_process_port"),
        ("- 1\n", "a launch file is a mapping"),
        ("machine_rank: -1\n", "expected a whole number"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_launch_config(write(tmp_path, text))


@pytest.fixture
def python(tmp_path, monkeypatch):
    """An interpreter that leaves out `-m ftkit`: processes run code of the test's instead."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def run_two(first, second):
    """Processes of rank 0 and 1 that run two pieces of code."""
    code = f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\nif rank == 0:\n  {first}\nelse:\n  {second}"
    run_processes(["-c", code], LaunchPlan(2))


SAY = "print('rank', rank, 'failed', file=sys.stderr)"


def test_all_well(python):
    run_two("pass", "time.sleep(0.2)")


def test_rank_0_goes_before_those_that_failed_because_it_left(python, capfd):
    with pytest.raises(FailedElsewhere) as caught:
        run_two(f"time.sleep(0.3); {SAY}; sys.exit(2)", f"{SAY}; sys.exit(1)")
    assert caught.value.exit_code == 2
    assert capfd.readouterr().err == "rank 0 failed\n"


def test_an_error_of_every_rank_is_told_by_rank_0(python, capfd):
    with pytest.raises(FailedElsewhere) as caught:
        run_two(f"time.sleep(0.3); {SAY}; sys.exit(3)", f"{SAY}; sys.exit(3)")
    assert caught.value.exit_code == 3
    assert capfd.readouterr().err == "rank 0 failed\n"


def test_another_rank_is_heard_where_it_is_at_fault(python, capfd):
    with pytest.raises(FailedElsewhere) as caught:
        run_two("time.sleep(0.3); sys.exit(1)", f"{SAY}; sys.exit(4)")
    assert caught.value.exit_code == 4
    assert capfd.readouterr().err == "rank 1 failed\n"


def test_a_killed_rank_is_named_whatever_the_others_die_of(python):
    with pytest.raises(ProcessLostError, match="process 1 was killed by SIGKILL"):
        run_two("time.sleep(0.3); sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)")


def test_those_that_wait_forever_are_killed_and_not_blamed(python, monkeypatch):
    monkeypatch.setattr("ftkit.launch.GRACE_SECONDS", 0.3)
    with pytest.raises(FailedElsewhere) as caught:
        run_two("time.sleep(60)", "sys.exit(1)")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 0, 1: 0}, None),
        ({0: 2, 1: 2}, (0, 2)),
        ({0: 1, 1: 1}, (0, 1)),
        ({0: 0, 1: 5}, (1, 5)),
        ({0: 2, 1: -signal.SIGABRT}, (0, 2)),
        ({0: 1, 1: -signal.SIGABRT}, (0, 1)),
        ({0: -signal.SIGABRT, 1: 4}, (1, 4)),
        ({1: 1}, (1, 1)),
    ],
)
def test_who_is_at_fault(codes, expected):
    assert at_fault(codes) == expected


CHILD = """
import os, sys, time
from ftkit.launch import end_with_parent
end_with_parent()
open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
time.sleep(60)
"""
PARENT = """
import sys
sys.executable = sys.argv[1]
from ftkit.launch import LaunchPlan, run_processes
run_processes(["-c", sys.argv[2], sys.argv[3]], LaunchPlan(2))
"""


def test_the_processes_end_when_their_parent_is_killed(python, tmp_path, capfd):
    (tmp_path / "pids").mkdir()
    real = psutil.Process().exe()
    parent = subprocess.Popen([real, "-c", PARENT, str(python), CHILD, str(tmp_path / "pids")], cwd=os.getcwd())
    pids = []
    while len(pids) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
        pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.wait()
    wait_until_ended(pids)
