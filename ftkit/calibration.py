"""How long a run takes on this machine: measured on a few layers of the model at full width, with random weights."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ftkit.data.batches import Batch, collate
from ftkit.estimate import Estimator, ModelEstimate, model_on_meta
from ftkit.fit import free_memory
from ftkit.models.attention import NAME
from ftkit.models.objective import Objective
from ftkit.models.small_copy import shallow
from ftkit.models.soft_prompt import prompt_ids
from ftkit.recipe.schema import Recipe
from ftkit.training.budget import fullest_batch
from ftkit.training.build import set_for_training
from ftkit.training.optim import make_optimizer
from ftkit.training.prepare import Prepared, pad_id
from ftkit.training.traced import trace_step

SECONDS, TOKENS = 3.0, (128, 4096)
"""Time that is measured for, and the tokens of a micro-batch, at least and at most."""
ON_CPU = 2.5e11
"""Operations of one step on a CPU, so that it takes seconds on the slowest."""
SHARE = 4
"""The copy's weights may take one in so many bytes of the memory that is free."""


def seconds_of(prepared: Prepared, estimator: Estimator, model: ModelEstimate, flops: int | None) -> float | None:
    """About how long the run's steps and evaluations take here, start and saving aside.

    The step of a shallow copy is timed; the rest of the model is taken to be as fast for each operation.

    Args:
        model: what the estimator found for the whole model.
        flops: of the whole run; None where they are not known.

    Returns:
        Seconds, or None where the shallow copy cannot be built, traced or run.
    """
    if flops is None:
        return None
    try:
        per_second, of_optimizer = _measure(prepared, estimator, model)
    # Any model's code may fail in any way on a configuration that was cut; the plan is good without.
    except Exception:
        return None
    steps = of_optimizer * model.trainable_parameters * len(prepared.plan.steps)
    # On a CPU the processes share the cores, all of which were timed.
    together = estimator.place.processes if estimator.place.device.type == "cuda" else 1
    return flops / per_second / together + steps


def _measure(prepared: Prepared, estimator: Estimator, model: ModelEstimate) -> tuple[float, float]:
    """Operations a second of forward and backward; seconds of the optimizer for each trained parameter."""
    place, isolation = estimator.place, estimator.isolation
    assert isolation is not None, "the estimator has estimated"
    assert estimator.head is not None, "likewise"
    cut = replace(prepared, config=shallow(prepared.config), init_from=None, recipe=_from_the_start(prepared))
    packed_attention = isolation.attn_implementation == NAME

    few = model_on_meta(cut, place.compute_dtype, isolation.attn_implementation)
    set_for_training(few, checkpointing=model.micro_batch.checkpointing, compute_in_dtype=place.compute_dtype)
    if 4 * few.num_parameters() * SHARE > free_memory(place.device):
        raise MemoryError("a few layers are too large to be timed")
    batch = _batch(cut, estimator, model, few)
    traced = trace_step(few, batch.to("meta"), head=estimator.head, packed_attention=packed_attention)
    _materialise(few, place.device)
    batch = batch.to(place.device)
    objective = Objective(few, num_datasets=1, packed_attention=packed_attention, head=estimator.head).train()

    def step() -> None:
        objective(batch).loss.backward()
        if place.device.type == "cuda":
            torch.cuda.synchronize()

    seconds = _median(step)
    trained = {name: p for name, p in few.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, prepared.recipe.training, lambda _: 1.0)
    of_optimizer = _median(lambda: optimizer.step() and None) / sum(p.numel() for p in trained.values())
    lengths = batch.cu_seq_lens.diff() if batch.cu_seq_lens is not None else torch.tensor(batch.input_ids.shape[1:])
    pairs = float((lengths.double() ** 2).sum()) / 2 * (1 if batch.cu_seq_lens is not None else len(batch.input_ids))
    flops = traced.flops_per_token * batch.input_ids.numel() + traced.flops_per_pair * pairs
    return (flops + traced.flops_per_target * len(batch.target_ids)) / seconds, of_optimizer


def _batch(prepared: Prepared, estimator: Estimator, model: ModelEstimate, few: PreTrainedModel) -> Batch:
    """The plan's fullest micro-batch, as far as it can be timed in seconds, with tokens that the copy has."""
    assert estimator.isolation is not None
    packed, prompt = estimator.isolation.packed, prompt_ids(few)
    vocabulary = few.config.get_text_config(decoder=True).vocab_size
    least, most = TOKENS
    if estimator.place.device.type == "cpu":
        most = min(most, max(least, int(ON_CPU / (6 * few.num_parameters()))))
    examples = fullest_batch(
        prepared.plan,
        world_size=estimator.place.processes,
        max_tokens=min(most, model.micro_batch.max_tokens),
        packed=packed,
        before_each=len(prompt),
    )
    batch = collate(examples, packed=packed, pad_id=pad_id(prepared.tokenizer), prompt_ids=prompt)
    batch.input_ids[batch.input_ids >= vocabulary] %= vocabulary
    batch.target_ids %= vocabulary
    batch.target_datasets.zero_()
    return batch


def _from_the_start(prepared: Prepared) -> Recipe:
    recipe = prepared.recipe
    if recipe.method.type == "full":
        return recipe
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"init_from": None})})


@torch.no_grad()
def _materialise(model: nn.Module, device: torch.device) -> None:
    """Give meta tensors memory and small random numbers, of which nothing becomes infinite."""
    model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.normal_(0.0, 0.02)
        else:
            parameter.zero_()
    for buffer in model.buffers():
        buffer.fill_(1)


def _median(run: Callable[[], None]) -> float:
    """Seconds of one call, the first aside."""
    times: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(times) < 2 or time.perf_counter() < until:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
