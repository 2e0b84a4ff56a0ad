"""`ftkit merge`: fold LoRA adapters into the base weights, or take them off again, and prove the result."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.console import Console
from ftkit.errors import UserError

if TYPE_CHECKING:
    import torch

    from ftkit.artifacts.merge import MergeReport, Quantization
    from ftkit.artifacts.restored import Restored

DTYPES = ("float32", "bfloat16", "float16")
SHORT = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16", "fp16": "float16"}
"""llama.cpp's and Accelerate's names for them."""


def merge(
    adapters: Sequence[str],
    *,
    base: str | None = None,
    output: Path | None = None,
    dtype: str | None = None,
    proof: str = "full",
    overwrite: bool = False,
    onto_stored: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Merge each ADAPTER[:WEIGHT] (a run, a checkpoint or an adapter directory) into their base, into `output`."""
    from ftkit.artifacts.adapters import WeightedAdapter, parse_adapter
    from ftkit.artifacts.merge import PROOFS
    from ftkit.artifacts.merge import merge as merge_adapters
    from ftkit.artifacts.serving import after_model
    from ftkit.runs import MERGED, find_target

    console = Console()
    result_dtype = as_dtype(dtype)
    if proof not in PROOFS:
        raise UserError(f"unknown --proof {proof}", how=f"choose one of {', '.join(PROOFS)}")
    named = [
        WeightedAdapter(find_target(name, base=base, offline=offline, trust_remote_code=trust_remote_code), weight)
        for name, weight in map(parse_adapter, adapters)
    ]
    target = named[0].target
    if output is None:
        if len(named) > 1:
            raise UserError("several adapters have no run in common to write to", how="say where with --output DIR")
        if named[0].weight < 0:
            raise UserError("the model without the adapter has no place of its own", how="say where with --output DIR")
        output = (target.run or named[0].directory.parent) / MERGED
    report = merge_adapters(
        named, output, dtype=result_dtype, proof=proof, overwrite=overwrite, onto_stored=onto_stored
    )
    others = "copied bit for bit" if dtype is None else f"cast to {dtype}"
    if report.quantization is not None and report.quantization.merged_onto == "dequantized":
        others = f"other quantized ones dequantized, the rest {others}"
    else:
        others = f"all others {others}"
    if len(named) > 1 or named[0].weight != 1.0:
        console.line(f"adapters   {', '.join(f'{one.target.label} x {one.weight:g}' for one in named)}")
    console.line(f"merged     {report.tensors_changed} weights of {target.model.name}, {others}")
    if report.quantization is not None:
        console.line(_quantization(report.quantization))
    for line in (*_unchanged(report), *_proof(report)):
        console.line(line)
    if report.restored is not None:
        console.line(_restored(report.restored))
    console.line(f"written to {output}", style="bold")
    # Of several adapters, or one that was taken off, there is no run to compare with.
    made_of = target if len(named) == 1 and named[0].weight == 1.0 else None
    for line in after_model(made_of, output):
        console.line(line)


def _unchanged(report: "MergeReport") -> Iterator[str]:
    """What the adapters name and did not change."""
    if report.zero:
        yield f"unchanged  {len(report.zero)} more, since the update is zero: {_first(report.zero)}"
    if report.rounded_away:
        yield f"unchanged  {len(report.rounded_away)} more, since the update is lost in rounding: " + _first(
            report.rounded_away
        )


def _proof(report: "MergeReport") -> Iterator[str]:
    if report.max_abs_logit_difference is not None and report.max_abs_logit is not None:
        rounding = report.max_abs_rounding_difference
        relative = report.max_abs_logit_difference / report.max_abs_logit if report.max_abs_logit else 0.0
        yield (
            f"proof      float32 logits differ by {report.max_abs_logit_difference:.2e} at most, "
            f"{relative:.1e} of the largest"
            + (f"; moving each weight by a rounding step makes {rounding:.2e}" if rounding else "")
        )
    if (cast := report.cast) is not None:
        yield (
            f"precision  in {cast.dtype} they move by {cast.max_abs_logit_difference:.2g} "
            f"({100 * cast.top1_agreement:.1f}% of the top tokens stay); the base alone by "
            f"{cast.base_max_abs_logit_difference:.2g} ({100 * cast.base_top1_agreement:.1f}%)"
        )
    if (modules := report.modules) is not None:
        yield (
            f"proof      float32 outputs of {modules.modules} modules differ by {modules.max_relative_difference:.1e} "
            f"of a module's largest at most"
        )
        yield f"precision  as they are stored by {modules.stored_max_relative_difference:.1e}"
    if report.proof == "none":
        yield "proof      none of what it computes; the files are the sum bit for bit"


def _quantization(found: "Quantization") -> str:
    if found.merged_onto == "dequantized":
        return f"base       as it was trained on: in {found.trained_on}, dequantized; the result is the trained model"
    line = f"base       as it is stored; the adapter was trained on it in {found.trained_on}"
    if found.max_abs_logit_difference is None or found.top1_agreement is None:
        return f"{line}: the result is not the trained model"
    agreement = f"{100 * found.top1_agreement:.1f}% of the top tokens stay"
    return f"{line}, from which logits differ by {found.max_abs_logit_difference:.2g} ({agreement})"


def _restored(restored: "Restored") -> str:
    if restored.exact:
        return f"restored   {restored.base} bit for bit ({restored.fingerprint})"
    if (distance := restored.distance) is None:
        return f"restored   not bit for bit: {restored.reason}"
    return (
        f"restored   {restored.base}; {distance.differing:,} of {distance.elements:,} values differ, by "
        f"{distance.max_ulps:,} ulp ({distance.max_abs_difference:.2g}) at most: {restored.reason}"
    )


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def as_dtype(name: str | None, *, also: str | None = None) -> "torch.dtype | None":
    """The torch dtype that --dtype names; None stays None.

    Args:
        also: a choice that the caller deals with itself, to be named beside the others.

    Raises:
        UserError: there is no such precision.
    """
    import torch

    if name is None:
        return None
    name = SHORT.get(name, name)
    if name not in DTYPES:
        if name == "q8_0":
            raise UserError("q8_0 is a precision of .gguf files", how="give --format gguf, or another --dtype")
        choices = [*DTYPES, *([also] if also else [])]
        raise UserError(f"unknown --dtype {name}", how=f"choose one of {', '.join(choices)}")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
