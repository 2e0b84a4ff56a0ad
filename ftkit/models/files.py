"""The files of a Hugging Face model directory: its weights, whether they are all there, what they hash to, writing."""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ftkit.errors import KeyPath, StorageError, UserError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
GENERATION_CONFIG_NAME = "generation_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates",
)
"""Everything that makes a tokenizer and its chat templates."""
PROCESSOR_PATTERNS = ("*processor_config.json",)
"""How a multimodal model prepares images, video and sound: preprocessor_config.json, processor_config.json, ..."""
TEMPLATE_NAME, PROCESSOR_TEMPLATE_NAME = "chat_template.jinja", "chat_template.json"
"""The chat template, and where older processors keep one of their own: none may speak for another."""

RESTORE = "restore or download the file again"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SAFETENSORS_REMEDY = (
    "if you trust the files, write them anew as safetensors: "
    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIRECTORY)"
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON: {error}", how=RESTORE, where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", how=RESTORE, where=str(path))
    return content


def shard_names(directory: Path) -> list[str]:
    """Names of the weight files that the index lists (or of the single file), sorted; they need not exist."""
    index = directory / INDEX_NAME
    if (directory / WEIGHTS_NAME).is_file() or not index.is_file():
        # transformers too takes the single file where both exist.
        return [WEIGHTS_NAME]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("has no weight_map", how=RESTORE, where=str(index))
    return sorted(set(weight_map.values()))


def weight_files(directory: Path, *, key: KeyPath = ()) -> list[Path]:
    """The safetensors files that make up the model in `directory`, sorted by name.

    Raises:
        UserError: there are none, or some of those that the index lists are missing.
    """
    names = shard_names(directory)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing == [WEIGHTS_NAME]:
        raise no_weights(str(directory), (path.name for path in directory.iterdir()), key=key)
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of the {len(names)} weight files that {INDEX_NAME} lists: {missing[0]}",
            how="download the model again",
            key=key,
        )
    return [directory / name for name in names]


def no_weights(where: str, names: Iterable[str], *, key: KeyPath = ()) -> UserError:
    """The error for a directory or repository with these file names and without safetensors weights."""
    names = sorted(names)
    if pickled := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        what = f"{where} holds its weights only as a pickle file ({pickled[0]}), which can run code when it is read"
        return UserError(what, how=SAFETENSORS_REMEDY, key=key)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return UserError(f"{where} holds its weights only as GGUF", how=f"name the file itself: {ggufs[0]}", key=key)
    return UserError(f"{where} holds no weights ({WEIGHTS_NAME})", how="name a directory that holds a model", key=key)


def copy_matching(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy files and folders of `source` whose names match one of `patterns`, links as what they point at."""
    for path in {path for pattern in patterns for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def check_model_directory(directory: Path, *, key: KeyPath = (), weights: bool = True) -> None:
    """Check that `directory` holds a configuration and all of its weights, which may be missing without `weights`.

    Raises:
        UserError: what is missing, and where the model might be.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise UserError(f"{directory} is not a model: it has no {CONFIG_NAME}", how=_instead_of(directory), key=key)
    if (directory / ADAPTER_CONFIG_NAME).is_file():
        # transformers would load the adapter on top without a word.
        raise UserError(
            f"{directory} holds an adapter ({ADAPTER_CONFIG_NAME}) beside its model",
            how="move the adapter's files to a directory of their own",
            key=key,
        )
    if weights:
        weight_files(directory, key=key)


def _instead_of(directory: Path) -> str:
    if (directory / ADAPTER_CONFIG_NAME).is_file():
        base = read_json(directory / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
        return f"it is an adapter: name the model it was trained on{f' ({base})' if base else ''}, or merge it first"
    for inner in ("model", "merged"):
        if (directory / inner / CONFIG_NAME).is_file():
            return f"did you mean {directory / inner}?"
    if (directory / "adapter" / ADAPTER_CONFIG_NAME).is_file():
        return f"it is a run: `ftkit merge {shlex.quote(str(directory))}` makes a model of it"
    if ggufs := sorted(directory.glob("*.gguf")):
        return f"did you mean {ggufs[0]}?"
    return f"name a directory that holds {CONFIG_NAME} and {WEIGHTS_NAME}, or a hub id"


def hash_files(paths: Iterable[Path]) -> str:
    """ "sha256:HEX" over the bytes of the files one after another: `cat FILES | sha256sum`."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def storage_errors(what: str, *, how: str, where: str | None = None) -> Iterator[None]:
    """Files are written inside this context: what a full or failing disk raises there becomes a StorageError.

    Args:
        what: what could not be done; the reason is added.
    """
    try:
        yield
    except Exception as error:
        reason = _disk_failure(error)
        if reason is None:
            raise
        raise StorageError(f"{what}: {reason}", how=how, where=where) from error


def _disk_failure(error: Exception) -> str | None:
    """The reason in the system's words, or None where it is not the disk's fault."""
    if isinstance(error, shutil.Error):
        # copytree goes on after an error and then reports all of them: (source, target, error as text).
        reason = str(error.args[0][0][2])
        return by_system[1] if (by_system := re.match(r"\[Errno \d+\] ([^:]+)", reason)) else reason
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors has an error of its own for a full disk, tokenizers raises the base class itself.
    by_system = re.search(r"([^:]+) \(os error \d+\)", str(error))
    if isinstance(error, SafetensorError) or (type(error) is Exception and by_system):
        return by_system[1].strip() if by_system else str(error)
    return None


def flush(directory: Path) -> None:
    """Force a directory, with everything in it, to the disk."""
    for path in (*directory.rglob("*"), directory):
        flush_entry(path)


def flush_entry(path: Path) -> None:
    """Force one file, or the names in one directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stored_dtype(directory: Path) -> torch.dtype:
    """The precision that most floating-point values of a model's files have, whatever its configuration says."""
    values: Counter[torch.dtype] = Counter()
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)  # mapped, not read
                if tensor.is_floating_point():
                    values[tensor.dtype] += tensor.numel()
    return values.most_common(1)[0][0]


class TensorFiles:
    """The tensors of a model's files by name, each mapped, not read, until it is used. A context manager."""

    def __init__(self, directory: Path) -> None:
        """Open the files.

        Raises:
            UserError: some are missing or damaged.
        """
        self._opened = ExitStack()
        self._files: dict[str, Any] = {}
        for path in weight_files(directory):
            try:
                file = self._opened.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                self._opened.close()
                raise UserError(f"is damaged ({error})", how="copy or download it again", where=str(path)) from None
            self._files |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> list[str]:
        """In the order of the files."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> list[int]:
        """Of a tensor that is not read."""
        shape: list[int] = self._files[name].get_slice(name).get_shape()
        return shape

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()
