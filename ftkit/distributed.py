"""Ranks, sums, barriers, replicas and shards: the only module that imports accelerate.

One process or many look alike from outside: `World.sum` of one process is the value itself. Starting processes is
`launch.py`'s part.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ftkit.errors import FailedElsewhere, FtkitError

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a silent rank; longer than any evaluation or save that only one rank does."""


class World:
    """The processes of one run, seen from one of them."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        """`on_cpu`: compute there, whatever else the machine has."""
        # No mixed precision of accelerate's: ftkit casts where weights are used (models/precision.py), autocast would
        # cast a second time. Its accumulation stays at 1, since `backward` divides by it.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._accelerator = Accelerator(
            # Without being told so, accelerate would take several processes on a CPU for that many runs.
            cpu=on_cpu or (processes > 1 and not torch.cuda.is_available()),
            mixed_precision="no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        assert self.size == processes, f"{self.size} processes where {processes} were started"

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return int(self._accelerator.process_index)

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and speaks to the terminal."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    def sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over all processes; the same on each of them."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag), device=self.device)) > 0)

    def broadcast(self, value: Any) -> Any:
        """The main process's value (any picklable object) on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """The value of `function`, called by the main process only, on every process.

        Raises:
            BaseException: what `function` raised, whatever it is, on the main process, which reports it.
            FailedElsewhere: on the others, which would wait for the value forever.
        """
        if self.size == 1:
            return function()
        if not self.is_main:
            value, exit_code = self.broadcast(None)
            if exit_code is not None:
                raise FailedElsewhere(exit_code)
            return value
        try:
            value = function()
        except BaseException as error:
            # Only the code travels: not every error can be pickled, and one process is enough to print it.
            self.broadcast((None, error.exit_code if isinstance(error, FtkitError) else FtkitError.exit_code))
            raise
        return self.broadcast((value, None))[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in order of rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def replicate(self, module: nn.Module) -> nn.Module:
        """Wrap the root module for DDP: every process holds all weights and gradients are averaged."""
        if self.size == 1:
            return module
        devices = None if self.device.type == "cpu" else [self.device]
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def shard(self, module: nn.Module, blocks: Sequence[nn.Module], *, param_dtype: torch.dtype | None) -> nn.Module:
        """Shard the root module and each decoder block over all processes (FSDP2), in place.

        `param_dtype` is the precision that weights are gathered in; None keeps each weight's own. Gradients are
        reduced in float32.
        """
        mesh = init_device_mesh(self.device.type, (self.size,))
        reduce_dtype = None if param_dtype is None else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        return module

    @contextmanager
    def gradient_sync(self, module: nn.Module, sync: bool) -> Iterator[None]:
        """Exchange gradients in the backward pass inside this context only if `sync`: in the last micro-batch."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sync)
            yield
        elif isinstance(module, DistributedDataParallel) and not sync:
            with module.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar) to the parameters' `.grad`."""
        self._accelerator.backward(loss)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
        """Global 2-norm of all gradients; scales them down to `max_norm` where that is given and exceeded.

        A norm that is not finite is returned as it is, and the gradients are left alone.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
        norm = float(whole(total))
        if max_norm is not None and norm > max_norm and norm != float("inf"):
            nn.utils.clip_grads_with_norm_(trained, max_norm, total if not isinstance(total, DTensor) else whole(total))
        return norm

    def close(self) -> None:
        """Leave the process group, so that no warning is printed at exit."""
        self._accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard (a collective: every process must call it), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, a full tensor, in the device, and the shards, of `like`."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def tracker_class(name: str) -> type[Any]:
    """accelerate's class of an experiment tracker; only its `start` imports the package behind it."""
    return LOGGER_TYPE_TO_CLASS[name]


class SignalWatch:
    """Remembers SIGINT and SIGTERM, so that the loop can end its step and save; a second signal kills at once."""

    def __init__(self, notice: Callable[[], None] = lambda: None) -> None:
        """`notice` is called once, when the first signal comes: a step may take minutes yet."""
        self.received: int | None = None
        self._notice = notice
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalWatch":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        self._notice()
