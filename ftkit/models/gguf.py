"""Converting a .gguf file, once, into an ordinary Hugging Face directory in the user's cache."""

import io
import re
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ftkit.data.cache import cache_directory
from ftkit.errors import KeyPath, UserError
from ftkit.models.files import CONFIG_NAME, hash_files, storage_errors
from ftkit.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"

END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Where a GGUF keeps the tokens that end generation: end of text, end of turn, end of message (tool calls)."""

_REVISION = 2
"""Part of a directory's name; goes up when the same file is converted otherwise."""
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_INSTEAD = "name the model's original directory or hub id instead"


def convert_gguf(path: Path, *, key: KeyPath = ()) -> Path:
    """The directory with the model of a .gguf file: float32 weights, tokenizer, chat template, generation config.

    The directory is named by the file's SHA-256 and by a revision of this code, and written once. It is staged beside
    its place and renamed, so that a killed run leaves nothing behind that looks finished, and of two runs at once the
    slower one discards its own.

    Raises:
        UserError: the extra `gguf` is missing, or the file cannot be converted.
        StorageError: the cache is full or not writable.
    """
    _check_readable(path, key=key)
    directory = cache_directory() / "gguf" / f"{hash_files([path]).removeprefix('sha256:')}-{_REVISION}"
    if (directory / CONFIG_NAME).is_file():
        return directory
    what, how = f"cannot write the converted model to {directory.parent}", "free space there, or set FTKIT_CACHE"
    with storage_errors(what, how=how):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=directory.parent) as staging:
            finished = Path(staging) / "model"
            _write_directory(path, finished, key=key)
            _rename(finished, directory)
    return directory


def write_gguf_parts(path: Path, directory: Path, *, key: KeyPath = ()) -> None:
    """Write configuration, tokenizer and generation config of a .gguf file to `directory`, without reading its weights.

    Raises:
        UserError: as `convert_gguf`.
    """
    _check_readable(path, key=key)
    from gguf import GGUFReader

    quiet_transformers()
    try:
        reader = GGUFReader(path)
        # transformers would read the file once for each, which takes seconds a time.
        with redirect_stderr(io.StringIO()), patch("gguf.GGUFReader", lambda *_, **__: reader):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            tokenizer = read_tokenizer(path, reader)
    except Exception as error:  # the tokenizers library raises the base class itself
        raise _unreadable(path, error, key) from None
    check_rotary(path, reader, config, key=key)
    config.save_pretrained(directory)
    _save_tokenizer(tokenizer, config, directory)
    _generation_config(tokenizer, reader).save_pretrained(directory)


def _check_readable(path: Path, *, key: KeyPath) -> None:
    if find_spec("gguf") is None:
        raise UserError("a .gguf base needs the gguf package", how="pip install 'ftkit[gguf]'", key=key)
    if _PART.search(path.name):
        how = "join the parts first: llama-gguf-split --merge FIRST_PART JOINED.gguf"
        raise UserError(f"{path} is one of several parts of a model", how=how, key=key)
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is not a GGUF file", how="download it again", key=key)


def _write_directory(path: Path, directory: Path, *, key: KeyPath) -> None:
    from gguf import GGUFReader

    quiet_transformers()
    # transformers shows a bar of its own here; at a terminal it is welcome, the conversion takes a while.
    bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with bar:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                local_files_only=True,
                dtype=torch.float32,
                # Without it weights may stay packed, and such a model refuses to be saved.
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        reader = GGUFReader(path)
        tokenizer = read_tokenizer(path, reader)
    except Exception as error:  # the tokenizers library raises the base class itself
        raise _unreadable(path, error, key) from None
    model, info = loaded
    if info["missing_keys"]:
        what = f"{path} lacks weights of its model, e.g. {min(info['missing_keys'])}"
        raise UserError(what, how=_INSTEAD, key=key)
    check_rotary(path, reader, model.config, key=key)

    model.generation_config = _generation_config(tokenizer, reader)
    model.save_pretrained(directory)
    _save_tokenizer(tokenizer, model.config, directory)


def _unreadable(path: Path, error: Exception, key: KeyPath) -> UserError:
    reason = str(error).strip().split("\n")[0]
    return UserError(f"{path} cannot be converted: {reason}", how=_INSTEAD, key=key)


def _save_tokenizer(tokenizer: Any, config: PreTrainedConfig, directory: Path) -> None:
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    tokenizer.save_pretrained(directory)


def _generation_config(tokenizer: Any, reader: "GGUFReader") -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_tokens(reader), pad_token_id=tokenizer.pad_token_id
    )


def read_tokenizer(path: Path, reader: "GGUFReader") -> PreTrainedTokenizerBase:
    """The tokenizer of a .gguf file, which cuts a text into the same pieces as llama.cpp before it looks for tokens.

    transformers' reader does not ask how: SmolLM's tokens for " ½" would be others than in its training.
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    field = reader.get_field("tokenizer.ggml.pre")
    if field is not None and (cut := _PRE_TOKENIZERS.get(field.contents())) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = cut
    return tokenizer


_PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
}
"""`tokenizer.ggml.pre` -> what the model's own tokenizer.json has, where transformers makes up another."""


def check_rotary(path: Path, reader: "GGUFReader", config: PreTrainedConfig, *, key: KeyPath) -> None:
    """Refuse a file whose rotary positions are scaled (Llama 3.1, YaRN) where transformers' reader drops the scaling.

    Such a model loads without a word, gives other logits, and is worse the longer the text.
    """
    names = {tensor.name for tensor in reader.tensors}
    scaled = any(name.startswith(("rope_freqs", "rope_factors")) for name in names) or any(
        name.endswith(".rope.scaling.type") and field.contents() != "none" for name, field in reader.fields.items()
    )
    rope = getattr(config, "rope_parameters", None) or {}
    if scaled and rope.get("rope_type", "default") == "default":
        what = f"{path} scales its rotary positions, and the conversion would lose that"
        raise UserError(what, how=_INSTEAD, key=key)


def end_tokens(reader: "GGUFReader") -> int | list[int] | None:
    """Every token that ends an answer counts, not only the end of text."""
    fields = [reader.get_field(f"tokenizer.ggml.{name}") for name in END_TOKEN_KEYS]
    ends = list(dict.fromkeys(int(field.contents()) for field in fields if field is not None))
    return ends[0] if len(ends) == 1 else ends or None


def _rename(finished: Path, directory: Path) -> None:
    try:
        finished.rename(directory)
    except OSError:
        # Another run was faster: the directories are equal.
        if not (directory / CONFIG_NAME).is_file():
            raise
