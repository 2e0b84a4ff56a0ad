"""Work on many parts of the data, in as many processes as there are cores."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from ftkit.errors import ProcessLostError

Part = TypeVar("Part")
Result = TypeVar("Result")

MIN_PARALLEL = 20_000
"""Rows: with fewer, other processes would take longer to start than to work."""


def work(worker: Callable[[Part], Result], parts: Iterable[Part], *, here: int) -> Iterator[Result]:
    """`worker(part)` for each part, in order.

    Args:
        worker: can be pickled; goes to each process once.
        parts: taken as they are needed: memory does not grow with their number.
        here: so many of the first parts are worked on in this process. Others start if there are more.

    Raises:
        ProcessLostError: a process was killed.
    """
    rest = iter(parts)
    if cores() == 1:
        yield from map(worker, rest)
        return
    yield from map(worker, islice(rest, here))
    for part in rest:
        yield from _work_elsewhere(worker, part, rest)


def _work_elsewhere(worker: Callable[[Part], Result], first: Part, rest: Iterator[Part]) -> Iterator[Result]:
    workers = cores()
    # Not forked from here: this process has threads, of torch and of the tokenizers, which a fork would break. The
    # server has none of these. It imports what its children need, once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "ftkit.data.encoding", "transformers.tokenization_utils_tokenizers"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(worker,))
    try:
        ahead: list[Future[Any]] = [pool.submit(_work, first)]
        for part in rest:
            # At most so many parts are under way or wait to be taken.
            if len(ahead) >= 4 * workers:
                yield ahead.pop(0).result()
            ahead.append(pool.submit(_work, part))
        while ahead:
            yield ahead.pop(0).result()
    except BrokenProcessPool:
        what = "a process that prepared data was killed, perhaps because the machine has too little memory"
        raise ProcessLostError(what, how="run it again; what is prepared already is not prepared anew") from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: Callable[[Any], Any] | None = None


def _start(worker: Callable[[Any], Any]) -> None:
    global _worker
    # One process a core: the tokenizer's own threads would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches every process of the terminal: the one that started this one sees to the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = worker
    # What was imported lives as long as the process: the collector need not go through it again and again.
    gc.freeze()


def _work(part: Any) -> Any:
    assert _worker is not None, "started by the pool"
    return _worker(part)
