"""Several processes on this machine (or this machine's part of several), started and watched by one parent.

The parent imports no torch. It speaks torch's environment variables, so that a run started by torchrun or
`accelerate launch` looks the same from inside, and it passes on the exit code of the process at fault, which torchrun
would turn into 1.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftkit.errors import FailedElsewhere, ProcessLostError, UserError

GRACE_SECONDS = 5.0
"""How long the other processes may take to end by themselves after one of them did, before they are killed."""

PARENT_PIPE = "FTKIT_PARENT_PIPE"
"""Environment variable: the descriptor of a pipe whose other end the parent holds open as long as it lives."""

ECHOES = (1, -signal.SIGABRT)
"""Exit codes of a traceback and of an abort: what a process dies of when another leaves it alone in a collective."""


@dataclass(frozen=True)
class LaunchPlan:
    """Where the processes run."""

    processes: int = 1
    """On this machine."""
    machines: int = 1
    machine_rank: int = 0
    address: str = "127.0.0.1"
    """Of the machine with rank 0."""
    port: int | None = None
    """None: a free one (one machine only)."""


def launched_by_another() -> bool:
    """Whether torchrun, `accelerate launch` or srun (see slurm.py) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def visible_gpus() -> int:
    """Number of GPUs that a run would use; without torch where the machine has no driver at all."""
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def read_launch_config(path: Path) -> LaunchPlan:
    """An accelerate configuration file; only where to run is read from it.

    How to split the work is `training.parallel`'s say.
    """
    from ftkit.recipe.marked_yaml import read_yaml

    values, marks = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError("a launch file is a mapping of accelerate's keys", where=str(path), how="see configs/")
    machines = values.get("num_machines", 1)
    total = values.get("num_processes", machines)
    port = values.get("main_process_port")
    for key, number in (
        ("num_machines", machines),
        ("num_processes", total),
        ("machine_rank", values.get("machine_rank", 0)),
    ):
        if not isinstance(number, int) or isinstance(number, bool) or number < (key != "machine_rank"):
            raise UserError(f"expected a whole number, got {number!r}", where=f"{marks.get((key,), path)}: {key}")
    if total % machines:
        raise UserError(
            f"{total} processes cannot be shared evenly by {machines} machines",
            where=f"{marks.get(('num_processes',), path)}: num_processes",
            how="num_processes counts those of all machines; make it a multiple of num_machines",
        )
    if machines > 1 and (port is None or "main_process_ip" not in values):
        raise UserError(
            "several machines need to know where the first one is",
            where=str(path),
            how="add main_process_ip and main_process_port",
        )
    address = str(values.get("main_process_ip", "127.0.0.1"))
    return LaunchPlan(total // machines, machines, values.get("machine_rank", 0), address, port)


def end_with_parent() -> None:
    """In a process that `run_processes` started: end when the parent does, even if it was killed.

    The parent never writes to the pipe; the kernel closes its end whatever the parent dies of, and reading returns.
    """
    descriptor = os.environ.pop(PARENT_PIPE, None)
    if descriptor is None:
        return

    def watch() -> None:
        os.read(int(descriptor), 1)
        # At once: the main thread may be in a collective that never completes. Checkpoints are safe at any moment.
        os._exit(ProcessLostError.exit_code)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def run_processes(arguments: Sequence[str], plan: LaunchPlan) -> None:
    """Run `python -m ftkit ARGUMENTS` in every process of `plan` and wait for all.

    Raises:
        ProcessLostError: a process was killed by a signal that nobody here sent.
        FailedElsewhere: a process ended with an exit code of its own; it has said why already.
    """
    port = plan.port or _free_port()
    lifeline, held = os.pipe()
    with tempfile.TemporaryDirectory(prefix="ftkit-") as directory:
        # All processes meet the same error at the same time and would each print it: the first one speaks, another is
        # heard only if it is the one at fault.
        complaints = [Path(directory) / f"rank-{local_rank}" for local_rank in range(plan.processes)]
        children = [
            _start(arguments, plan, local_rank, port, complaints[local_rank], lifeline)
            for local_rank in range(plan.processes)
        ]
        signals: list[int] = []

        def forward(number: int, _frame: object) -> None:
            signals.append(number)
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _wait(children)
        finally:
            codes = _end(children)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(lifeline)
            os.close(held)
        failed = at_fault(codes)
        if failed is None:
            return
        local_rank, code = failed
        if local_rank > 0 and code > 0:
            sys.stderr.write(complaints[local_rank].read_text(encoding="utf-8", errors="replace"))
    if code < 0 and not signals:
        name = signal.Signals(-code).name
        raise ProcessLostError(
            f"process {local_rank} was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""),
            how="start again with --resume",
        )
    raise FailedElsewhere(128 - code if code < 0 else code)


def at_fault(codes: Mapping[int, int]) -> tuple[int, int] | None:
    """(rank, exit code) of the process whose failure is the cause of the others'; None where none failed.

    When one process leaves, others fail for want of it, perhaps sooner than it is gone. So an exit code that says what
    happened, or a kill, goes before an echo; among equals rank 0 goes first, which speaks for all.

    Args:
        codes: by rank, of the processes that ended by themselves; negative: killed by that signal.
    """
    failures = [(rank, code) for rank, code in codes.items() if code]
    return min(failures, key=lambda failure: (failure[1] in ECHOES, failure[0]), default=None)


def _start(
    arguments: Sequence[str], plan: LaunchPlan, local_rank: int, port: int, complaint: Path, lifeline: int
) -> subprocess.Popen[bytes]:
    rank = plan.machine_rank * plan.processes + local_rank
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(plan.processes * plan.machines),
        "LOCAL_WORLD_SIZE": str(plan.processes),
        "MASTER_ADDR": plan.address,
        "MASTER_PORT": str(port),
        PARENT_PIPE: str(lifeline),
    }
    # Without a limit every process takes all cores and they slow each other down.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.processes)))
    # A session of its own: Ctrl-C at the terminal reaches the parent only, which forwards it once.
    command = [sys.executable, "-m", "ftkit", *arguments]
    if local_rank == 0:
        return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=(lifeline,))
    with complaint.open("wb") as stream:
        return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=(lifeline,), stderr=stream)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until one process has failed or all have ended."""
    while True:
        codes = [child.poll() for child in children]
        if any(codes) or None not in codes:
            return
        time.sleep(0.05)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for the rest, then kill: a failed process leaves the others in a collective that never completes.

    Returns:
        The exit codes, by rank, of those that ended by themselves.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    codes = {rank: child.returncode for rank, child in enumerate(children) if child.poll() is not None}
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
    return codes


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
