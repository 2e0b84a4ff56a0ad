"""A run's directory, and what TARGET means on the command line.

recipe.yaml        the resolved recipe
environment.json   versions, hardware, command line, fingerprints
metrics.jsonl      one object a logged step or evaluation
train.log          what the terminal showed
validation.json    row ids of the validation rows
checkpoints/       step-00000100/ ..., see training/checkpoint.py
adapter/ | model/  the result
"""

import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ftkit.errors import UserError
from ftkit.models.files import read_json
from ftkit.models.load import BaseModel, find_base
from ftkit.recipe.load import load_recipe, resolve
from ftkit.recipe.schema import ModelSection, Recipe

RECIPE, ENVIRONMENT, METRICS, LOG, VALIDATION = (
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "train.log",
    "validation.json",
)
CHECKPOINTS, ADAPTER, MODEL = "checkpoints", "adapter", "model"

PACKAGES = (
    "ftkit",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "pydantic",
)
"""Whose versions environment.json holds."""


# ---------------------------------------------------------------------------------------------------- naming


def new_run_directory(pattern: str, *, name: str, method: str, overwrite: bool) -> Path:
    """Create the directory of a new run from `output_dir`.

    `{n}` becomes the next free number; a name without it must be free, or is moved aside to `NAME.old-1` where
    `overwrite` says so.

    Raises:
        UserError: the directory holds a run, or something else.
    """
    text = _fill(pattern, name=name, method=method)
    if "{n}" in text:
        number = 1
        while True:
            path = Path(text.replace("{n}", str(number)))
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                number += 1
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file", key=("output_dir",), how="choose another output_dir")
    if path.is_dir() and any(entry.name != LOG for entry in path.iterdir()):
        if not overwrite:
            kind = "already holds a run" if (path / RECIPE).exists() else "is not empty"
            raise UserError(
                f"{path} {kind}",
                key=("output_dir",),
                how="go on with --resume, move it aside with --overwrite, or choose another output_dir "
                "(runs/{name}-{n} is always free)",
            )
        move_aside(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def discard_unstarted(run: Path) -> None:
    """Remove the directory of a run that failed before it wrote anything but its log."""
    if all(path.name == LOG for path in run.iterdir()):
        shutil.rmtree(run)


def move_aside(path: Path) -> Path:
    """Rename `path` to `NAME.old-1`, or the next free number; returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def newest_run_of(recipe: Recipe, pattern: str, *, name: str) -> Path | None:
    """The newest directory that a run of this recipe was written to, or None.

    `{n}` and `{time}` in the pattern stand for any; a directory counts if its recipe agrees, changes to how often is
    logged aside.
    """
    text = _fill(pattern, name=name, method=recipe.method.type, time_text="{time}")
    glob = re.sub(r"\{(n|time)\}", "*", text)
    parent = Path(glob).parent
    candidates = sorted(
        (path for path in parent.glob(Path(glob).name) if (path / RECIPE).is_file()),
        key=lambda path: (path / RECIPE).stat().st_mtime_ns,
        reverse=True,
    )
    for path in candidates:
        if agrees(path, recipe):
            return path
    return None


def agrees(run: Path, recipe: Recipe) -> bool:
    """Whether the run's recipe is `recipe` (resolved), changes to how often is logged aside."""
    try:
        theirs = resolve(load_recipe(run / RECIPE))
    except UserError:
        return False
    if recipe.model.revision is None:
        # A run's own recipe is pinned to the commit that it found.
        theirs = theirs.model_copy(update={"model": theirs.model.model_copy(update={"revision": None})})
    return _comparable(theirs) == _comparable(recipe)


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(exclude={"output_dir"})
    del values["training"]["logging_steps"]
    return values


def _fill(pattern: str, *, name: str, method: str, time_text: str | None = None) -> str:
    stamp = time_text or time.strftime("%Y%m%d-%H%M%S")
    return pattern.replace("{name}", name).replace("{method}", method).replace("{time}", stamp)


# ---------------------------------------------------------------------------------------------------- files


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run keeps what it logged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines = 0
        """Lines written so far."""
        if path.exists():
            self.lines = len(path.read_bytes().splitlines())

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.lines += 1

    def truncate(self, lines: int) -> None:
        """Keep the first `lines` lines: what a checkpoint had seen. Steps after it will be logged again."""
        kept = self._path.read_bytes().splitlines(keepends=True)[:lines] if self._path.exists() else []
        with self._path.open("ab") as file:
            # In place, which needs no space: a full disk cannot lose what is kept.
            file.truncate(sum(map(len, kept)))
        self.lines = len(kept)


def write_json(path: Path, values: Any) -> None:
    """Write JSON, readable by people, whole or not at all."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text through a temporary name, so that no half file is ever seen and a full disk keeps the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def describe_environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, hardware and command line, for environment.json. No environment variables: they hold secrets."""
    return {
        "command": ["ftkit", *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# ---------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What TARGET on the command line names: weights, and where their tokenizer and template lie."""

    label: str
    """As the user wrote it."""
    model: BaseModel
    """The full model: the base of an adapter, or the model itself."""
    adapter: Path | None
    """Directory of the adapter, where there is one."""
    tokenizer: Path | None
    """Directory of the tokenizer and chat template that go with the tuned weights; None: the model's own."""
    run: Path | None
    """The run it came from."""
    base: BaseModel | None
    """What it was tuned from: the model to compare with; None where it is no result of tuning."""

    @property
    def recipe(self) -> Recipe | None:
        """The run's recipe."""
        return load_recipe(self.run / RECIPE).recipe if self.run is not None else None


def find_target(
    text: str, *, base: str | None = None, offline: bool = False, trust_remote_code: bool = False
) -> Target:
    """Resolve a run directory, checkpoint, adapter, model directory, hub id or .gguf file.

    Args:
        base: the base model to use in place of the one that an adapter names.

    Raises:
        UserError: there is nothing that could be loaded.
    """
    section = ModelSection()

    def locate(name: str, where: ModelSection = section) -> BaseModel:
        return find_base(name, where, base=Path.cwd(), offline=offline, trust_remote_code=trust_remote_code)

    path = Path(text)
    if not path.is_dir():
        return Target(text, locate(text), None, None, None, None)
    run = _run_of(path)
    result = next((path / part for part in (ADAPTER, MODEL) if (path / part).is_dir()), path)
    if (result / "adapter_config.json").is_file():
        config = read_json(result / "adapter_config.json")
        name = base or config.get("base_model_name_or_path")
        if not name:
            raise UserError(f"{result} does not say which base model it belongs to", how="name it with --base")
        model = locate(name, ModelSection(revision=None if base else config.get("revision")))
        if run is not None and base is None:
            # A .gguf file is called by its name, not by that of the directory that it was converted to.
            model = replace(model, name=load_recipe(run / RECIPE).recipe.base_model)
        return Target(text, model, result, result, run, model)
    if (result / "config.json").is_file():
        tuned_from = None
        if run is not None:
            recipe = load_recipe(run / RECIPE).recipe
            tuned_from = locate(base or recipe.base_model, recipe.model)
        return Target(text, locate(str(result)), None, result, run, tuned_from)
    if run is not None:
        raise UserError(f"{path} holds no trained weights yet", how="finish it with `ftkit train RECIPE --resume`")
    raise UserError(
        f"{path} is neither a run, a checkpoint, an adapter nor a model",
        how="it needs recipe.yaml, adapter_config.json or config.json",
    )


def _run_of(path: Path) -> Path | None:
    """The run that `path` is, or lies in: RUN, RUN/adapter, RUN/merged, RUN/checkpoints/step-*."""
    for candidate in (path, *list(path.resolve().parents)[:3]):
        if (candidate / RECIPE).is_file() and (candidate / ENVIRONMENT).is_file():
            return candidate
    return None


def writable_directory(path: Path) -> None:
    """Create `path`.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}", how="choose another directory") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}", how="choose another directory")
