"""Random encoded examples for tests of models."""

from collections.abc import Sequence

import numpy as np

from ftkit.data.types import IGNORE, EncodedExample, Example

VOCABULARY = 256


def random_examples(lengths: Sequence[int], *, seed: int = 0, num_datasets: int = 2) -> list[EncodedExample]:
    """One example a length; about half of its tokens are targets, and those of every fourth example all masked."""
    generator = np.random.default_rng(seed)
    return [
        _example(generator, length, index % num_datasets, masked=index % 4 == 3) for index, length in enumerate(lengths)
    ]


def _example(generator: np.random.Generator, length: int, dataset: int, *, masked: bool) -> EncodedExample:
    ids = generator.integers(0, VOCABULARY, length).astype(np.int32)
    targets = (generator.random(length) < 0.5) & (np.arange(length) > 0) & (not masked)
    labels = np.where(targets, ids, IGNORE).astype(np.int32)
    return EncodedExample(Example(ids, labels), dataset=dataset, row=0)
