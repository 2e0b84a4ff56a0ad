"""`ftkit export`: hand the result to the tools that people serve and share models with."""

from functools import partial
from pathlib import Path

from ftkit.commands.merge import as_dtype
from ftkit.console import Console
from ftkit.errors import UserError


def export(
    target: str,
    *,
    format: str,
    output: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write TARGET in `format`: a model directory, or peft's adapter files."""
    from ftkit.artifacts.export import find_exporter
    from ftkit.artifacts.export_gguf import Q8_0, export_gguf
    from ftkit.artifacts.serving import after_export
    from ftkit.runs import EXPORT, find_target

    console = Console()
    write, result_dtype = find_exporter(format), None
    if format == "gguf" and dtype == Q8_0:
        write = partial(export_gguf, quantized=True)
    else:
        result_dtype = as_dtype(dtype, also=Q8_0 if format == "gguf" else None)
    found = find_target(target, offline=offline, trust_remote_code=trust_remote_code)
    if output is None and found.run is None:
        raise UserError(f"{target} belongs to no run", how="say where to write with --output DIR")
    output = output or Path(found.run or "") / EXPORT
    write(found, output, dtype=result_dtype, overwrite=overwrite)
    console.line(f"written to {output}", style="bold")
    for line in after_export(found, output, format):
        console.line(line)
