"""Sequences that are looked up item by item."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item", covariant=True)


class Indexed(Sequence[Item]):
    """A sequence that only has to say how long it is and what stands at a place; slices are lists."""

    @abstractmethod
    def at(self, index: int) -> Item:
        """The item at `index`, which is in range."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.at(place) for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.at(index)
