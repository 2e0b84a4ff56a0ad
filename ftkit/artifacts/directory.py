"""Writing a model directory: staged beside its place and renamed, with tokenizer, template and generation config."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ftkit.data.chat import ChatTemplate
from ftkit.errors import CheckFailedError, UserError
from ftkit.models.files import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_PATTERNS,
    PROCESSOR_TEMPLATE_NAME,
    TEMPLATE_NAME,
    TOKENIZER_PATTERNS,
    copy_matching,
    read_json,
    storage_errors,
)
from ftkit.models.load import TOKENIZER_FILES, BaseModel, load_tokenizer, local_directory
from ftkit.runs import Target, move_aside

LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")


@contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to write into, which becomes `output` at the end, whole or not at all.

    An `output` that exists is moved to `NAME.old-1` where `overwrite` says so. Where a check fails, what was written is
    kept as `NAME.rejected`; after any other error nothing is left.

    Raises:
        UserError: `output` exists and is not empty.
        StorageError: disk full, permission denied.
    """
    output = output.absolute()
    check_free(output, overwrite=overwrite)
    staging: Path | None = None
    try:
        with storage_errors(f"cannot write {output}", how="free space, or choose another --output"):
            _make_parent(output)
            # mkdtemp keeps its directory to its owner; the one inside gets the user's usual permissions.
            staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
            content = staging / output.name
            content.mkdir()
            try:
                yield content
            except CheckFailedError as error:
                rejected = output.with_name(f"{output.name}.rejected")
                _make_way(rejected)
                content.rename(rejected)
                kept = [replace(problem, what=f"{problem.what} (kept as {rejected})") for problem in error.problems]
                raise CheckFailedError.of(kept) from None
            for path in content.iterdir():
                if path.is_file():
                    # safetensors writes files that only their owner may read, whatever the umask.
                    path.chmod(content.stat().st_mode & 0o666)
            _make_way(output)
            content.rename(output)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _make_parent(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        what = f"cannot create {output.parent}: {(error.strerror or '').lower()}"
        raise UserError(what, how="choose another --output") from None


def check_free(output: Path, *, overwrite: bool) -> None:
    """Check that `output` does not exist, is empty, or may be moved aside: before hours of work, not after.

    Raises:
        UserError: it is taken.
    """
    if not overwrite and _is_taken(output):
        raise UserError(f"{output} exists already", how="choose another --output, or --overwrite moves it aside")


def copy_companions(target: Target, directory: Path) -> None:
    """Write what belongs to the weights: tokenizer, template, processors, generation config, licence, own code.

    What training left beside the tuned weights goes before the base's own.

    Args:
        directory: holds config.json already.
    """
    source = local_directory(target.model, weights=False)
    copy_matching(source, directory, (*LICENCE_PATTERNS, *PROCESSOR_PATTERNS))
    if target.model.trust_remote_code:
        copy_matching(source, directory, ("*.py",))
    places = [place for place in (target.tokenizer, source) if place is not None]
    with_tokenizer = next((place for place in places if has_tokenizer(place)), None)
    if with_tokenizer is not None:
        copy_matching(with_tokenizer, directory, TOKENIZER_PATTERNS)
    if not (directory / TEMPLATE_NAME).is_file():
        copy_matching(source, directory, (PROCESSOR_TEMPLATE_NAME,))
    with_generation = next((place for place in places if (place / GENERATION_CONFIG_NAME).is_file()), None)
    tokenizer = load_tokenizer(BaseModel(str(directory), path=directory)) if with_tokenizer is not None else None
    kwargs = template_kwargs(target)
    write_generation_config(directory, with_generation, tokenizer, chat_template_kwargs=kwargs)


def template_kwargs(target: Target) -> Mapping[str, Any]:
    """What the run that `target` comes from hands to its chat template."""
    recipe = target.recipe
    return recipe.data.chat_template_kwargs if recipe is not None else {}


def has_tokenizer(directory: Path) -> bool:
    """Whether `directory` holds a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def write_generation_config(
    target: Path,
    source: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat_template_kwargs: Mapping[str, Any],
) -> None:
    """Write generation_config.json with every token that ends a turn of the chat template, so that generation stops.

    Args:
        target: a directory that holds config.json.
        source: directory whose generation config is taken over; None: derived from config.json.
        tokenizer: with the chat template; None, or one without a template, adds no token.
    """
    if source is not None:
        values = read_json(source / GENERATION_CONFIG_NAME)
    else:
        config = read_json(target / CONFIG_NAME)
        values = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    ends: list[int] = []
    if tokenizer is not None and tokenizer.chat_template:
        ends = list(ChatTemplate(tokenizer, tokenizer.chat_template, chat_template_kwargs).end_of_turn_ids)
    known = values.get("eos_token_id")
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends = list(dict.fromkeys([*ends, *known]))
    if ends:
        values["eos_token_id"] = ends
    # As JSON: transformers refuses to save some configurations that models in the field come with.
    _write_json(target / GENERATION_CONFIG_NAME, values)


def write_config(source: Path, target: Path, dtype: torch.dtype, *, vocab_size: int = 0) -> None:
    """Copy config.json, saying `dtype` under the key that the file uses for it; where it is another, of parts too.

    Args:
        vocab_size: rows that embedding and head have at least, those of new tokens included.
    """
    config = read_json(source / CONFIG_NAME)
    name = str(dtype).removeprefix("torch.")
    # transformers before 5 writes and reads torch_dtype.
    keys = ("torch_dtype", "dtype")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != name:
        for part in (value for value in config.values() if isinstance(value, dict)):
            part |= {own: name for own in keys if part.get(own) is not None}
    config[key] = name
    for sizes in (config, config.get("text_config") or {}):
        if sizes.get("vocab_size") is not None:
            sizes["vocab_size"] = max(sizes["vocab_size"], vocab_size)
    _write_json(target / CONFIG_NAME, config)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_taken(output: Path) -> bool:
    return output.is_file() or (output.is_dir() and any(output.iterdir()))


def _make_way(output: Path) -> None:
    if _is_taken(output):
        move_aside(output)
    elif output.is_dir():
        output.rmdir()
