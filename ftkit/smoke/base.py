"""The base of a smoke run: the configuration and tokenizer of the recipe's, and random weights of a small copy."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.errors import FtkitError, UserError
from ftkit.models.files import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_PATTERNS,
    TOKENIZER_PATTERNS,
    copy_matching,
    read_json,
)
from ftkit.models.gguf import write_gguf_parts
from ftkit.models.hub import BASE_KEY
from ftkit.models.load import HUB_PREFIX, find_base, local_directory
from ftkit.models.narrow_copy import narrow_copy
from ftkit.models.quantization import check_available
from ftkit.recipe.load import LoadedRecipe

CPU = torch.device("cpu")
STORED = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions that the copy's weights are stored in, if they are the base's."""


@dataclass(frozen=True)
class Parts:
    """Configuration and tokenizer of a base, in a directory without weights."""

    directory: Path
    stored_quantization: str | None
    """What the base's files hold its linear layers in; the directory's configuration does not say it."""


def gather_parts(
    loaded: LoadedRecipe, directory: Path, *, model: Path | None, offline: bool, trust_remote_code: bool
) -> Parts:
    """Copy what there is of the recipe's base besides weights to `directory`, fetching it where it is on the hub.

    Args:
        model: a directory (or .gguf file) to take it from instead, without any network.

    Raises:
        FtkitError: it cannot be had.
    """
    section, name, start = loaded.recipe.model, loaded.recipe.base_model, loaded.directory(BASE_KEY)
    if model is not None:
        if not model.exists():
            raise UserError(f"no such directory: {model}", how="name one with config.json and tokenizer.json")
        section, name, start = section.model_copy(update={"revision": None}), str(model), Path.cwd()
    directory.mkdir()
    file = start / Path(name).expanduser()
    if not name.startswith(HUB_PREFIX) and file.is_file() and file.suffix == ".gguf":
        write_gguf_parts(file, directory, key=BASE_KEY)
    else:
        base = find_base(name, section, base=start, offline=offline, trust_remote_code=trust_remote_code, weights=False)
        code = ("*.py",) if trust_remote_code else ()
        names = (CONFIG_NAME, GENERATION_CONFIG_NAME, *TOKENIZER_PATTERNS, *PROCESSOR_PATTERNS, *code)
        copy_matching(local_directory(base, weights=False), directory, names)
    return Parts(directory, _take_quantization(directory / CONFIG_NAME))


def _take_quantization(path: Path) -> str | None:
    """Drop from a configuration that bitsandbytes has quantized the weights; returns how."""
    config = read_json(path)
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") != "bitsandbytes":
        return None
    del config["quantization_config"]
    path.write_text(json.dumps(config), encoding="utf-8")
    return "nf4" if stored.get("load_in_4bit") else "int8"


def runnable_quantization(wanted: str | None) -> tuple[str | None, str | None]:
    """What this machine can keep frozen weights in instead of `wanted`, and why not in that; None where it can."""
    try:
        check_available(wanted)
    except FtkitError as error:
        return "int8", f"int8 in place of {wanted}: {error.problems[0].what}"
    return wanted, None


def write_base(config: PreTrainedConfig, parts: Parts, directory: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """Write a small random copy with the tokenizer of `parts` as an ordinary model; returns it as it is stored.

    Raises:
        UserError: the architecture does not bear being cut.
    """
    try:
        model = narrow_copy(config, trust_remote_code=trust_remote_code)
    # Any model's code may fail in any way on a configuration that was cut.
    except Exception as error:
        what = f"no small copy of this model can be built ({type(error).__name__}: {str(error).splitlines()[0][:160]})"
        raise UserError(what, how="try it with training.max_steps=2 and its own weights", key=BASE_KEY) from None
    dtype = config.get_text_config(decoder=True).dtype
    torch.nn.Module.to(model, dtype if dtype in STORED else torch.float32)
    model.save_pretrained(directory)
    code = ("*.py",) if trust_remote_code else ()
    names = (GENERATION_CONFIG_NAME, *TOKENIZER_PATTERNS, *PROCESSOR_PATTERNS, *code)
    (directory / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
    copy_matching(parts.directory, directory, names)
    return model
