"""Folding a LoRA into its base: W' = cast(float32(W) + alpha / rank * B A), and the proof that nothing else changed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ftkit.artifacts import proof
from ftkit.artifacts.directory import (
    check_free,
    copy_companions,
    has_tokenizer,
    staged,
    template_kwargs,
    write_config,
)
from ftkit.artifacts.weights import check_tensors, names_in_files, rewrite
from ftkit.errors import UserError
from ftkit.methods import adapter, full, lora
from ftkit.methods.base import ComputeDelta
from ftkit.methods.files import BOTTLENECK, LORA, check_base, identify, read_adapter, read_identity
from ftkit.models.files import ADAPTER_CONFIG_NAME, WEIGHTS_NAME, hash_files, read_json, stored_dtype
from ftkit.models.load import BaseModel, load_config, load_tokenizer, load_weights, local_directory
from ftkit.runs import Target

REPORT_NAME = "merge_report.json"
_WEIGHT = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


@dataclass(frozen=True)
class Cast:
    """What serving in the stored precision changes: weights rounded to it and computed in it."""

    dtype: str
    max_abs_logit_difference: float
    """Of the merged model as it is served, to base and adapter in float32."""
    top1_agreement: float
    base_max_abs_logit_difference: float
    """The same for the base alone: what the precision costs without any merge."""
    base_top1_agreement: float


@dataclass(frozen=True)
class MergeReport:
    """What merge_report.json holds."""

    max_abs_logit_difference: float
    """Between base with adapter and merged model, both float32."""
    max_abs_logit: float
    top1_agreement: float
    cast: Cast
    tensors_changed: int
    base_fingerprint: str | None
    adapters: tuple[dict[str, Any], ...]


def parse_adapter(text: str) -> tuple[str, float]:
    """ "runs/a:0.5" -> ("runs/a", 0.5); the weight is what follows the last colon if it is a number."""
    match = _WEIGHT.fullmatch(text)
    if match is None or Path(text).exists():
        return text, 1.0
    return match[1], float(match[2])


def single_adapter(texts: Sequence[str]) -> str:
    """The one adapter that this version merges, at weight 1.

    Raises:
        UserError: there are several, or another weight.
    """
    adapters = [parse_adapter(text) for text in texts]
    if len(adapters) != 1 or adapters[0][1] != 1.0:
        what = "merging several adapters, or one at another weight than 1: not in this version"
        raise UserError(what, how="give one adapter, without a weight")
    return adapters[0][0]


def merge(
    target: Target,
    output: Path,
    *,
    prompts: Sequence[proof.Prompt] = (),
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write base + LoRA to `output` as an ordinary Hugging Face directory, and prove that it is that.

    Args:
        prompts: token ids to prove on, besides those that ship with ftkit.
        dtype: precision of the result; None keeps the one that the base is stored in.
        overwrite: move an `output` that exists to `NAME.old-1`.

    Raises:
        UserError: no LoRA, another base than it was trained on, `output` exists.
        CheckFailedError: the proof failed; the result is kept as `NAME.rejected`.
        StorageError: disk full.
    """
    # 1. What is merged into what.
    check_free(output, overwrite=overwrite)
    base, adapter_directory = target.model, lora_of(target)
    identity = identify(base)
    check_base(adapter_directory, read_identity(adapter_directory), identity)
    deltas, prefix = _read_deltas(adapter_directory, base)
    source = local_directory(base, weights=True)
    in_files = names_in_files(source, deltas, prefix=prefix)
    result_dtype = dtype or stored_dtype(source)

    with staged(output, overwrite=overwrite) as directory:
        # 2. The directory.
        rewrite(source, directory, in_files, dtype=dtype)
        write_config(source, directory, result_dtype)
        copy_companions(target, directory)

        # 3. The proof, of what lies on the disk.
        check_tensors(source, directory, in_files, dtype=dtype)
        merged = BaseModel(output.name, path=directory, trust_remote_code=base.trust_remote_code)
        tokenizer = load_tokenizer(merged) if has_tokenizer(directory) else None
        all_prompts = proof.proof_prompts(tokenizer, template_kwargs(target), prompts)
        exact, cast = _prove(adapter_directory, base, merged, deltas, all_prompts, result_dtype)
        report = MergeReport(
            max_abs_logit_difference=exact.max_abs_logit_difference,
            max_abs_logit=exact.max_abs_logit,
            top1_agreement=exact.top1_agreement,
            cast=cast,
            tensors_changed=len(in_files),
            base_fingerprint=identity.fingerprint,
            adapters=(_describe(adapter_directory),),
        )
        (directory / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        proof.check_logits(exact)
    return report


def lora_of(target: Target) -> Path:
    """Directory of the LoRA that `target` names.

    Raises:
        UserError: it is something else; the message says what to do with that.
    """
    if target.adapter is None:
        raise UserError(f"{target.label}: {full.merge_refusal}")
    kind = read_json(target.adapter / ADAPTER_CONFIG_NAME).get("peft_type")
    if kind == BOTTLENECK:
        raise UserError(f"{target.adapter}: {adapter.merge_refusal}")
    if kind != LORA:
        raise UserError(f"{target.adapter} is an adapter of the kind {kind}", how="ftkit merges LoRA adapters")
    return target.adapter


def _read_deltas(adapter_directory: Path, base: BaseModel) -> tuple[dict[str, ComputeDelta], str]:
    """Name of a weight in the running model -> what is added to it; and the model's prefix."""
    config = load_config(base)
    # Without memory: only names and shapes are asked for.
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=base.trust_remote_code)
    section = lora.load(skeleton, adapter_directory)
    _, state = read_adapter(adapter_directory, peft_type=LORA)
    return dict(lora.deltas(skeleton, state, section)), skeleton.base_model_prefix


def _prove(
    adapter_directory: Path,
    base: BaseModel,
    merged: BaseModel,
    deltas: Mapping[str, ComputeDelta],
    prompts: Sequence[proof.Prompt],
    dtype: torch.dtype,
) -> tuple[proof.Comparison, Cast]:
    """Adapted against merged, both float32; and what computing in `dtype` changes, beside the same for the base."""
    model = load_weights(base, dtype=torch.float32)
    base_logits = proof.compute_logits(model, prompts)
    lora.load(model, adapter_directory)
    adapted_logits = proof.compute_logits(model, prompts)
    # Anew, since modules that train in full are gone from a model with its adapter.
    model = load_weights(base, dtype=torch.float32)
    proof.fold(model, deltas)
    exact = proof.compare(adapted_logits, proof.compute_logits(model, prompts))

    served = load_weights(merged, dtype=dtype)
    proof.check_loaded(model, served)
    del model
    cast = proof.compare(adapted_logits, proof.compute_logits(served, prompts))
    del served
    base_served = load_weights(base, dtype=dtype)
    base_cast = proof.compare(base_logits, proof.compute_logits(base_served, prompts))
    return exact, Cast(
        dtype=str(dtype).removeprefix("torch."),
        max_abs_logit_difference=cast.max_abs_logit_difference,
        top1_agreement=cast.top1_agreement,
        base_max_abs_logit_difference=base_cast.max_abs_logit_difference,
        base_top1_agreement=base_cast.top1_agreement,
    )


def _describe(adapter_directory: Path) -> dict[str, Any]:
    weights = adapter_directory / f"adapter_{WEIGHTS_NAME}"
    return {"path": str(adapter_directory.absolute()), "weight": 1.0, "fingerprint": hash_files([weights])}
