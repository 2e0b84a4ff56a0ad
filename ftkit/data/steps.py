"""The global batches of a run, as indices of examples."""

from collections.abc import Sequence

import numpy as np

from ftkit.data.indexed import Indexed


class Steps(Indexed[list[int]]):
    """The global batch of each optimizer step: indices of examples."""

    def __init__(self, order: np.ndarray, bounds: Sequence[int] | np.ndarray) -> None:
        """`order`: int64, the examples of all steps; step s has order[bounds[s] : bounds[s + 1]]."""
        self.order, self.bounds = order, np.asarray(bounds, np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def at(self, index: int) -> list[int]:
        """The batch of step `index`, from 0."""
        indices: list[int] = self.order[self.bounds[index] : self.bounds[index + 1]].tolist()
        return indices

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each step's examples of `values` [examples]; int64 [steps]."""
        return np.add.reduceat(values[self.order].astype(np.int64), self.bounds[:-1])
