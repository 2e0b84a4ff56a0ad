"""LoRA and DoRA beside peft's: the same layers, factors and tokens, in one run. Time, memory, gradients.

    python -m benchmarks.lora_vs_peft [--width 512] [--layers 8] [--rank 16] [--dtype bfloat16] [--rounds 20]
                                      [--checkpointing] [--device cuda]

takes a random Llama, gives all its linear layers a LoRA (or DoRA) of ftkit, and peft the same base and the same factors
from the files that ftkit writes. Both models are then called in the same way, with transformers' own attention and
loss: what differs are the layers. A step is forward and backward.

step            seconds: the medians, and the median of the ratios of steps that ran one after the other, the two taking
                turns at being first, with the quartiles of the ratios
memory          largest bytes of live tensors during a step, less what is there before it: weights and factors
gradients       largest difference of an entry of a gradient of A, B or the lengths, as a share of the largest entry of
                that gradient: between the two, and of each from peft's layers in float64
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.random_llama import random_llama
from ftkit.console import Console, human_bytes, make_table
from ftkit.methods import lora
from ftkit.methods.files import BaseIdentity
from ftkit.methods.lora_saved import PREFIX
from ftkit.models.live_tensors import LiveTensors
from ftkit.models.precision import compute_in
from ftkit.models.quiet import quiet_transformers
from ftkit.recipe.schema import LoraMethod

VARIANTS = {"LoRA": False, "DoRA": True}
OURS, THEIRS = "ftkit", "peft"
PERTURBATION = 0.02
"""Standard deviation of what B starts from, so that A has a gradient too."""


@dataclass(frozen=True)
class Sizes:
    """Of the random Llama, its LoRA and the batch."""

    width: int = 512
    layers: int = 8
    rank: int = 16
    vocabulary: int = 4096
    documents: int = 4
    length: int = 256


@dataclass(frozen=True)
class Figures:
    """Of one variant."""

    variant: str
    seconds: Mapping[str, list[float]]
    """Of each step, by whose it is."""
    peak_bytes: Mapping[str, int]
    gradient_difference: float
    """Between the two."""
    gradient_error: Mapping[str, float]
    """Against float64."""

    @property
    def time_ratios(self) -> list[float]:
        """Ours over theirs, round by round."""
        return [mine / other for mine, other in zip(self.seconds[OURS], self.seconds[THEIRS], strict=True)]

    @property
    def memory_ratio(self) -> float:
        """Ours over theirs."""
        return self.peak_bytes[OURS] / self.peak_bytes[THEIRS]


def measure_all(
    sizes: Sizes, *, dtype: torch.dtype, rounds: int, checkpointing: bool = False, device: str = "cpu"
) -> Iterator[Figures]:
    """The figures of every variant, one after the other."""
    for variant, dora in VARIANTS.items():
        models = make_models(sizes, dora=dora, dtype=dtype)
        exact = copy.deepcopy(models[THEIRS]).double()
        for model in (*models.values(), exact):
            # Not the model's own `to`, which peft and transformers dress up differently.
            nn.Module.to(model, device)
            if checkpointing:
                base = model.get_base_model() if isinstance(model, PeftModel) else model
                base.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        generator = torch.Generator().manual_seed(1)
        shape = (sizes.documents, sizes.length)
        ids = torch.randint(sizes.vocabulary, shape, generator=generator).to(device)

        gradients = {name: _gradients(model, ids) for name, model in models.items()}
        reference = _gradients(exact, ids)
        del exact
        peaks = {name: _peak(model, ids) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(rounds):
            for name in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
                seconds[name].append(_timed(models[name], ids))
        yield Figures(
            variant,
            seconds,
            peaks,
            _difference(gradients[OURS], gradients[THEIRS]),
            {name: _difference(found, reference) for name, found in gradients.items()},
        )


def make_models(sizes: Sizes, *, dora: bool, dtype: torch.dtype) -> dict[str, nn.Module]:
    """ftkit's model and peft's, on the same random base in `dtype`, with the same float32 factors."""
    ours = random_llama(width=sizes.width, layers=sizes.layers, vocabulary=sizes.vocabulary, dtype=dtype)
    base = copy.deepcopy(ours)
    section = LoraMethod(type="lora", rank=sizes.rank, alpha=2.0 * sizes.rank, dora=dora)
    lora.apply(ours, section, seed=0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=PERTURBATION)
    compute_in(ours, dtype)
    with TemporaryDirectory() as directory:
        lora.save(ours, section, Path(directory), BaseIdentity("random"))
        theirs = PeftModel.from_pretrained(base, directory, is_trainable=True)
    return {OURS: ours, THEIRS: theirs}


def _step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of everything that trains, by peft's name without the adapter's and `.weight`."""
    _step(model, ids)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            own = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".default")
            own = own.removesuffix("_vector")
            found[own] = parameter.grad.double()
    model.zero_grad()
    return found


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest, as a share of the largest entry of each gradient."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
    return max(float((found[name] - other).abs().max() / other.abs().max()) for name, other in expected.items())


def _peak(model: nn.Module, ids: Tensor) -> int:
    """Most bytes of tensors during a step that were not there before, gradients included."""
    before = [*model.parameters(), *model.buffers(), ids]
    with LiveTensors(before) as live:
        _step(model, ids)
        model.zero_grad()
    return max(live.live_bytes(lambda life: bool(life.operation)))


def _timed(model: nn.Module, ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    _step(model, ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    model.zero_grad()
    return seconds


def show(console: Console, figures: list[Figures], title: str) -> None:
    """Print a row for each variant."""
    columns = ["step ftkit", "peft", "ratio", "quartiles", "memory ftkit", "peft", "ratio"]
    columns += ["gradients apart", "ftkit off", "peft off"]
    table = make_table(title, [("", "left"), *((column, "right") for column in columns)])
    for one in figures:
        medians = [f"{statistics.median(one.seconds[name]):.3f} s" for name in (OURS, THEIRS)]
        ratio, quartiles = statistics.median(one.time_ratios), one.time_ratios
        if len(quartiles) > 1:
            quartiles = statistics.quantiles(quartiles, n=4)[::2]
        table.add_row(
            one.variant,
            *medians,
            f"{ratio:.2f}",
            " to ".join(f"{value:.2f}" for value in quartiles),
            *(human_bytes(one.peak_bytes[name]) for name in (OURS, THEIRS)),
            f"{one.memory_ratio:.2f}",
            f"{one.gradient_difference:.1e}",
            *(f"{one.gradient_error[name]:.1e}" for name in (OURS, THEIRS)),
        )
    console.table(table)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("width", "layers", "rank", "documents", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Sizes, name))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    quiet_transformers()
    sizes = Sizes(given.width, given.layers, given.rank, documents=given.documents, length=given.length)
    measured = measure_all(
        sizes,
        dtype=getattr(torch, given.dtype),
        rounds=given.rounds,
        checkpointing=given.checkpointing,
        device=given.device,
    )
    title = f"Llama of {sizes.layers} layers, width {sizes.width}, rank {sizes.rank} on all linear layers, "
    title += f"{sizes.documents} x {sizes.length} tokens, {given.dtype}"
    show(Console(), list(measured), title + (", activations checkpointed" if given.checkpointing else ""))


if __name__ == "__main__":
    main()
