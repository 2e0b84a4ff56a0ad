"""`export --format hf`: a directory that `AutoModelForCausalLM.from_pretrained` and every server reads."""

from pathlib import Path

import torch

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.directory import copy_companions, staged, write_config
from ftkit.artifacts.merge import merge
from ftkit.artifacts.weights import copy_weights, rewrite
from ftkit.models.files import stored_dtype
from ftkit.models.load import load_config, local_directory
from ftkit.runs import Target


def export_hf(target: Target, output: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Write the model, with a LoRA merged first (proof included); see `Exporter` for the arguments and errors."""
    if target.adapter is not None:
        merge([WeightedAdapter(target)], output, dtype=dtype, overwrite=overwrite)
        return
    load_config(target.model)
    source = local_directory(target.model, weights=True)
    with staged(output, overwrite=overwrite) as directory:
        stored = stored_dtype(source)
        if dtype in (None, stored):
            copy_weights(source, directory)
        else:
            rewrite(source, directory, {}, dtype=dtype)
        write_config(source, directory, dtype or stored)
        copy_companions(target, directory)
