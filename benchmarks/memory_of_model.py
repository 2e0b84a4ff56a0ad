"""Where the memory of a training step goes: weights, gradients, optimizer state, activations, at every moment of it.

Model, loss, packing, optimizer and clipping are those that `ftkit train` uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.random_llama import random_llama
from ftkit.data.batches import Batch, collate
from ftkit.data.types import IGNORE, EncodedExample, Example
from ftkit.methods.table import METHODS
from ftkit.models.attention import NAME, register
from ftkit.models.live_tensors import Life, LiveTensors
from ftkit.models.objective import Objective
from ftkit.models.precision import compute_in
from ftkit.recipe.method_schema import AdapterMethod, FullMethod, LoraMethod
from ftkit.recipe.schema import TrainingSection
from ftkit.training.optim import make_optimizer

KINDS = ("frozen weights", "trained weights", "gradients", "optimizer state", "activations")
"""Activations: all that is none of the others, the batch and what is soon freed included."""
PHASES = ("forward", "backward", "optimizer")
FROZEN = "frozen"
METHOD_SECTIONS: dict[str, FullMethod | AdapterMethod | LoraMethod | None] = {
    FROZEN: None,
    "full": FullMethod(type="full"),
    "bottleneck adapters": AdapterMethod(type="adapter", bottleneck=64),
    "LoRA, all linear, rank 16": LoraMethod(type="lora"),
    "LoRA, q and v, rank 4": LoraMethod(type="lora", rank=4, alpha=8.0, targets=("q_proj", "v_proj")),
}
"""What is compared, by the name in the tables."""


@dataclass(frozen=True)
class ModelSizes:
    """Of the random Llama, and of the batch."""

    width: int = 512
    layers: int = 8
    vocabulary: int = 8192
    documents: int = 2
    length: int = 512


@dataclass(frozen=True)
class Step:
    """One optimizer step: bytes by kind after every event of it."""

    series: Mapping[str, list[int]]
    """Kind -> bytes."""
    phases: Mapping[str, range]
    """Phase -> its events; the first of each is the state that it begins with."""
    allocator_peak: int | None
    """`torch.cuda`'s own figure, with what operations use inside; None without a GPU."""

    def total(self, event: int) -> int:
        """Bytes of all kinds."""
        return sum(series[event] for series in self.series.values())

    def peak(self, phase: str) -> int:
        """The event of the phase after which most bytes are there."""
        return max(self.phases[phase], key=lambda event: (self.total(event), -event))

    def moments(self) -> dict[str, int]:
        """Name -> event: the moments that the tables show."""
        return {
            "before": self.phases["forward"][0],
            "peak of forward": self.peak("forward"),
            "after forward": self.phases["forward"][-1],
            "peak of backward": self.peak("backward"),
            "after backward": self.phases["backward"][-1],
            "peak of optimizer": self.peak("optimizer"),
            "after the step": self.phases["optimizer"][-1],
        }


@dataclass(frozen=True)
class ModelFigures:
    """Of one method."""

    name: str
    parameters: int
    trained: int
    steps: list[Step]
    """The first, in which the optimizer makes its state, and the second, like which all others are; of a frozen model
    one, without gradients."""


def make_model(name: str, sizes: ModelSizes, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama with the method of that name applied, in ftkit's precision: what trains is float32."""
    register()
    section = METHOD_SECTIONS[name]
    base_dtype = torch.float32 if isinstance(section, FullMethod) else dtype
    model = random_llama(
        width=sizes.width, layers=sizes.layers, vocabulary=sizes.vocabulary, dtype=base_dtype, attention=NAME
    )
    if section is None:
        model.requires_grad_(False)
    else:
        METHODS[section.type].apply(model, section, seed=0)
    compute_in(model, dtype)
    return model


def make_batch(sizes: ModelSizes) -> Batch:
    """Random documents in one row; every token but the first of each is a target."""
    generator = np.random.default_rng(0)
    examples = []
    for _ in range(sizes.documents):
        ids = generator.integers(0, sizes.vocabulary, sizes.length).astype(np.int32)
        labels = ids.copy()
        labels[0] = IGNORE
        examples.append(EncodedExample(Example(ids, labels), dataset=0, row=0))
    return collate(examples, packed=True, pad_id=0)


def measure_model(
    name: str, sizes: ModelSizes, dtype: torch.dtype, *, checkpointing: bool = False, device: str = "cpu"
) -> ModelFigures:
    """Two optimizer steps of the method of that name."""
    model, batch = make_model(name, sizes, dtype), make_batch(sizes).to(device)
    nn.Module.to(model, device)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = Objective(model, num_datasets=1, packed_attention=True).train()
    kinds = {id(p.untyped_storage()): KINDS[p.requires_grad] for p in model.parameters()}
    known: list[Tensor] = [*model.parameters(), *model.buffers(), batch.input_ids, batch.position_ids]
    known += [batch.target_positions, batch.target_ids, batch.target_datasets]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with LiveTensors(known) as live:
        of_life = {life: kinds.get(life.key, KINDS[-1]) for life in live.lives}
        # Taken over the whole step: the profile of a GPU's allocator has no moments.
        peaks = _run(objective, batch, trained, live, of_life)
    series = {
        kind: live.live_bytes(lambda life, kind=kind: of_life.get(life, KINDS[-1]) == kind)  # type: ignore[misc]
        for kind in KINDS
    }
    steps = []
    for number, peak in enumerate(peaks):
        phases = {phase: live.between(f"{number} {phase}", f"{number} {phase} over") for phase in PHASES}
        steps.append(Step(series, phases, peak))
    count = sum(p.numel() for p in model.parameters())
    return ModelFigures(name, count, sum(p.numel() for p in trained.values()), steps)


def _run(
    objective: Objective,
    batch: Batch,
    trained: Mapping[str, nn.Parameter],
    live: LiveTensors,
    of_life: dict[Life, str],
) -> list[int | None]:
    """Run the steps, and note what turned out to be a gradient or state of the optimizer; the allocator's peaks."""
    optimizer = make_optimizer(trained, TrainingSection(learning_rate=1e-4), lambda _: 1.0) if trained else None
    peaks: list[int | None] = []

    def note(tensors: list[Tensor], kind: str) -> None:
        for tensor in tensors:
            life = live.life_of(tensor)
            assert life is not None, "made under the tracker"
            of_life[life] = kind

    for number in range(2 if trained else 1):
        if batch.input_ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        live.mark(f"{number} forward")
        with torch.set_grad_enabled(bool(trained)):
            loss = objective(batch).loss / len(batch.target_ids)
        live.mark(f"{number} forward over")
        live.mark(f"{number} backward")
        if trained:
            loss.backward()
            note([p.grad for p in trained.values() if p.grad is not None], "gradients")
        live.mark(f"{number} backward over")
        live.mark(f"{number} optimizer")
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            states = [value for state in optimizer.state.values() for value in state.values()]
            note(states, "optimizer state")
            optimizer.zero_grad()
        del loss
        live.mark(f"{number} optimizer over")
        peaks.append(torch.cuda.max_memory_allocated() if batch.input_ids.is_cuda else None)
    return peaks
