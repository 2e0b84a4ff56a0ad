"""A base on disk and a LoRA beside it, as training leaves them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.methods import lora
from ftkit.methods.files import BaseIdentity
from ftkit.models.load import BaseModel, find_base, fingerprint, load_weights
from ftkit.recipe.schema import LoraMethod, ModelSection
from ftkit.runs import Target
from tests.tiny_models import tiny_model, tiny_tokenizer

IDS = [list(range(5, 45)), list(range(200, 100, -3))]
"""Two texts of the tiny tokenizer."""


@dataclass(frozen=True)
class Pair:
    """A base and an adapter of it."""

    base: BaseModel
    adapter: Path
    section: LoraMethod

    @property
    def base_directory(self) -> Path:
        assert self.base.path is not None
        return self.base.path

    @property
    def target(self) -> Target:
        """The adapter, as the command line names it."""
        return Target(str(self.adapter), self.base, self.adapter, self.adapter, None, self.base)

    def adapted(self) -> PreTrainedModel:
        """The base with the adapter, float32, in evaluation mode."""
        model = load_weights(self.base, dtype=torch.float32)
        lora.load(model, self.adapter)
        return model


def whole_model(model: BaseModel) -> Target:
    """A model that is nobody's adapter, as the command line names it."""
    return Target(model.name, model, None, None, None, None)


def open_base(directory: Path) -> BaseModel:
    """The model in `directory`."""
    return find_base(str(directory), ModelSection(), base=directory)


def write_second(pair: Pair, directory: Path, *, targets: str | tuple[str, ...] = ("q_proj",), seed: int = 7) -> Target:
    """Write another adapter of the same base, as the command line names it."""
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=targets)
    write_lora(pair.base, section, directory, seed=seed)
    return Target(str(directory), pair.base, directory, directory, None, pair.base)


def write_pair(
    directory: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    targets: str | tuple[str, ...] = "all-linear",
    **overrides: Any,
) -> Pair:
    """Write `directory/base` and `directory/adapter`, whose update is about 2% of the weights."""
    model = tiny_model(architecture, **overrides)
    model.to(dtype).save_pretrained(directory / "base", max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory / "base")
    section = LoraMethod(type="lora", rank=4, alpha=6.0, targets=targets)
    base = open_base(directory / "base")
    write_lora(base, section, directory / "adapter")
    return Pair(base, directory / "adapter", section)


def write_lora(base: BaseModel, section: LoraMethod, directory: Path, *, seed: int = 1) -> None:
    """Write an adapter with noise in A and B, the tokenizer and a generation config that ends turns."""
    model = load_weights(base, dtype=torch.float32)
    lora.apply(model, section, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    state = {n: t + torch.randn(t.shape, generator=generator) * 0.02 for n, t in lora.trained_state(model).items()}
    lora.save(model, section, directory, BaseIdentity(base.name, None, fingerprint(base)), state=state)
    tiny_tokenizer().save_pretrained(directory)
    config = {"bos_token_id": 256, "eos_token_id": [258], "pad_token_id": 259}
    (directory / "generation_config.json").write_text(json.dumps(config))


def tensors(directory: Path) -> dict[str, Tensor]:
    """All weights of a model directory."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def updates(directory: Path, section: LoraMethod, *, transposed: bool = False) -> dict[str, Tensor]:
    """alpha / rank * B A of each adapted weight, from an adapter's file alone."""
    state = load_file(directory / "adapter_model.safetensors")
    scale = section.alpha / section.rank
    found = {}
    for name in state:
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = (state[name.replace("lora_A", "lora_B")] @ state[name]) * scale
            found[f"{path}.weight"] = update.T if transposed else update
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[Sequence[int]] = IDS) -> list[Tensor]:
    """Logits of each text, float32."""
    return [model.eval()(torch.tensor([list(row)])).logits[0].float() for row in ids]
