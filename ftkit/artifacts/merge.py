"""Folding LoRA adapters into their base, and the proof that nothing else changed.

W' = cast(float32(W) + sum over the adapters of weight * alpha / rank * B A)        rounded once
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ftkit.artifacts import proof
from ftkit.artifacts.adapters import WeightedAdapter, common_base
from ftkit.artifacts.directory import (
    check_free,
    copy_companions,
    has_tokenizer,
    staged,
    template_kwargs,
    write_config,
)
from ftkit.artifacts.updates import LoadedAdapter, applied, build_skeleton, load_adapter, sum_updates
from ftkit.artifacts.weights import check_tensors, names_in_files, rewrite
from ftkit.methods.base import ComputeDelta
from ftkit.methods.files import check_base, read_identity
from ftkit.models.files import stored_dtype
from ftkit.models.load import BaseModel, load_tokenizer, load_weights, local_directory

REPORT_NAME = "merge_report.json"


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


def merge(
    adapters: Sequence[WeightedAdapter],
    output: Path,
    *,
    prompts: Sequence[proof.Prompt] = (),
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write base + adapters to `output` as an ordinary Hugging Face directory, and prove that it is that.

    Tokenizer, template and generation config are those of the first adapter.

    Args:
        prompts: token ids to prove on, besides those that ship with ftkit.
        dtype: precision of the result; None keeps the one that the base is stored in.
        overwrite: move an `output` that exists to `NAME.old-1`.

    Raises:
        UserError: no LoRA, another base than one was trained on, `output` exists.
        CheckFailedError: the proof failed; the result is kept as `NAME.rejected`.
        StorageError: disk full.
    """
    # 1. What is merged into what.
    check_free(output, overwrite=overwrite)
    base, identity = common_base(adapters)
    for adapter in adapters:
        check_base(adapter.directory, read_identity(adapter.directory), identity)
    loaded = [load_adapter(adapter, base) for adapter in adapters]
    updates = sum_updates(loaded)
    source = local_directory(base, weights=True)
    in_files = names_in_files(source, updates, prefix=build_skeleton(base).base_model_prefix)
    result_dtype = dtype or stored_dtype(source)
    target = adapters[0].target

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
        exact, cast = _prove(loaded, base, merged, updates, all_prompts, result_dtype)
        report = MergeReport(
            max_abs_logit_difference=exact.max_abs_logit_difference,
            max_abs_logit=exact.max_abs_logit,
            top1_agreement=exact.top1_agreement,
            cast=cast,
            tensors_changed=len(in_files),
            base_fingerprint=identity.fingerprint,
            adapters=tuple(adapter.describe() for adapter in adapters),
        )
        (directory / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        proof.check_logits(exact)
    return report


def _prove(
    adapters: Sequence[LoadedAdapter],
    base: BaseModel,
    merged: BaseModel,
    updates: Mapping[str, ComputeDelta],
    prompts: Sequence[proof.Prompt],
    dtype: torch.dtype,
) -> tuple[proof.Comparison, Cast]:
    """Adapted against merged, both float32; and what computing in `dtype` changes, beside the same for the base."""
    model = load_weights(base, dtype=torch.float32)
    base_logits = proof.compute_logits(model, prompts)
    with applied(model, adapters):
        adapted_logits = proof.compute_logits(model, prompts)
    proof.fold(model, updates)
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
