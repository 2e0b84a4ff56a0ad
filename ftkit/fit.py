"""A budget that fits: what `max_tokens_per_device: auto` and `gradient_checkpointing: auto` become on this machine.

From the traced step and the memory that is free, and on a GPU by trying. Neither changes the gradient: they say how a
global batch is cut, and what the backward pass computes again.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from ftkit.console import human_bytes
from ftkit.containers import free_in_containers
from ftkit.data.batches import collate
from ftkit.distributed import World
from ftkit.errors import OutOfMemoryError
from ftkit.estimate import Estimator, ModelEstimate, Place
from ftkit.models.isolation import Isolation
from ftkit.models.soft_prompt import prompt_ids
from ftkit.recipe.method_schema import LoraMethod
from ftkit.recipe.schema import Recipe
from ftkit.training.budget import Budget, accumulates, first_budget, fullest_batch, longest_document, smaller_budgets
from ftkit.training.build import Built, Layout
from ftkit.training.prepare import Prepared, PreparedModel, pad_id
from ftkit.training.trial import step_fits

USABLE = {"cpu": 0.9, "cuda": 0.95}
"""Share of the free memory that a run may be planned to fill."""
TRIED = 0.85
"""Share of what the step was planned to take that a change has to fit into, where that step ran out of memory."""
SHORTEST = 256
"""Tokens of `data.max_length` below which shortening is no advice."""


@dataclass(frozen=True)
class Fit:
    """Whether a run fits, and how."""

    estimate: ModelEstimate
    """With the budget that fits, or with the smallest one."""
    available: int
    """Bytes that one device has for it."""
    fits: bool

    @property
    def needed(self) -> int:
        """Bytes of one device."""
        return self.estimate.memory_bytes.total


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a run may fill on its device; of the CPU's each process has its share.

    A container's limit counts, and what it has used up to now.
    """
    if device.type == "cuda":
        return int(USABLE["cuda"] * torch.cuda.mem_get_info(device)[0])
    available = min([int(psutil.virtual_memory().available), *free_in_containers()])
    return int(USABLE["cpu"] * max(0, available) / processes)


def find_fit(estimator: Estimator, available: int, begin: Budget | None = None) -> Fit:
    """The largest budget that the recipe leaves open and whose step is expected to fit."""
    prepared = estimator.prepared
    first = begin or first_budget(prepared.recipe, estimator.place.device)
    fit = Fit(estimator.estimate(first), available, True)
    longest = prepared.recipe.data.max_length
    if isinstance(prepared, Prepared):
        longest = longest_document(prepared.plan, fit.estimate.virtual_tokens)
    rest = smaller_budgets(prepared.recipe, first, longest)
    hopeless = fit.estimate.memory_bytes.state > available
    while fit.needed > available:
        budget = None if hopeless else next(rest, None)
        if budget is None:
            return replace(fit, fits=False)
        fit = Fit(estimator.estimate(budget), available, True)
    return fit


# ----------------------------------------------------------------------------------------------- what would make it fit


def changes_that_fit(estimator: Estimator, available: int) -> list[str]:
    """What to write in the recipe so that a run that does not fit would, the cheapest first; each of them is enough."""
    found = []
    shorter = estimator.estimate().memory_bytes.state < available
    for words, prepared in _changes(estimator.prepared, shorter=shorter):
        other = replace(estimator, prepared=prepared)
        if find_fit(other, available).fits:
            found.append(words)
    processes = estimator.place.processes
    for more in (2, 4, 8, 16):
        if found or more <= processes:
            continue
        shared = _with(estimator.prepared, training={"parallel": "fsdp"})
        place = replace(estimator.place, processes=more)
        if find_fit(replace(estimator, prepared=shared, place=place), available).fits:
            found.append(f"training.parallel=fsdp on {more} such devices")
    return found


def _changes(prepared: PreparedModel, *, shorter: bool) -> Iterator[tuple[str, PreparedModel]]:
    """Words and the run with that change, from what costs time to what changes the result.

    Args:
        shorter: whether shorter documents may help.
    """
    recipe = prepared.recipe
    open_budget = {"max_tokens_per_device": "auto", "gradient_checkpointing": "auto"}
    if recipe.training.max_tokens_per_device != "auto":
        yield "training.max_tokens_per_device=auto", _with(prepared, training={"max_tokens_per_device": "auto"})
    if recipe.training.gradient_checkpointing is False:
        yield "training.gradient_checkpointing=auto", _with(prepared, training={"gradient_checkpointing": "auto"})
    can_quantize = find_spec("bitsandbytes") is not None and prepared.base.quantization is None
    if recipe.method.type != "full" and can_quantize:
        yield "model.quantization=nf4", _quantized(_with(prepared, training=open_budget))
    if recipe.method.type == "full":
        lora = _with(prepared, training=open_budget, method=LoraMethod(type="lora"))
        yield "method.type=lora", lora
        if can_quantize:
            yield "method.type=lora model.quantization=nf4", _quantized(lora)
    length = recipe.data.max_length
    if isinstance(prepared, Prepared):
        length = min(length, longest_document(prepared.plan))
    # Powers of two, since the numbers are for people.
    while shorter and (length := 2 ** (max(1, length - 1).bit_length() - 1)) >= SHORTEST:
        yield f"data.max_length={length}", _of_length(_with(prepared, training=open_budget), length)


def _with(prepared: PreparedModel, **sections: object) -> PreparedModel:
    recipe = prepared.recipe
    for name, value in sections.items():
        if isinstance(value, dict):
            value = getattr(recipe, name).model_copy(update=value)
        recipe = recipe.model_copy(update={name: value})
    return replace(prepared, recipe=recipe)


def _quantized(prepared: PreparedModel) -> PreparedModel:
    return replace(prepared, base=replace(prepared.base, quantization="nf4"))


def _of_length(prepared: PreparedModel, length: int) -> PreparedModel:
    """Without its plan, whose documents would be cut: full ones take their place."""
    shorter = _with(prepared, data={"max_length": length})
    kept = ("recipe", "base", "config", "new_token_ids", "init_from", "prompt_text_ids")
    return PreparedModel(**{name: getattr(shorter, name) for name in kept})


# ------------------------------------------------------------------------------------------------------ before a run


def choose_layout(prepared: Prepared, world: World, isolation: Isolation, begin: Budget | None = None) -> Layout:
    """How micro-batches are cut on this machine, so that the fullest one is expected to fit. A collective.

    Args:
        begin: what the run began with, where one goes on.

    Raises:
        OutOfMemoryError: none does; it names the cheapest changes with which one would.
    """
    place = replace(Place.here(prepared, world.size), device=world.device)
    estimator = Estimator(prepared, place, isolation)
    # Processes on other machines have their own memory.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = min(world.gather(free_memory(world.device, here)))

    def choose() -> Budget:
        fit = find_fit(estimator, available, begin if _may_begin_with(prepared.recipe, begin) else None)
        if not fit.fits:
            raise too_large(estimator, fit)
        return fit.estimate.micro_batch

    return Layout(isolation, world.on_main(choose))


def _may_begin_with(recipe: Recipe, begin: Budget | None) -> bool:
    """Whether the recipe leaves open what the run began with, or says the same."""
    asked = recipe.training
    return begin is not None and (
        asked.max_tokens_per_device in ("auto", begin.max_tokens)
        and asked.gradient_checkpointing in ("auto", begin.checkpointing)
    )


def too_large(estimator: Estimator, fit: Fit) -> OutOfMemoryError:
    """The error for a run that cannot fit."""
    memory = fit.estimate.memory_bytes
    weights = f"weights {human_bytes(memory.weights)}"
    what = (
        f"a step of {fit.estimate.micro_batch} takes {human_bytes(memory.total)} ({weights}, "
        f"gradients and optimizer {human_bytes(memory.gradients + memory.optimizer)}, the rest activations), "
        f"and {human_bytes(fit.available)} may be filled"
    )
    return OutOfMemoryError(what, how=_advice(estimator, fit.available))


def _ran_out(estimator: Estimator, budget: Budget) -> OutOfMemoryError:
    """The error for a step that was tried: what it was planned to take is more than there is, by an unknown part."""
    planned = estimator.estimate(budget).memory_bytes.total
    what = f"a trial step of {budget} does not fit into the memory of {estimator.place.device}"
    return OutOfMemoryError(what, how=_advice(estimator, int(TRIED * planned)))


def _advice(estimator: Estimator, available: int) -> str:
    changes = changes_that_fit(estimator, available)
    return f"it fits with {', or with '.join(changes[:3])}" if changes else "choose a smaller base_model"


def settle_by_trial(built: Built, prepared: Prepared, world: World) -> Built:
    """Try the fullest micro-batch on the GPU, and cut smaller ones until it runs. A collective.

    The estimate does not know the workspaces of kernels, nor how memory falls to pieces. On a CPU, where the system
    would kill the process, and under FSDP, where one process that fails leaves the others waiting, it has to do.

    Raises:
        OutOfMemoryError: nothing that the recipe leaves open runs.
    """
    if not _can_try(prepared, world):
        return built
    feed, budget = built.loop.feed, built.layout.budget
    before = prompt_ids(built.model)
    rest = smaller_budgets(prepared.recipe, budget, longest_document(prepared.plan, len(before)))
    while True:
        dealt: dict[str, Any] = {"world_size": world.size, "max_tokens": budget.max_tokens}
        dealt |= {"packed": feed.packed, "before_each": len(before)}
        examples = fullest_batch(prepared.plan, **dealt)
        batch = collate(examples, packed=feed.packed, pad_id=pad_id(prepared.tokenizer), prompt_ids=before)
        adds = world.size > 1 or accumulates(prepared.plan, **dealt)
        parameters = built.loop.parameters.values()
        known = [parameter for parameter in parameters if parameter in built.loop.optimizer.state]
        on_device = batch.to(world.device)
        if step_fits(built.loop.objective, on_device, parameters, world, accumulates=adds, with_moments=known):
            break
        smaller = next(rest, None)
        if smaller is None:
            place = replace(Place.here(prepared, world.size), device=world.device)
            raise _ran_out(Estimator(prepared, place, built.layout.isolation), budget)
        if smaller.checkpointing and not budget.checkpointing:
            built.model.activation_checkpointing_enable({"use_reentrant": False})
        budget = smaller
    loop = replace(built.loop, feed=replace(feed, max_tokens=budget.max_tokens))
    return replace(built, loop=loop, layout=Layout(built.layout.isolation, budget))


def _can_try(prepared: Prepared, world: World) -> bool:
    sharded = world.size > 1 and prepared.recipe.training.parallel == "fsdp"
    return world.device.type == "cuda" and not sharded
