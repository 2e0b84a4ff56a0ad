"""`ftkit merge`: fold a LoRA into the base weights, and prove that nothing else changed."""

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
    """Merge ADAPTER (a run, a checkpoint or an adapter directory) into its base, written to `output`."""
    from ftkit.artifacts.merge import lora_of, single_adapter
    from ftkit.artifacts.merge import merge as merge_adapter
    from ftkit.runs import MERGED, find_target

    console = Console()
    result_dtype, name = as_dtype(dtype), single_adapter(adapters)
    target = find_target(name, base=base, offline=offline, trust_remote_code=trust_remote_code)
    output = output or (target.run or lora_of(target).parent) / MERGED
    report = merge_adapter(target, output, dtype=result_dtype, overwrite=overwrite)
    relative = report.max_abs_logit_difference / report.max_abs_logit
    others = "copied bit for bit" if dtype is None else f"cast to {dtype}"
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
