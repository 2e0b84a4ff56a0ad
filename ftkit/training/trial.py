"""One step that is made only to see whether it fits into a GPU, and leaves everything as it was."""

import re
from collections.abc import Collection, Iterable

import torch
from torch import nn

from ftkit.data.batches import Batch
from ftkit.distributed import World

_OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED")
MOMENTS = 2
"""float32 tensors that AdamW keeps of each trained parameter."""


def step_fits(
    root: nn.Module,
    batch: Batch,
    parameters: Iterable[nn.Parameter],
    world: World,
    *,
    accumulates: bool,
    with_moments: Collection[nn.Parameter] = (),
) -> bool:
    """Whether a micro-batch can be run beside the optimizer's state on every process. A collective.

    Parameters `with_moments` have the optimizer's state already, as in a run that goes on; for the others it is made.
    With `accumulates` the batch is run twice, since the second one of a step adds to the gradients of the first.

    Forward and backward without the optimizer's step or a synchronisation; gradients and random state are as before
    afterwards, but for those that a parameter had: none may be waiting.
    """
    trained = list(parameters)
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        without = [parameter for parameter in trained if parameter not in set(with_moments)]
        failed = world.any(not _runs(root.train(), batch, without, world, times=1 + accumulates))
    for parameter in trained:
        parameter.grad = None
    if devices:
        # What the allocator keeps of the larger attempt is in pieces of its sizes.
        torch.cuda.empty_cache()
    return not failed


def _runs(root: nn.Module, batch: Batch, without: list[nn.Parameter], world: World, *, times: int) -> bool:
    """Without the error, whose traceback would keep every tensor of the attempt."""
    try:
        # They stay from the first step on.
        state = [torch.empty_like(p, dtype=torch.float32) for p in without for _ in range(MOMENTS)]
        with world.gradient_sync(root, sync=False):
            for _ in range(times):
                root(batch).loss.backward()
        del state
    except RuntimeError as error:
        # Libraries beside torch's allocator have words of their own for it.
        if not isinstance(error, torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        return False
    return True
