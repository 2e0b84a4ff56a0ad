"""Folding LoRA adapters into their base, or taking them off again, and the proof that nothing else changed.

W' = cast(float32(W) + sum over the adapters of weight * alpha / rank * B A)        rounded once

An adapter that was trained on a quantised base corrects what that computes: W is then the dequantised weight, and every
other weight that was quantised is written dequantised too, unless the merge is asked for the base as it is stored.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftkit.artifacts.adapters import WeightedAdapter, common_base, common_quantization
from ftkit.artifacts.contents import REPORT_NAME, Contents, check_base_of, check_subtracted, read_contents
from ftkit.artifacts.directory import check_free, copy_companions, has_tokenizer, staged, template_kwargs, write_config
from ftkit.artifacts.layout import lay_out
from ftkit.artifacts.proof import Prompt, check_logits, proof_prompts
from ftkit.artifacts.proof_modules import ModulesProof, check_modules, prove_modules
from ftkit.artifacts.proof_whole import Cast, WholeProof, prove_whole
from ftkit.artifacts.restored import Restored, check_restored, compare_with_base, find_original
from ftkit.artifacts.updates import (
    LoadedAdapter,
    build_skeleton,
    dequantized_weights,
    load_adapter,
    on_dequantized,
    sum_updates,
)
from ftkit.artifacts.weights import Changes, check_changed, check_tensors, rewrite
from ftkit.errors import UserError
from ftkit.methods.base import ComputeDelta
from ftkit.methods.files import BaseIdentity, read_identity
from ftkit.models.files import hash_files, stored_dtype, weight_files
from ftkit.models.load import BaseModel, load_config, load_tokenizer, local_directory, stored_quantization
from ftkit.runs import Target

PROOFS = ("full", "modules", "none")
"""Logits of two whole models; outputs of one adapted module after another; neither. Files are always checked."""


@dataclass(frozen=True)
class MergeReport:
    """What merge_report.json holds."""

    proof: str
    """One of `PROOFS`."""
    max_abs_logit_difference: float | None
    """Between base with adapter and merged model, both float32; like the next four None without a full proof."""
    max_abs_logit: float | None
    top1_agreement: float | None
    max_abs_rounding_difference: float | None
    """What one step of float32 in every adapted weight does to the merged model's logits, where it was asked."""
    cast: Cast | None
    modules: ModulesProof | None
    tensors_changed: int
    """In the files."""
    zero: tuple[str, ...]
    """Weights that an adapter names and that gained nothing: its B is still zero."""
    rounded_away: tuple[str, ...]
    """Weights that gained less than the stored precision can tell."""
    base_fingerprint: str | None
    fingerprint: str
    """Of the merged weight files."""
    adapters: tuple[dict[str, Any], ...]
    """Those of this merge; `contents` has those of all that led here."""
    contents: Contents
    restored: Restored | None
    """How well the base came back; None where adapters are left in the model."""
    quantization: "Quantization | None"
    """None where no adapter was trained on a quantised base."""


@dataclass(frozen=True)
class Quantization:
    """How a merge treats the quantisation that a base had in training."""

    trained_on: str
    """nf4 or int8."""
    merged_onto: str
    """dequantized: the merged model is the trained one; stored: it differs by what quantising changed."""
    max_abs_logit_difference: float | None
    """Between the model as it was trained and the merged one, both float32; like the next None without full proof."""
    top1_agreement: float | None


@dataclass(frozen=True)
class _Inputs:
    """What is merged into what."""

    adapters: Sequence[WeightedAdapter]
    loaded: Sequence[LoadedAdapter]
    updates: dict[str, ComputeDelta]
    base: BaseModel
    identity: BaseIdentity
    contents: Contents
    """Of the base as it is given."""
    result: Contents
    original: BaseModel | None
    """The first base, where everything is taken off again and it can be reached."""
    trained_on: str | None
    """What `base` was quantised to when the adapters trained on it; `base` itself says what it is merged as."""


def merge(
    adapters: Sequence[WeightedAdapter],
    output: Path,
    *,
    prompts: Sequence[Prompt] = (),
    dtype: torch.dtype | None = None,
    proof: str = "full",
    overwrite: bool = False,
    onto_stored: bool = False,
) -> MergeReport:
    """Write base + adapters to `output` as an ordinary Hugging Face directory, and prove that it is that.

    Tokenizer, template and generation config are those of the first adapter that is added; where all are subtracted,
    the base's own.

    Args:
        prompts: token ids to prove on, besides those that ship with ftkit.
        dtype: precision of the result; None keeps the one that the base is stored in.
        proof: one of `PROOFS`.
        overwrite: move an `output` that exists to `NAME.old-1`.
        onto_stored: add to the base as its files have it, also where it was quantised in training.

    Raises:
        UserError: no LoRA, another base than one was trained on, more subtracted than there is, `output` exists.
        CheckFailedError: the proof failed; the result is kept as `NAME.rejected`.
        StorageError: disk full.
    """
    check_free(output, overwrite=overwrite)
    inputs = _read(adapters, onto_stored=onto_stored)
    base, source = inputs.base, local_directory(inputs.base, weights=True)
    skeleton = build_skeleton(base)
    held = dequantized_weights(skeleton, base.quantization or inputs.contents.quantization)
    layout = lay_out(skeleton, source, {**held, **inputs.updates})
    in_files = layout.in_files(inputs.updates if base.quantization is None else on_dequantized(held, inputs.updates))
    result_dtype = dtype or stored_dtype(source)
    dressed = _companions(inputs)

    with staged(output, overwrite=overwrite) as directory:
        # 1. The directory.
        rewrite(source, directory, in_files, dtype=dtype)
        new_tokens = sorted({token for one in inputs.loaded for token in one.new_tokens})
        write_config(source, directory, result_dtype, vocab_size=max(new_tokens, default=-1) + 1)
        copy_companions(dressed, directory)

        # 2. The proof, of what lies on the disk.
        changes = check_tensors(source, directory, in_files, dtype=dtype)
        restored = None
        if inputs.contents.adapters and not inputs.result.adapters:
            restored = compare_with_base(inputs.contents, source, directory, inputs.original, layout.in_files(held))
        whole = modules = None
        if proof == "full":
            merged = BaseModel(output.name, path=directory, trust_remote_code=base.trust_remote_code)
            tokenizer = load_tokenizer(merged) if has_tokenizer(directory) else None
            all_prompts = proof_prompts(tokenizer, template_kwargs(dressed), prompts)
            all_prompts += [new_tokens] if new_tokens else []
            other = inputs.trained_on if base.quantization is None else None
            trained_on = replace(base, quantization=other) if other is not None else None
            whole = prove_whole(
                inputs.loaded, base, merged, inputs.updates, all_prompts, result_dtype, trained_on=trained_on
            )
        elif proof == "modules":
            as_trained = held if base.quantization is not None else {}
            modules = prove_modules(inputs.loaded, inputs.updates, layout, source, directory, as_trained)

        # 3. The record, of a proof that failed too.
        report = _report(inputs, directory, proof, changes, whole, modules, restored)
        (directory / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        check_changed(changes, result_dtype)
        if restored is not None:
            check_restored(restored, inputs.contents.passes)
        if whole is not None:
            check_logits(whole.exact, whole.rounding)
        if modules is not None:
            check_modules(modules)
    return report


def _read(adapters: Sequence[WeightedAdapter], *, onto_stored: bool) -> _Inputs:
    base, identity = common_base(adapters)
    if (stored := stored_quantization(load_config(base))) is not None:
        what = f"{base.name} is stored in {stored}: there are no weights that an update could be added to"
        raise UserError(what, how="use the adapter without merging")
    contents = read_contents(base, identity)
    result = contents.after(adapters, identity)
    indirect = [one for one in adapters if check_base_of(one, read_identity(one.directory), contents, identity)]
    check_subtracted([adapter for adapter in indirect if adapter.weight < 0], contents, result, identity)
    loaded = [load_adapter(adapter, base) for adapter in adapters]
    for adapter, own in zip(adapters, loaded, strict=True):
        if adapter in indirect and own.depends_on_weight:
            what = f"{adapter.directory} is a DoRA: what it adds depends on the weights of the base it was trained on"
            raise UserError(what, how="merge into that base, or use it in place of the merged model")
    trained_on = common_quantization([one for one in adapters if one not in indirect])
    base = replace(base, quantization=None if onto_stored else trained_on)
    if base.quantization is not None:
        result = replace(result, quantization=base.quantization)
    original = find_original(contents.bases[0]) if contents.adapters and not result.adapters else None
    return _Inputs(adapters, loaded, sum_updates(loaded), base, identity, contents, result, original, trained_on)


def _companions(inputs: _Inputs) -> Target:
    """Where tokenizer, template and generation config come from."""
    added = next((adapter.target for adapter in inputs.adapters if adapter.weight > 0), None)
    if added is not None:
        return added
    model = inputs.original or inputs.base
    if has_tokenizer(local_directory(model, weights=False)):
        return Target(model.name, model, None, None, None, None)
    return inputs.adapters[0].target


def _report(
    inputs: _Inputs,
    directory: Path,
    proof: str,
    changes: Changes,
    whole: WholeProof | None,
    modules: ModulesProof | None,
    restored: Restored | None,
) -> MergeReport:
    return MergeReport(
        proof=proof,
        max_abs_logit_difference=whole.exact.max_abs_logit_difference if whole else None,
        max_abs_logit=whole.exact.max_abs_logit if whole else None,
        top1_agreement=whole.exact.top1_agreement if whole else None,
        max_abs_rounding_difference=whole.rounding.max_abs_logit_difference if whole and whole.rounding else None,
        cast=whole.cast if whole else None,
        modules=modules,
        tensors_changed=len(changes.altered),
        zero=changes.zero,
        rounded_away=changes.rounded_away,
        base_fingerprint=inputs.identity.fingerprint,
        fingerprint=hash_files(weight_files(directory)),
        adapters=tuple(adapter.describe() for adapter in inputs.adapters),
        contents=inputs.result,
        restored=restored,
        quantization=_quantization(inputs, whole),
    )


def _quantization(inputs: _Inputs, whole: WholeProof | None) -> Quantization | None:
    if inputs.trained_on is None:
        return None
    onto = "stored" if inputs.base.quantization is None else "dequantized"
    compared = (whole.training or whole.exact) if whole is not None else None
    difference = compared.max_abs_logit_difference if compared is not None else None
    return Quantization(inputs.trained_on, onto, difference, compared.top1_agreement if compared is not None else None)
