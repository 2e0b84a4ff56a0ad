"""Which tensors live when: the bytes of every storage from the operation that made it to its release.

`LiveTensors` sees every operation of torch, those of the backward pass too, and is told by Python when a storage is
released. What an operation allocates for itself and frees before it ends (workspaces of a matrix product) it does not
see; `torch.cuda`'s own counters, which do, are printed beside it where there is a GPU.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(eq=False)
class Life:
    """One storage."""

    bytes: int
    shape: tuple[int, ...]
    """Of the first tensor that showed it."""
    operation: str
    """What made it; "" for what was there before."""
    born: int
    """Number of the event, counted from 0, at which it came; 0 for what was there before."""
    died: int | None = None
    """Likewise at which it went; None while it lives."""
    key: int = field(default=0, repr=False)

    def lives_at(self, event: int) -> bool:
        """Whether it is there once `event` has happened."""
        return self.born <= event and (self.died is None or event < self.died)


class LiveTensors(TorchDispatchMode):
    """Inside this context, births and deaths of storages are numbered events.

    Args:
        known: tensors that are there already. Others that were made before are taken for new when an operation first
            returns them or a view of them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.lives: list[Life] = []
        self.marks: list[tuple[str, int]] = []
        """(name, last event before it), in order."""
        self._now = 0
        self._living: dict[int, Life] = {}
        for tensor in known:
            self._see(tensor, "")

    @property
    def now(self) -> int:
        """Number of the last event."""
        return self._now

    def mark(self, name: str) -> None:
        """Note that the moment `name` is now."""
        self.marks.append((name, self._now))

    def life_of(self, tensor: Tensor) -> Life | None:
        """The living storage of `tensor`; None where it was never seen."""
        return self._living.get(id(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it returned."""
        returned = func(*args, **(kwargs or {}))
        for value in tree_iter(returned):
            if isinstance(value, Tensor):
                self._see(value, str(func).removeprefix("aten.").partition(".")[0])
        return returned

    def live_bytes(self, counts: Callable[[Life], bool] = lambda _: True) -> list[int]:
        """Bytes that are there after each event, of the lives that `counts`."""
        changes = [0] * (self._now + 1)
        for life in filter(counts, self.lives):
            changes[life.born] += life.bytes
            if life.died is not None:
                changes[life.died] -= life.bytes
        total, series = 0, []
        for change in changes:
            total += change
            series.append(total)
        return series

    def between(self, begin: str, end: str) -> range:
        """The events from one mark to another: the first is the state at `begin`."""
        places = dict(self.marks)
        return range(places[begin], places[end] + 1)

    def peak(self, events: Iterable[int]) -> int:
        """The event among them after which most bytes are there, the first of several."""
        series = self.live_bytes()
        return max(events, key=lambda event: (series[event], -event))

    def _see(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        # An empty tensor has no memory; a key is a storage's own while it lives.
        if key in self._living or storage.nbytes() == 0:
            return
        if operation:
            self._now += 1
        life = Life(storage.nbytes(), tuple(tensor.shape), operation, self._now, key=key)
        self._living[key] = life
        self.lives.append(life)
        # The mode outlives no measurement: a storage that does must not keep its lives in memory.
        weakref.finalize(storage, _die, weakref.ref(self), life).atexit = False

    def died(self, life: Life) -> None:
        """A storage was released."""
        self._now += 1
        life.died = self._now
        del self._living[life.key]


def _die(mode: "weakref.ref[LiveTensors]", life: Life) -> None:
    if (live := mode()) is not None:
        live.died(life)


def describe_lives(lives: Iterable[Life], *, minimum: int) -> str:
    """ "2 x mm [512, 64], ..." of lives with `minimum` bytes at least, the largest first."""
    counts = Counter(
        (life.bytes, f"{life.operation or 'there before'} {list(life.shape)}")
        for life in lives
        if life.bytes >= minimum
    )
    ordered = sorted(counts.items(), key=lambda item: (-item[0][0] * item[1], item[0][1]))
    return ", ".join(f"{number} x {name}" for (_, name), number in ordered)


@dataclass
class Saved:
    """What autograd keeps for a backward pass, each storage once."""

    bytes: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)


@contextmanager
def saved_for_backward(*, leaving_out: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Count what is saved inside, but for the storages of `leaving_out` (parameters)."""
    seen, saved = {id(tensor.untyped_storage()) for tensor in leaving_out}, Saved()
    held: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            # Held, so that no other storage takes its place in memory and its id.
            held.append(storage)
            seen.add(id(storage))
            saved.bytes += storage.nbytes()
            saved.shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
