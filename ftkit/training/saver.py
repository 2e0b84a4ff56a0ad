"""What the loop calls to save: everything that changes in a run, gathered from all processes and written by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.console import Console
from ftkit.distributed import World, whole
from ftkit.methods.base import Method
from ftkit.methods.beside import state_beside
from ftkit.methods.files import BaseIdentity
from ftkit.runs import CHECKPOINTS, MetricsFile
from ftkit.training.checkpoint import checkpoint_name, optimizer_tensors, random_tensors, rotate, write_checkpoint
from ftkit.training.prepare import Prepared
from ftkit.training.result import write_weights
from ftkit.training.state import LoopState


@dataclass(frozen=True)
class Saver:
    """Writes a checkpoint of the run that it was made for."""

    prepared: Prepared
    world: World
    console: Console
    metrics: MetricsFile
    run: Path
    method: Method
    model: PreTrainedModel
    """The model inside the root module, sharded where that is."""
    identity: BaseIdentity
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]

    def __call__(self, state: LoopState) -> None:
        """Write `state` with weights, optimizer and generators. A collective: every process must call it."""
        state.metrics_lines = self.world.broadcast(self.metrics.lines)
        weights = self.method.trained_state(self.model, gather=self._for_writer)
        prompt = state_beside(self.model, self.prepared.recipe.method, gather=self._for_writer)
        moments = optimizer_tensors(self.optimizer, self.parameters, keep=self.world.is_main)
        random = random_tensors(self.world)
        self.world.on_main(lambda: self._write(state, weights, prompt, moments, random))

    def _for_writer(self, shard: Tensor) -> Tensor:
        """The whole tensor on the CPU of the process that writes: no device and no other process holds all of them."""
        tensor = whole(shard)
        return tensor.to("cpu") if self.world.is_main else tensor.new_empty(0)

    def _write(
        self,
        state: LoopState,
        weights: Mapping[str, Tensor],
        prompt: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        random: Mapping[str, Tensor],
    ) -> None:
        directory = self.run / CHECKPOINTS
        path = write_checkpoint(
            directory,
            state.step,
            write_weights=lambda staging: write_weights(
                staging, self.model, self.method, self.prepared, self.identity, weights, prompt
            ),
            optimizer=moments,
            random=random,
            state=state.to_json() | {"plan": self.prepared.plan.fingerprint_until(state.step)},
        )
        best = directory / checkpoint_name(state.best_step) if state.best_step is not None else None
        rotate(directory, keep=self.prepared.recipe.training.save_total_limit, best=best)
        self.console.debug(f"checkpoint {path}")
