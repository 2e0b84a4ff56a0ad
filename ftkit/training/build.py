"""From a planned run to a loop that can start: weights, method, precision, packing, optimizer, state."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ftkit.console import Console, human_bytes, human_count, human_share
from ftkit.distributed import World
from ftkit.methods.base import Method, Report, report
from ftkit.methods.beside import notes_beside, prompt_beside, state_beside
from ftkit.methods.files import BaseIdentity, check_base, identify, read_identity
from ftkit.methods.soft_prompt import load_beside
from ftkit.methods.table import METHODS
from ftkit.models.architecture import describe
from ftkit.models.isolation import Isolation, choose_packing
from ftkit.models.load import choose_compute_dtype, load_weights
from ftkit.models.objective import Objective
from ftkit.models.precision import compute_in
from ftkit.models.soft_prompt import prompt_ids
from ftkit.models.tokenizer import untrained_tokens
from ftkit.recipe.schema import Recipe
from ftkit.runs import MetricsFile, recorded_base
from ftkit.training.budget import Budget
from ftkit.training.checkpoint import Checkpoint, load_optimizer, load_random
from ftkit.training.feed import Feed
from ftkit.training.loop import Loop
from ftkit.training.optim import make_optimizer
from ftkit.training.prepare import Prepared, apply_method, pad_id
from ftkit.training.result import result_name
from ftkit.training.saver import Saver
from ftkit.training.state import LoopState


@dataclass(frozen=True)
class Layout:
    """How examples share micro-batches."""

    isolation: Isolation
    """How documents are kept apart in one, which decides the attention function."""
    budget: Budget


@dataclass(frozen=True)
class Built:
    """A loop and what it was built from."""

    loop: Loop
    state: LoopState
    model: PreTrainedModel
    method: Method
    identity: BaseIdentity
    layout: Layout
    report: Report
    precision: str
    """The precision of each part, in words."""
    notes: tuple[str, ...]
    """What else the user should know."""

    def print(self, console: Console) -> None:
        """The header of a run: what trains, in which precision, how documents share a row."""
        r = self.report
        trains = f"{human_count(r.trainable_parameters)} of {human_count(r.total_parameters)} parameters"
        saved = human_bytes(r.saved_bytes)
        console.line(f"method     {self.method.name}: trains {trains} ({human_share(r.share)}), {saved} on disk")
        if r.places:
            console.line(f"places     {', '.join(r.places)}")
        console.line(f"precision  {self.precision}")
        console.line(f"packing    {self.layout.isolation.reason}")
        world = self.loop.world
        where = f"{world.size} processes" if world.size > 1 else "one process"
        console.line(f"device     {world.device}, {where}, {self.layout.budget}")
        for note in self.notes:
            console.line(f"note       {note}")


def build(
    prepared: Prepared,
    world: World,
    console: Console,
    *,
    layout: Layout,
    metrics: MetricsFile,
    run: Path,
    checkpoint: Checkpoint | None,
) -> Built:
    """Load the base, apply the method, wrap for the processes at hand and restore the state.

    Raises:
        UserError: targets that match nothing, a base that cannot be loaded, or whose weights are not those that the
            checkpoint was trained on.
    """
    recipe, plan, isolation = prepared.recipe, prepared.plan, layout.isolation
    method = METHODS[recipe.method.type]
    compute_dtype, reason = choose_compute_dtype(recipe.model.dtype, world.device)

    # 1. Weights and what trains of them. Every rank draws dropout of its own.
    identity = identify(prepared.base)
    if checkpoint is not None:
        if (trained_on := recorded_base(run)) is not None:
            check_base(checkpoint.path, trained_on, identity)
    elif prepared.init_from is not None:
        check_base(prepared.init_from, read_identity(prepared.init_from), identity)
    model = _model_with_method(prepared, method, compute_dtype, isolation, checkpoint)
    untrained = untrained_tokens(model, prepared.tokenizer, prepared.template.end_of_turn_ids)
    torch.manual_seed(recipe.seed + world.rank)
    counts = report(model, method, beside=state_beside(model, recipe.method))
    sharded = world.size > 1 and recipe.training.parallel == "fsdp"
    casts_to = None if sharded and method.name == "full" else compute_dtype
    set_for_training(model, checkpointing=layout.budget.checkpointing, compute_in_dtype=casts_to)

    # 2. The root module, on its device, for one process or many. A model that is to be sharded waits on the CPU, since
    # one device may not hold it; sharding moves it block by block.
    if not sharded:
        # transformers types its own `to` for quantized models only.
        nn.Module.to(model, world.device)
    objective = Objective(model, num_datasets=len(plan.dataset_names), packed_attention=isolation.rung == "ftkit")
    if sharded:
        # None: each weight in its own precision.
        param_dtype = compute_dtype if method.name == "full" else None
        root = world.shard(objective, describe(model).blocks, param_dtype=param_dtype)
    else:
        root = world.replicate(objective)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    # 3. Optimizer, the state of the checkpoint, and how the next ones are written.
    optimizer = make_optimizer(parameters, recipe.training, partial(_rate_factor, recipe))
    state = LoopState.fresh(len(plan.dataset_names))
    if checkpoint is not None:
        state = _restore(checkpoint, optimizer, parameters, world)
    save = Saver(prepared, world, console, metrics, run, method, model, identity, optimizer, parameters)

    pad, before = pad_id(prepared.tokenizer), prompt_ids(model)
    feed = Feed(plan, world, layout.budget.max_tokens, packed=isolation.packed, pad_id=pad, prompt_ids=before)
    loop = Loop(
        section=recipe.training,
        plan=plan,
        world=world,
        feed=feed,
        objective=root,
        parameters=parameters,
        optimizer=optimizer,
        metrics=metrics,
        console=console,
        save=save,
    )
    precision = _precision_in_words(counts, compute_dtype, reason)
    own = (*method.notes(model), *notes_beside(recipe.method))
    notes = (*own, *objective.notes, *untrained, *_notes_on_sharing(recipe, world))
    return Built(loop, state, model, method, identity, layout, counts, precision, notes)


def isolate(prepared: Prepared, device: torch.device) -> Isolation:
    """How documents can share a row of this model, by the recipe's `data.packing`.

    Raises:
        UserError: packing is required and not possible.
    """
    recipe = prepared.recipe
    return choose_packing(
        prepared.config, packing=recipe.data.packing, requested=recipe.model.attn_implementation, device=device
    )


def _model_with_method(
    prepared: Prepared,
    method: Method,
    compute_dtype: torch.dtype,
    isolation: Isolation,
    checkpoint: Checkpoint | None,
) -> PreTrainedModel:
    """The base with what trains of it: fresh from the recipe, or as the checkpoint holds it."""
    model = load_weights(
        prepared.base,
        dtype=torch.float32 if method.name == "full" else compute_dtype,
        attn_implementation=isolation.attn_implementation,
    )
    if checkpoint is None:
        apply_method(model, prepared)
    else:
        adapter = checkpoint.path / result_name(method)
        method.load(model, adapter)
        if (prompt := prompt_beside(adapter)) is not None:
            load_beside(model, prompt)
    return model


def set_for_training(model: PreTrainedModel, *, checkpointing: bool, compute_in_dtype: torch.dtype | None) -> None:
    """Casts where trained weights are used, and checkpointing of activations.

    Args:
        checkpointing: whether the backward pass computes each block's activations again.
        compute_in_dtype: None where every weight trains and is sharded: FSDP's own policy gathers them in the compute
            dtype.
    """
    if compute_in_dtype is not None:
        compute_in(model, compute_in_dtype)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    # Not used in training; transformers would refuse to save some that models ship. Ours is written beside.
    model.generation_config = GenerationConfig()


def _rate_factor(recipe: Recipe, name: str) -> float:
    """What the learning rate of a parameter is multiplied by."""
    return METHODS[recipe.method.type].learning_rate_factor(name, recipe.method)


def _restore(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    world: World,
) -> LoopState:
    """Optimizer and generators as the checkpoint holds them, and the loop's state of it."""
    load_optimizer(optimizer, parameters, checkpoint.path)
    load_random(checkpoint.path, world)
    return LoopState.from_json(checkpoint.state)


def _notes_on_sharing(recipe: Recipe, world: World) -> tuple[str, ...]:
    if world.size == 1 and recipe.training.parallel == "fsdp":
        return ("training.parallel: fsdp shards over several processes; this one holds everything itself",)
    return ()


def _precision_in_words(counts: Report, compute: torch.dtype, reason: str) -> str:
    parts = [
        f"{human_count(part.parameters)} {'trained' if part.trained else 'frozen'} in {part.name}"
        for part in counts.precision
    ]
    return f"{', '.join(parts)}; computes in {str(compute).removeprefix('torch.')} ({reason})"
