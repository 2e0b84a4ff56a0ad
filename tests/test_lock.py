import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from ftkit.errors import UserError
from ftkit.lock import RunLock, refuse_if_locked
from ftkit.runs import LOG, discard_unstarted
from tests.test_runs import make

HOLDER = """
import sys, time
from pathlib import Path
from ftkit.lock import RunLock
lock = RunLock()
lock.take(Path(sys.argv[1]), print)
print("taken", flush=True)
time.sleep(60)
"""


def fail(text):
    raise AssertionError(text)


def test_another_process_is_refused_until_the_first_is_dead(tmp_path):
    log = tmp_path / LOG
    log.write_text("what was there\n")
    command = [sys.executable, "-c", HOLDER, str(log)]
    with subprocess.Popen(command, cwd=os.getcwd(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=f"{tmp_path} is being trained by another process"):
            RunLock().take(log, fail)
        with pytest.raises(UserError, match="another process"):
            refuse_if_locked(log)
        holder.send_signal(signal.SIGKILL)
    lock = RunLock()
    lock.take(log, fail)
    lock.release()
    assert log.read_text() == "what was there\n"


def test_a_released_lock_is_free_and_nothing_lies_about(tmp_path):
    lock = RunLock()
    lock.take(tmp_path / LOG, fail)
    with pytest.raises(UserError):
        refuse_if_locked(tmp_path / LOG)
    lock.release()
    refuse_if_locked(tmp_path / LOG)
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
    discard_unstarted(tmp_path)
    assert not tmp_path.exists()


def test_a_run_that_is_being_trained_is_not_moved_aside(tmp_path):
    run = make(tmp_path / "mine")
    (run / "metrics.jsonl").touch()
    lock = RunLock()
    lock.take(run / LOG, fail)
    with pytest.raises(UserError, match="another process"):
        make(tmp_path / "mine", overwrite=True)
    lock.release()
    make(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine.old-1" / "metrics.jsonl").exists()


def test_checking_creates_nothing(tmp_path):
    refuse_if_locked(tmp_path / LOG)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_worth_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    warnings = []
    RunLock().take(tmp_path / LOG, warnings.append)
    assert "cannot be locked" in warnings[0]
