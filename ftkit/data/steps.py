"""The global batches of a run, as indices of examples."""

from collections.abc import Sequence
from typing import overload

import numpy as np


class Steps(Sequence[list[int]]):
    """The global batch of each optimizer step: indices of examples."""

    def __init__(self, order: np.ndarray, bounds: Sequence[int] | np.ndarray) -> None:
        """`order`: int64, the examples of all steps; step s has order[bounds[s] : bounds[s + 1]]."""
        self.order, self.bounds = order, np.asarray(bounds, np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[step] for step in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        indices: list[int] = self.order[self.bounds[index] : self.bounds[index + 1]].tolist()
        return indices

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each step's examples of `values` [examples]; int64 [steps]."""
        return np.add.reduceat(values[self.order].astype(np.int64), self.bounds[:-1])
