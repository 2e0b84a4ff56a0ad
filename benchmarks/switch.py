"""What does it cost to switch between two adapters of one base in memory, and what is left of the base afterwards?

    python -m benchmarks.switch [--width 576] [--layers 12] [--rank 16] [--switches 100]

takes a random Llama and two LoRAs of all its linear layers, and switches back and forth in float32 and in bfloat16:

side by side   each adapter a model of its own whose modules hold the same base weights (what `ftkit eval` does): a
               switch is the choice of the one that is called
in place       the old update is subtracted from the weights and the new one added, in one pass, rounded once
from a copy    the new update is added to a second copy of the base, so that nothing accumulates
from disk      the base is read anew and the new update is added

Printed are seconds a switch, bytes of weights and updates that are read or written for it, and how far the weights are
then from those of the base with the same adapter, merged afresh: share of values, largest difference in steps between
neighbouring values (ulp) and in absolute value, and the largest difference of a logit, as a share of the largest.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.random_llama import random_llama
from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.proof import fold
from ftkit.artifacts.restored import steps_between
from ftkit.artifacts.updates import LoadedAdapter, load_adapter, sum_updates
from ftkit.console import Console, human_bytes, make_table
from ftkit.evaluation.contestants import share_weights
from ftkit.methods import lora
from ftkit.methods.base import ComputeDelta
from ftkit.methods.files import BaseIdentity
from ftkit.methods.lora_saved import B
from ftkit.models.load import BaseModel, find_base, fingerprint, load_weights
from ftkit.models.precision import compute_in
from ftkit.models.quiet import quiet_transformers
from ftkit.recipe.schema import LoraMethod, ModelSection
from ftkit.runs import Target

PROMPT = torch.arange(3, 67)[None]


@dataclass(frozen=True)
class Drift:
    """How far weights are from where they should be."""

    differing: float
    """Share of the values."""
    max_ulps: int
    max_abs_difference: float
    logits: float
    """Largest difference, as a share of the largest logit."""


@dataclass(frozen=True)
class Figures:
    """Of one way to switch, in one precision."""

    way: str
    seconds: float
    moved: int
    drift: Drift


def measure_all(directory: Path, *, width: int, layers: int, rank: int, switches: int) -> Iterator[tuple[str, Figures]]:
    """Precision and figures of every way."""
    base, adapters = write_base_and_adapters(directory, width=width, layers=layers, rank=rank)
    for dtype in (torch.float32, torch.bfloat16):
        fresh = [load_weights(base, dtype=dtype) for _ in adapters]
        for model, adapter in zip(fresh, adapters, strict=True):
            fold(model, sum_updates([adapter]))
        name = str(dtype).removeprefix("torch.")
        last = fresh[switches % 2]
        for figures in (
            _side_by_side(base, adapters, dtype, switches),
            _in_place(base, adapters, dtype, switches, last),
            _from_a_copy(base, adapters, dtype, switches, last),
            _from_disk(base, adapters[switches % 2], dtype, last),
        ):
            yield name, figures


def write_base_and_adapters(
    directory: Path, *, width: int, layers: int, rank: int
) -> tuple[BaseModel, list[LoadedAdapter]]:
    """A random model, and two LoRAs of it whose updates are about 2% of the weights."""
    random_llama(width=width, layers=layers, vocabulary=4096).save_pretrained(directory / "base")
    base = find_base(str(directory / "base"), ModelSection(), base=directory)
    adapters = []
    for seed in (1, 2):
        section, place = LoraMethod(type="lora", rank=rank, alpha=2.0 * rank), directory / f"adapter-{seed}"
        model = load_weights(base, dtype=torch.float32)
        lora.apply(model, section, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        state = {
            key: torch.randn(tensor.shape, generator=noise) * 5e-4 if key.endswith(B) else tensor
            for key, tensor in lora.trained_state(model).items()
        }
        lora.save(model, section, place, BaseIdentity(base.name, None, fingerprint(base)), state=state)
        adapters.append(load_adapter(WeightedAdapter(Target(place.name, base, place, None, None, base)), base))
    return base, adapters


def _side_by_side(base: BaseModel, adapters: list[LoadedAdapter], dtype: torch.dtype, switches: int) -> Figures:
    model = load_weights(base, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = []
    for number in range(len(adapters)):
        assert base.path is not None
        one = share_weights(model)
        lora.load(one, base.path.parent / f"adapter-{number + 1}")
        compute_in(one, dtype)
        tuned.append(one)
    expected = [_logits(one) for one in tuned]
    start = time.perf_counter()
    for number in range(switches):
        current = tuned[number % 2]
    seconds = (time.perf_counter() - start) / switches
    computed = _logits(current)
    assert torch.equal(computed, expected[(switches - 1) % 2])
    return Figures("side by side", seconds, 0, _drift(model.state_dict(), before, computed, computed))


def _in_place(
    base: BaseModel, adapters: list[LoadedAdapter], dtype: torch.dtype, switches: int, fresh: PreTrainedModel
) -> Figures:
    model = load_weights(base, dtype=dtype)
    fold(model, sum_updates([adapters[0]]))
    there = sum_updates([replace(adapters[0], weight=-1.0), adapters[1]])
    back = sum_updates([replace(adapters[1], weight=-1.0), adapters[0]])
    seconds = _timed(switches, lambda number: fold(model, back if number % 2 else there))
    moved = 2 * _weight_bytes(model, there) + _adapter_bytes(adapters)
    return Figures("in place", seconds, moved, _drift_of(model, fresh))


def _from_a_copy(
    base: BaseModel, adapters: list[LoadedAdapter], dtype: torch.dtype, switches: int, fresh: PreTrainedModel
) -> Figures:
    model, untouched = load_weights(base, dtype=dtype), load_weights(base, dtype=dtype)
    updates = [sum_updates([adapter]) for adapter in adapters]

    def switch(number: int) -> None:
        new = updates[(number + 1) % 2]
        for name in new:
            model.get_parameter(name).data.copy_(untouched.get_parameter(name))
        fold(model, new)

    seconds = _timed(switches, switch)
    moved = 4 * _weight_bytes(model, updates[0]) + _adapter_bytes(adapters[:1])
    return Figures("from a copy", seconds, moved, _drift_of(model, fresh))


def _from_disk(base: BaseModel, adapter: LoadedAdapter, dtype: torch.dtype, fresh: PreTrainedModel) -> Figures:
    updates = sum_updates([adapter])
    # Each is the same: a few are enough.
    models: list[PreTrainedModel] = []

    def switch(number: int) -> None:
        models[:] = [load_weights(base, dtype=dtype)]
        fold(models[0], updates)

    seconds = _timed(3, switch)
    assert base.path is not None
    read = sum(path.stat().st_size for path in base.path.glob("*.safetensors"))
    written = sum(parameter.nbytes for parameter in models[0].parameters())
    moved = read + written + 2 * _weight_bytes(models[0], updates) + _adapter_bytes([adapter])
    return Figures("from disk", seconds, moved, _drift_of(models[0], fresh))


def _timed(switches: int, switch: Callable[[int], None]) -> float:
    start = time.perf_counter()
    for number in range(switches):
        switch(number)
    return (time.perf_counter() - start) / switches


def _weight_bytes(model: PreTrainedModel, updates: Mapping[str, ComputeDelta]) -> int:
    return sum(model.get_parameter(name).nbytes for name in updates)


def _adapter_bytes(adapters: list[LoadedAdapter]) -> int:
    return sum(
        parameter.nbytes
        for adapter in adapters
        for layer in adapter.layers.values()
        for name, parameter in layer.named_parameters()
        if name.startswith("lora_")
    )


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model.eval()(PROMPT).logits[0].float()
    return logits


def _drift_of(model: PreTrainedModel, fresh: PreTrainedModel) -> Drift:
    return _drift(model.state_dict(), fresh.state_dict(), _logits(model), _logits(fresh))


def _drift(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], logits: Tensor, right: Tensor) -> Drift:
    differing = sum(int((weights[name] != tensor).sum()) for name, tensor in expected.items())
    return Drift(
        differing / sum(tensor.numel() for tensor in expected.values()),
        max(int(steps_between(weights[name], tensor).max()) for name, tensor in expected.items()),
        max(float((weights[name].double() - tensor.double()).abs().max()) for name, tensor in expected.items()),
        float((logits - right).abs().max() / right.abs().max()),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (("--width", 576), ("--layers", 12), ("--rank", 16), ("--switches", 100)):
        parser.add_argument(name, type=int, default=value)
    arguments = parser.parse_args()
    quiet_transformers()
    headers = ("switching", "precision", "seconds", "bytes moved", "values off", "ulp", "largest", "logits")
    table = make_table(f"after {arguments.switches} switches", [(header, "right") for header in headers])
    with TemporaryDirectory() as directory:
        for precision, figures in measure_all(Path(directory), **vars(arguments)):
            drift = figures.drift
            table.add_row(
                figures.way,
                precision,
                f"{figures.seconds:.2g}",
                human_bytes(figures.moved),
                f"{100 * drift.differing:.2f}%",
                f"{drift.max_ulps:,}",
                f"{drift.max_abs_difference:.1e}",
                f"{drift.logits:.1e}",
            )
    Console().table(table)


if __name__ == "__main__":
    main()
