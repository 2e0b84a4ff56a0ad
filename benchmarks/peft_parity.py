"""Is ftkit's loss that of transformers + peft? The same rows in the same order, step by step.

    python benchmarks/peft_parity.py RECIPE [key=value ...]

trains RECIPE (a LoRA recipe, computed in float32) with ftkit, then again with a plain loop over transformers' own
padded loss and peft's own layers, started from the same A and B, and prints both losses of every step.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from ftkit.commands.train import train
from ftkit.console import Console
from ftkit.data.types import IGNORE, EncodedExample
from ftkit.methods.table import METHODS
from ftkit.models.load import load_weights, local_directory
from ftkit.recipe.load import load_recipe
from ftkit.recipe.schema import LoraMethod
from ftkit.training.optim import learning_rate
from ftkit.training.prepare import Prepared, pad_id, prepare


def ftkit_losses(recipe: Path, overrides: list[str]) -> list[float]:
    """The loss of every step of an ftkit run."""
    with tempfile.TemporaryDirectory() as directory:
        train(recipe, [*overrides, "training.logging_steps=1", f"output_dir={directory}/run"])
        lines = [json.loads(line) for line in (Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def peft_losses(recipe: Path, overrides: list[str]) -> list[float]:
    """The same run with transformers and peft: global batches padded, one by one, mean over all target tokens."""
    loaded = load_recipe(recipe, overrides)
    prepared = prepare(loaded, Console(quiet=True), offline=True, trust_remote_code=False)
    section = prepared.recipe.method
    assert isinstance(section, LoraMethod), "a LoRA recipe"
    model = AutoModelForCausalLM.from_pretrained(
        local_directory(prepared.base, weights=True), dtype=torch.float32, attn_implementation="sdpa"
    )
    targets = "all-linear" if section.targets == "all-linear" else list(section.targets)
    config = LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    set_peft_model_state_dict(model, _initial_factors(prepared))
    model.train()
    training = prepared.recipe.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    losses = []
    for step, indices in enumerate(prepared.plan.steps):
        examples = [prepared.plan.examples[index] for index in indices]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(prepared.plan.steps), training)
        loss = model(**_padded(examples, pad_id(prepared.tokenizer))).loss
        loss.backward()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _initial_factors(prepared: Prepared) -> dict[str, Tensor]:
    """ftkit's A and B before the first step, in peft's names."""
    method = METHODS["lora"]
    model = load_weights(prepared.base, dtype=torch.float32)
    method.apply(model, prepared.recipe.method, seed=prepared.recipe.seed)
    return method.trained_state(model)


def _padded(examples: list[EncodedExample], pad: int) -> dict[str, Tensor]:
    length = max(encoded.example.num_tokens for encoded in examples)
    ids, labels = torch.full((len(examples), length), pad), torch.full((len(examples), length), IGNORE)
    mask = torch.zeros(len(examples), length, dtype=torch.int64)
    for row, encoded in enumerate(examples):
        count = encoded.example.num_tokens
        ids[row, :count] = torch.from_numpy(encoded.example.input_ids).long()
        labels[row, :count] = torch.from_numpy(encoded.example.labels).long()
        mask[row, :count] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def main() -> None:
    """Print both losses of every step."""
    recipe, overrides = Path(sys.argv[1]), [*sys.argv[2:], "model.dtype=float32"]
    mine, theirs = ftkit_losses(recipe, overrides), peft_losses(recipe, overrides)
    print(f"{'step':>5} {'ftkit':>12} {'peft':>12} {'difference':>12}")
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True), start=1):
        print(f"{step:5d} {a:12.6f} {b:12.6f} {a - b:12.2e}")
    print(f"largest difference {max(abs(a - b) for a, b in zip(mine, theirs, strict=True)):.2e}")


if __name__ == "__main__":
    main()
