"""`ftkit export`: hand the result to the tools that people serve and share models with."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.commands.merge import as_dtype
from ftkit.console import Console
from ftkit.errors import UserError

if TYPE_CHECKING:
    from ftkit.runs import Target


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
    from ftkit.runs import EXPORT, find_target

    console = Console()
    write, result_dtype = find_exporter(format), None
    if format == "gguf" and dtype == Q8_0:
        write = partial(export_gguf, quantized=True)
    else:
        result_dtype = as_dtype(dtype)
    found = find_target(target, offline=offline, trust_remote_code=trust_remote_code)
    if output is None and found.run is None:
        raise UserError(f"{target} belongs to no run", how="say where to write with --output DIR")
    output = output or Path(found.run or "") / EXPORT
    write(found, output, dtype=result_dtype, overwrite=overwrite)
    console.line(f"written to {output}", style="bold")
    hindrance = _hindrance(found) if format == "adapter" else None
    if hindrance is not None:
        console.line(f"note: vLLM does not load it: {hindrance}; peft does")
        return
    for command in NEXT[format]:
        console.line("  " + command.format(output=output, base=found.model.name, rank=_served_rank(found)))


def _served_rank(target: "Target") -> int:
    """The rank that vLLM is to make room for: it knows certain sizes, and refuses adapters that are larger."""
    from ftkit.models.files import ADAPTER_CONFIG_NAME, read_json

    config = read_json(target.adapter / ADAPTER_CONFIG_NAME) if target.adapter is not None else {}
    largest = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    return next((size for size in VLLM_RANKS if size >= largest), largest)


def _hindrance(target: "Target") -> str | None:
    """Why a server that knows LoRA does not load the adapter, or would compute something else with it."""
    from ftkit.methods.files import LORA, read_quantization
    from ftkit.models.files import ADAPTER_CONFIG_NAME, read_json

    assert target.adapter is not None, "exported just now"
    config = read_json(target.adapter / ADAPTER_CONFIG_NAME)
    if config.get("peft_type") != LORA:
        return "it is no LoRA"
    if target.prompt is not None:
        return "it trained with the soft prompt in prompt/"
    if (form := read_quantization(target.adapter)) is not None:
        return f"it trained on the base in {form} (`ftkit merge {target.label}` makes a model of it)"
    for key, what in _BEYOND_LORA.items():
        if config.get(key):
            return f"it has {what} (`ftkit merge {target.label}` makes a model of it)"
    return None


_BEYOND_LORA = {
    "use_dora": "DoRA's lengths",
    "modules_to_save": "modules that trained in full",
    "trainable_token_indices": "rows of new tokens",
    "target_parameters": "updates of stacked experts",
}
"""Keys of peft's configuration."""


NEXT: dict[str, tuple[str, ...]] = {
    "hf": (
        "vllm serve {output}",
        "python -c \"from transformers import pipeline; print(pipeline('text-generation', '{output}'))\"",
    ),
    "gguf": ("llama-server -m {output}/*.gguf",),
    "adapter": ("vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={output}",),
}
"""Format -> commands to paste next."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that its --max-lora-rank takes."""
