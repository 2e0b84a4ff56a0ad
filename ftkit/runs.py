"""A run's directory, and what TARGET means on the command line.

recipe.yaml        the resolved recipe
environment.json   versions, hardware, command line, fingerprints
metrics.jsonl      one object a logged step or evaluation
train.log          what the terminal showed
validation.json    row ids of the validation rows
checkpoints/       step-00000100/ ..., see training/checkpoint.py
adapter/ | model/  the result; prompt/ a soft prompt beside an adapter
merged/, export/   what `ftkit merge` and `ftkit export` make of it
"""

import difflib
import errno
import glob
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ftkit.errors import UserError
from ftkit.lock import refuse_if_locked
from ftkit.methods.beside import DIRECTORY as PROMPT
from ftkit.methods.beside import prompt_beside, prompt_inside
from ftkit.methods.files import BaseIdentity, read_quantization
from ftkit.models.files import read_json
from ftkit.models.load import BaseModel, find_base
from ftkit.recipe.load import load_recipe
from ftkit.recipe.schema import ModelSection, Recipe

RECIPE, ENVIRONMENT, METRICS = "recipe.yaml", "environment.json", "metrics.jsonl"
LOG, VALIDATION = "train.log", "validation.json"
CHECKPOINTS, ADAPTER, MODEL, MERGED, EXPORT = "checkpoints", "adapter", "model", "merged", "export"
RESULTS = (ADAPTER, PROMPT, MODEL, MERGED, EXPORT)
"""What follows from the run's weights, and no longer does once it goes on."""
STEPS, BASE, DATA, BUDGET = "optimizer_steps", "base_model", "data_fingerprint", "micro_batch"
"""Keys of environment.json: the length that the run was planned to, the `BaseIdentity`, the `Budget`."""
_UNIQUE = {"{n}": r"\d+", "{time}": r"\d{8}-\d{6}"}
"""Placeholder of `output_dir` that differs from run to run -> what it is filled with, as a regular expression."""
_NO_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
"""What a directory cannot be created for because of its path alone."""

PACKAGES: tuple[str, ...] = ("ftkit", "torch", "transformers", "accelerate", "datasets")
PACKAGES += ("safetensors", "tokenizers", "numpy", "pydantic")
"""Whose versions environment.json holds."""


# ---------------------------------------------------------------------------------------------------- naming


def new_run_directory(pattern: str, *, name: str, method: str, overwrite: bool) -> tuple[Path, Path | None]:
    """Create the directory of a new run from `output_dir`.

    `{n}` becomes the next free number; a name without it must be free, or is moved aside to `NAME.old-1` where
    `overwrite` says so.

    Returns:
        The directory, and where the one that was in the way was moved to.

    Raises:
        UserError: the directory holds a run, or something else; another process is writing to it; no directory can have
            this name.
    """
    text = fill_output(pattern, name=name, method=method)
    try:
        return (_numbered(text), None) if "{n}" in text else _named(Path(text), overwrite=overwrite)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        what = f"cannot create {text}: {(error.strerror or '').lower()}"
        raise UserError(what, key=("output_dir",), how="choose another output_dir") from None


def _numbered(text: str) -> Path:
    number = 1
    while True:
        path = Path(text.replace("{n}", str(number)))
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def _named(path: Path, *, overwrite: bool) -> tuple[Path, Path | None]:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file", key=("output_dir",), how="choose another output_dir")
    aside = None
    if path.is_dir() and any(entry.name != LOG for entry in path.iterdir()):
        if not overwrite:
            kind = "already holds a run" if (path / RECIPE).exists() else "is not empty"
            raise UserError(
                f"{path} {kind}",
                key=("output_dir",),
                how="go on with --resume, move it aside with --overwrite, or choose another output_dir "
                "(runs/{name}-{n} is always free)",
            )
        refuse_if_locked(path / LOG)
        aside = move_aside(path)
    path.mkdir(parents=True, exist_ok=True)
    return path, aside


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


def has_result(run: Path) -> bool:
    """Whether the run is finished: it holds its trained weights."""
    return any((run / name).is_dir() for name in (ADAPTER, MODEL))


def set_aside_results(run: Path) -> None:
    """Rename what follows from the run's weights to `NAME.old-1`: kept, and no longer taken for the run's."""
    for name in RESULTS:
        if (run / name).exists():
            move_aside(run / name)


def find_runs(pattern: str, *, name: str, method: str) -> list[Path]:
    """The directories of runs that `output_dir`'s pattern stands for, whatever `{n}` and `{time}` are; newest first."""
    text = str(Path(fill_output(pattern, name=name, method=method, time_text="{time}")))
    pieces = re.split(r"(\{n\}|\{time\})", text)
    found = glob.glob("".join("*" if piece in _UNIQUE else glob.escape(piece) for piece in pieces))
    # Only what placeholders are filled with: not runs that were moved aside, nor those of recipe-b for recipe-{n}.
    exact = re.compile("".join(_UNIQUE.get(piece, re.escape(piece)) for piece in pieces))
    runs = [Path(path) for path in found if exact.fullmatch(path) and (Path(path) / RECIPE).is_file()]
    return sorted(runs, key=lambda path: (path / RECIPE).stat().st_mtime_ns, reverse=True)


def planned_steps(run: Path) -> int | None:
    """Optimizer steps that the run was planned to when it last started; None where it does not say."""
    steps = recorded_environment(run).get(STEPS)
    return steps if isinstance(steps, int) else None


def recorded_base(run: Path) -> BaseIdentity | None:
    """The base that the run trains on; None where it does not say."""
    values = recorded_environment(run).get(BASE)
    return BaseIdentity(**values) if isinstance(values, dict) else None


def recorded_data(run: Path) -> str | None:
    """The fingerprint of the plan that the run was trained by; None where it does not say."""
    value = recorded_environment(run).get(DATA)
    return value if isinstance(value, str) else None


def recorded_environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    return read_json(path) if path.is_file() else {}


def fill_output(pattern: str, *, name: str, method: str, time_text: str | None = None) -> str:
    """`output_dir` with its placeholders filled in, but for {n}."""
    stamp = time_text or time.strftime("%Y%m%d-%H%M%S")
    # Braces in a file's own name must not pass for placeholders.
    name = re.sub("[{}]", "_", name)
    text = pattern.replace("{name}", name).replace("{method}", method).replace("{time}", stamp)
    return os.path.expanduser(text)


# ---------------------------------------------------------------------------------------------------- files


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run keeps what it logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = len(path.read_bytes().splitlines()) if path.exists() else 0
        """Lines written so far."""
        self.followers: list[Callable[[Mapping[str, Any]], None]] = []
        """Called with every line, after it was written."""

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.lines += 1
        for follow in self.followers:
            follow(values)

    def truncate(self, lines: int) -> None:
        """Keep the first `lines` lines: what a checkpoint had seen. Steps after it will be logged again."""
        kept = self.path.read_bytes().splitlines(keepends=True)[:lines] if self.path.exists() else []
        with self.path.open("ab") as file:
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
    prompt: Path | None = None
    """Directory of the soft prompt beside the adapter, where a run or checkpoint is named that has one."""

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
    if not path.exists() and "/" in text and path.parent.is_dir():
        # A directory of this name lies here: runs/nmae is a slip and no hub id, which hf://org/name forces.
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
        close = difflib.get_close_matches(path.name, names, n=1)
        how = f"did you mean {path.parent / close[0]}?" if close else f"there is {', '.join(names[:5]) or 'nothing'}"
        raise UserError(f"no such run or directory: {path}", how=how)
    if not path.is_dir():
        return Target(text, locate(text), None, None, None, None)
    run = _run_of(path)
    result = result_of(path)
    if (result / "adapter_config.json").is_file():
        config = read_json(result / "adapter_config.json")
        name = base or config.get("base_model_name_or_path")
        if not name:
            raise UserError(f"{result} does not say which base model it belongs to", how="name it with --base")
        revision = None if base else config.get("revision")
        # As it was in training: the adapter corrects what the quantised base computes.
        model = locate(name, ModelSection(revision=revision, quantization=read_quantization(result)))
        if run is not None and base is None:
            # A .gguf file is called by its name, not by that of the directory that it was converted to.
            model = replace(model, name=load_recipe(run / RECIPE).recipe.base_model)
        # An adapter that is named itself goes without the prompt that lies beside it.
        prompt = prompt_beside(result) if result != path else prompt_inside(result)
        return Target(text, model, result, result, run, model, prompt)
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


def result_of(path: Path) -> Path:
    """The directory of the weights in a run or checkpoint; any other path is its own."""
    return next((path / part for part in (ADAPTER, MODEL) if (path / part).is_dir()), path)


def _run_of(path: Path) -> Path | None:
    """The run that `path` is, or lies in: RUN, RUN/adapter, RUN/merged, RUN/checkpoints/step-*."""
    for candidate in (path, *list(path.resolve().parents)[:3]):
        if (candidate / RECIPE).is_file() and (candidate / ENVIRONMENT).is_file():
            return candidate
    return None
