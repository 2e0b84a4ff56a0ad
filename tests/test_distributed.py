"""What two processes tell each other."""

import os
import signal
import socket
import threading

import pytest
import torch.multiprocessing as mp

from ftkit.distributed import SignalWatch, World
from ftkit.errors import FailedElsewhere, UserError


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("held by a lock")
        self.lock = threading.Lock()


def failing(error):
    def function():
        raise error

    return function


def worker(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    world = World()
    for error, code in [
        (UserError("taken"), 2),
        (OSError(5, "broken"), 1),
        (Unpicklable(), 1),
        (KeyboardInterrupt(), 1),
    ]:
        with pytest.raises(type(error) if rank == 0 else FailedElsewhere) as caught:
            world.on_main(failing(error))
        assert caught.value is error if rank == 0 else caught.value.exit_code == code
    # Nobody is left behind in the exchange of an error.
    assert world.on_main(lambda: f"of rank {rank}") == "of rank 0"
    world.close()
    os._exit(0)


@pytest.mark.slow
def test_every_error_of_the_main_process_reaches_the_others():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)


def test_the_first_signal_is_noticed_at_once_and_remembered():
    notices = []
    with SignalWatch(lambda: notices.append("seen")) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert (signals.received, notices) == (signal.SIGTERM, ["seen"])
