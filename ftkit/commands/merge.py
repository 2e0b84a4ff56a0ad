"""`ftkit merge`: fold LoRA adapters into the base weights, and prove that nothing else changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.console import Console
from ftkit.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def merge(
    adapters: Sequence[str],
    *,
    base: str | None = None,
    output: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Merge each ADAPTER[:WEIGHT] (a run, a checkpoint or an adapter directory) into their base, into `output`."""
    from ftkit.artifacts.adapters import WeightedAdapter, parse_adapter
    from ftkit.artifacts.merge import merge as merge_adapters
    from ftkit.runs import MERGED, find_target

    console = Console()
    result_dtype = as_dtype(dtype)
    named = [
        WeightedAdapter(find_target(name, base=base, offline=offline, trust_remote_code=trust_remote_code), weight)
        for name, weight in map(parse_adapter, adapters)
    ]
    target = named[0].target
    if output is None:
        if len(named) > 1:
            raise UserError("several adapters have no run in common to write to", how="say where with --output DIR")
        output = (target.run or named[0].directory.parent) / MERGED
    report = merge_adapters(named, output, dtype=result_dtype, overwrite=overwrite)
    relative = report.max_abs_logit_difference / report.max_abs_logit
    others = "copied bit for bit" if dtype is None else f"cast to {dtype}"
    if len(named) > 1 or named[0].weight != 1.0:
        console.line(f"adapters   {', '.join(f'{one.target.label} x {one.weight:g}' for one in named)}")
    console.line(f"merged     {report.tensors_changed} weights of {target.model.name}, all others {others}")
    console.line(
        f"proof      float32 logits differ by {report.max_abs_logit_difference:.2e} at most, "
        f"{relative:.1e} of the largest"
    )
    cast = report.cast
    console.line(
        f"precision  in {cast.dtype} they move by {cast.max_abs_logit_difference:.2g} "
        f"({100 * cast.top1_agreement:.1f}% of the top tokens stay); the base alone by "
        f"{cast.base_max_abs_logit_difference:.2g} ({100 * cast.base_top1_agreement:.1f}%)"
    )
    console.line(f"written to {output}", style="bold")
    console.line(f"  ftkit eval {output}" + ("" if target.run else " --suite FILE"))
    console.line(f"  vllm serve {output}")


def as_dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype that --dtype names; None stays None.

    Raises:
        UserError: there is no such precision.
    """
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise UserError(f"unknown --dtype {name}", how=f"choose one of {', '.join(DTYPES)}")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
