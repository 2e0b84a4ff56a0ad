"""Does packing change anything? Tiny models of twelve architectures: packed, padded, and each document alone.

    python -m benchmarks.packing_parity

lets ftkit choose how documents share a row, for each attention that a recipe may ask for on a CPU, and prints how far
the summed loss and the gradient of every parameter then are from those of the documents run one by one through
transformers' own model and loss. A second table says how evenly documents of alpaca's lengths are dealt to devices.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.data.batches import Batch, collate, deal
from ftkit.data.types import IGNORE, EncodedExample
from ftkit.errors import UserError
from ftkit.models.architecture import describe
from ftkit.models.isolation import Isolation, choose_packing
from ftkit.models.load import BaseModel, load_config, load_weights
from ftkit.models.objective import Objective
from ftkit.models.quiet import quiet_transformers
from tests.models.batches import random_examples
from tests.tiny_models import CONFIGS, MORE_CONFIGS, tiny_model

ARCHITECTURES = (*CONFIGS, *MORE_CONFIGS)
REQUESTS = ("auto", "eager", "sdpa")
"""Values of `model.attn_implementation` that work on a CPU; `ftkit` is what `auto` begins with."""
EXAMPLES = random_examples([9, 70, 2, 14, 33, 1])
"""One is longer than the windows (16) and than a chunk of linear attention (64); the last two have no targets."""
ZERO = 1e-6
"""A gradient below this share of the model's largest is rounding around zero (OPT's keys have a bias, which no softmax
sees): it is compared with the model's largest."""

# ----------------------------------------------------------------------------------------------- loss and gradients


class Sums(NamedTuple):
    """What one optimizer step sees of a model."""

    loss: float
    """Sum over all targets."""
    gradients: dict[str, Tensor]
    """Of that sum, by parameter."""


class Difference(NamedTuple):
    """Largest relative differences between two `Sums`."""

    loss: float
    gradient: float
    """As a share of the largest gradient of the same parameter."""
    parameter: str
    """The one with that gradient."""


@dataclass(frozen=True)
class Subject:
    """A tiny model on disk, and what it gives for `EXAMPLES` one by one."""

    architecture: str
    base: BaseModel
    config: PreTrainedConfig
    alone: Sums


def make_subject(architecture: str, directory: Path) -> Subject:
    """Write the model to `directory` and run every document alone, with transformers' eager attention."""
    tiny_model(architecture).save_pretrained(directory)
    base = BaseModel(architecture, path=directory)
    model = load_weights(base, dtype=torch.float32, attn_implementation="eager").train()
    return Subject(architecture, base, load_config(base), _one_by_one(model))


def _one_by_one(model: PreTrainedModel) -> Sums:
    total = 0.0
    for encoded in EXAMPLES:
        ids = torch.from_numpy(encoded.example.input_ids).long()
        labels = torch.from_numpy(encoded.example.labels).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORE)
        loss.backward()
        total += float(loss.detach())
    return Sums(total, _gradients(model))


def prepare(
    subject: Subject, requested: str, packing: Literal["auto", "required", "off"] = "auto"
) -> tuple[Isolation, Objective]:
    """Packing chosen, weights loaded and wrapped as for a run."""
    isolation = choose_packing(subject.config, packing=packing, requested=requested)
    model = load_weights(subject.base, dtype=torch.float32, attn_implementation=isolation.attn_implementation)
    return isolation, Objective(model.train(), num_datasets=2, packed_attention=isolation.rung == "ftkit")


def together(objective: Objective, *, packed: bool, change: Callable[[Batch], Batch] = lambda batch: batch) -> Sums:
    """All documents in one micro-batch."""
    objective.zero_grad()
    loss = objective(change(collate(EXAMPLES, packed=packed, pad_id=0))).loss
    loss.backward()
    return Sums(float(loss.detach()), _gradients(objective.model))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(found: Sums, expected: Sums) -> Difference:
    """The largest differences, relative to `expected`."""
    assert found.gradients.keys() == expected.gradients.keys()
    largest = {name: float(gradient.abs().max()) for name, gradient in expected.gradients.items()}
    top = max(largest.values())
    off = {
        name: float((found.gradients[name] - gradient).abs().max()) / (own if own > ZERO * top else top)
        for name, gradient in expected.gradients.items()
        for own in [largest[name]]
    }
    # NaN is the largest.
    worst = max(off, key=lambda name: (off[name] != off[name], off[name]))
    return Difference(abs(found.loss - expected.loss) / abs(expected.loss), off[worst], worst)


# --------------------------------------------------------------------------------------------- between documents


def cross_document_gradient(objective: Objective, *, packed: bool) -> float:
    """Largest gradient of one document's loss with respect to what is embedded outside of it, padding included.

    As a share of the largest inside of it.
    """
    largest = 0.0
    for index, example in enumerate(EXAMPLES):
        if example.example.num_targets == 0:
            continue
        batch = collate([_silent(e) if e is not example else e for e in EXAMPLES], packed=packed, pad_id=0)
        embedded = _embedded(objective, batch)
        own = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        start = sum(e.example.num_tokens for e in EXAMPLES[:index]) if packed else index * batch.input_ids.shape[1]
        own[start : start + example.example.num_tokens] = True
        gradient_T = embedded.flatten(0, 1).abs().amax(1)
        largest = max(largest, float(gradient_T[~own].max() / gradient_T[own].max()))
    return largest


def _silent(encoded: EncodedExample) -> EncodedExample:
    """The same document without targets."""
    example = replace(encoded.example, labels=np.full_like(encoded.example.labels, IGNORE))
    return replace(encoded, example=example)


def _embedded(objective: Objective, batch: Batch) -> Tensor:
    """Gradient of the batch's loss with respect to the output of the token embedding [B, T, D]."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    hook = describe(objective.model).embeddings.register_forward_hook(keep)
    try:
        loss = objective(batch).loss
    finally:
        hook.remove()
    (gradient_BTD,) = torch.autograd.grad(loss, outputs)
    return gradient_BTD


# -------------------------------------------------------------------------------------------------------- balance


def alpaca_lengths(count: int, generator: np.random.Generator) -> list[int]:
    """Tokens of instruction data: log-normal around 100, one in a thousand at 1,000, none above."""
    return np.clip(generator.lognormal(np.log(100), 0.75, count).astype(int), 10, 1000).tolist()


def tokens_of_ranks(lengths: list[int], world_size: int, max_tokens: int = 2048) -> list[int]:
    """Tokens that each device gets of a global batch."""
    dealt = deal(lengths, world_size=world_size, max_tokens=max_tokens)
    return [sum(lengths[position] for position in chain(*micro_batches)) for micro_batches in dealt]


def imbalances(count: int, world_size: int, *, batches: int = 200) -> Iterator[tuple[float, float]]:
    """Of random global batches: by how much the fullest device is above the mean, and above what it cannot be below.

    No device can have fewer than the mean, the longest document, or, where there are more documents than devices, the
    two shortest of the first `world_size` + 1.
    """
    generator = np.random.default_rng(0)
    for _ in range(batches):
        lengths = alpaca_lengths(count, generator)
        fullest, mean = max(tokens_of_ranks(lengths, world_size)), sum(lengths) / world_size
        longest_first = sorted(lengths, reverse=True)
        bound = max(mean, longest_first[0], sum(longest_first[world_size - 1 : world_size + 1]))
        yield fullest / mean - 1, fullest / bound - 1


# --------------------------------------------------------------------------------------------------------- tables

HOW = {"ftkit": "document bounds", "position_ids": "position_ids", "padded": "padding"}


def print_parity() -> None:
    """A line for each architecture and attention."""
    figures = ("packed: loss", "gradient", "padded: loss", "gradient", "between documents")
    _print_row("architecture", "asked for", "kept apart by", *figures)
    _print_row("-", "-", "-", *["-:"] * 5)
    for architecture in ARCHITECTURES:
        with TemporaryDirectory() as directory:
            subject = make_subject(architecture, Path(directory))
            for requested in REQUESTS:
                _print_row(architecture, requested, *_figures(subject, requested))


def _figures(subject: Subject, requested: str) -> list[str]:
    """The rung, how far off packed and padded are, and the gradient between documents, the larger of the two."""
    try:
        isolation, objective = prepare(subject, requested)
    except UserError:
        return ["the model refuses it", *[""] * 5]
    packed, leak = ["", ""], 0.0
    if isolation.packed:
        packed = _short(compare(together(objective, packed=True), subject.alone))
        leak = cross_document_gradient(objective, packed=True)
        _, objective = prepare(subject, requested, "off")
    padded = _short(compare(together(objective, packed=False), subject.alone))
    leak = max(leak, cross_document_gradient(objective, packed=False))
    return [HOW[isolation.rung], *packed, *padded, f"{leak:.0e}" if leak else "0"]


def print_balance() -> None:
    """A line for each global batch and number of devices."""
    columns = ("above the mean: median", "99%", "largest", "above the bound: median", "99%", "largest")
    _print_row("global batch", "devices", *columns)
    _print_row(*["-:"] * 8)
    for count in (128, 32, 16):
        for world_size in (2, 4, 8):
            above = np.array(list(imbalances(count, world_size)))
            cells = np.quantile(above, [0.5, 0.99, 1], axis=0).T.flatten()
            _print_row(str(count), str(world_size), *(f"{100 * cell:.1f}%" for cell in cells))


def _short(difference: Difference) -> list[str]:
    return [f"{share:.0e}" if share else "0" for share in (difference.loss, difference.gradient)]


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |".replace(" - ", "-").replace(" -: ", "-:"), flush=True)


if __name__ == "__main__":
    quiet_transformers()
    print_parity()
    print()
    print_balance()
