"""From a planned run to a loop that can start: weights, method, precision, packing, optimizer, state."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ftkit.console import Console, human_bytes, human_count
from ftkit.distributed import World, whole
from ftkit.methods.base import Method, Report, report
from ftkit.methods.files import BaseIdentity
from ftkit.methods.table import METHODS
from ftkit.models.architecture import describe
from ftkit.models.isolation import Isolation, choose_packing
from ftkit.models.load import choose_compute_dtype, fingerprint, load_weights
from ftkit.models.objective import Objective
from ftkit.models.precision import compute_in
from ftkit.recipe.schema import Recipe
from ftkit.runs import CHECKPOINTS, MetricsFile
from ftkit.training.checkpoint import (
    Checkpoint,
    checkpoint_name,
    load_optimizer,
    load_random,
    optimizer_tensors,
    random_tensors,
    rotate,
    write_checkpoint,
)
from ftkit.training.loop import Loop
from ftkit.training.optim import make_optimizer
from ftkit.training.prepare import Prepared, pad_id
from ftkit.training.result import result_name, write_weights
from ftkit.training.state import LoopState

TOKENS_ON_GPU, TOKENS_ON_CPU = 8192, 2048
"""`max_tokens_per_device: auto`, where `max_length` is not larger."""


@dataclass(frozen=True)
class Built:
    """A loop and what it was built from."""

    loop: Loop
    state: LoopState
    model: PreTrainedModel
    method: Method
    identity: BaseIdentity
    isolation: Isolation
    report: Report
    precision: str
    """The precision of each part, in words."""
    notes: tuple[str, ...]
    """What else the user should know."""

    def print(self, console: Console) -> None:
        """The header of a run: what trains, in which precision, how documents share a row."""
        r = self.report
        console.line(
            f"method     {self.method.name}: trains {human_count(r.trainable_parameters)} of "
            f"{human_count(r.total_parameters)} parameters ({100 * r.share:.2f}%), {human_bytes(r.saved_bytes)} on disk"
        )
        console.line(f"precision  {self.precision}")
        console.line(f"packing    {self.isolation.reason}")
        world = self.loop.world
        where = f"{world.size} processes" if world.size > 1 else "one process"
        console.line(f"device     {world.device}, {where}, {human_count(self.loop.max_tokens)} tokens a micro-batch")
        for note in self.notes:
            console.line(f"note       {note}")


def build(
    prepared: Prepared,
    world: World,
    console: Console,
    *,
    metrics: MetricsFile,
    run: Path,
    checkpoint: Checkpoint | None,
) -> Built:
    """Load the base, apply the method, prove isolation, wrap for the processes at hand and restore the state.

    Raises:
        UserError: targets that match nothing, packing required but not possible, a base that cannot be loaded.
    """
    recipe, plan = prepared.recipe, prepared.plan
    method = METHODS[recipe.method.type]
    sharded = world.size > 1 and recipe.training.parallel == "fsdp"
    compute_dtype, reason = choose_compute_dtype(recipe.model.dtype, world.device)
    storage_dtype = torch.float32 if method.name == "full" else compute_dtype

    # 1. How documents share a row, which decides the attention function.
    isolation = choose_packing(prepared.config, packing=recipe.data.packing, requested=recipe.model.attn_implementation)

    # 2. Weights and what trains of them. Every rank draws dropout of its own.
    model = load_weights(prepared.base, dtype=storage_dtype, attn_implementation=isolation.attn_implementation)
    identity = BaseIdentity(
        str(prepared.base.path or prepared.base.repo_id), prepared.base.revision, fingerprint(prepared.base)
    )
    if checkpoint is None:
        method.apply(model, recipe.method, seed=recipe.seed)
    else:
        method.load(model, checkpoint.path / result_name(method))
    torch.manual_seed(recipe.seed + world.rank)
    counts = report(model)
    if not (sharded and method.name == "full"):
        # Where every weight trains and is sharded, FSDP's own policy gathers them in the compute dtype.
        compute_in(model, compute_dtype)
    if recipe.training.gradient_checkpointing is True:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    # Not used in training; transformers would refuse to save some that models ship. Ours is written beside.
    model.generation_config = GenerationConfig()

    # 3. The root module, on its device, for one process or many.
    objective = Objective(model, num_datasets=len(plan.dataset_names), packed_attention=isolation.rung == "ftkit")
    objective.to(world.device)
    prepared_module: nn.Module
    if sharded:
        blocks = describe(model).blocks
        param_dtype = compute_dtype if method.name == "full" else None
        prepared_module = world.shard(objective, blocks, param_dtype=param_dtype)
    else:
        prepared_module = world.replicate(objective)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    # 4. Optimizer, and the state of the checkpoint.
    optimizer = make_optimizer(parameters, recipe.training)
    state = LoopState.fresh(len(plan.dataset_names))
    if checkpoint is not None:
        state = LoopState.from_json(checkpoint.state)
        load_optimizer(optimizer, parameters, checkpoint.path)
        load_random(checkpoint.path, world)

    def save(loop_state: LoopState) -> None:
        loop_state.metrics_lines = world.broadcast(metrics.lines)
        weights = {name: tensor.to("cpu") for name, tensor in method.trained_state(model, gather=whole).items()}
        moments, random = optimizer_tensors(optimizer, parameters), random_tensors(world)
        world.on_main(lambda: _write(weights, moments, random, loop_state))

    def _write(
        weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], random: Mapping[str, Tensor], s: LoopState
    ) -> None:
        directory = run / CHECKPOINTS
        path = write_checkpoint(
            directory,
            s.step,
            write_weights=lambda staging: write_weights(staging, model, method, prepared, identity, weights),
            optimizer=moments,
            random=random,
            state=s.to_json() | {"plan": plan.fingerprint},
        )
        best = directory / checkpoint_name(s.best_step) if s.best_step is not None else None
        rotate(directory, keep=recipe.training.save_total_limit, best=best)
        console.debug(f"checkpoint {path}")

    loop = Loop(
        section=recipe.training,
        plan=plan,
        world=world,
        objective=prepared_module,
        parameters=parameters,
        optimizer=optimizer,
        max_tokens=tokens_per_device(recipe, world.device),
        packed=isolation.packed,
        pad_id=pad_id(prepared.tokenizer),
        metrics=metrics,
        console=console,
        save=save,
    )
    precision = _precision_in_words(counts, compute_dtype, reason)
    return Built(loop, state, model, method, identity, isolation, counts, precision, objective.notes)


def tokens_per_device(recipe: Recipe, device: torch.device) -> int:
    """The token budget of a micro-batch."""
    asked = recipe.training.max_tokens_per_device
    if asked == "auto":
        return max(recipe.data.max_length, TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_GPU)
    return asked


def _precision_in_words(counts: Report, compute: torch.dtype, reason: str) -> str:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    parts = [
        f"{human_count(part.parameters)} {'trained' if part.trained else 'frozen'} in {short(part.dtype)}"
        for part in counts.precision
    ]
    return f"{', '.join(parts)}; computes in {short(compute)} ({reason})"
