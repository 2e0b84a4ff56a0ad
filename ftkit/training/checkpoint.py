"""Checkpoints: staged, hashed, published by a rename; only verified ones are resumed from.

    step-00000100/
        adapter/ | model/        the trained weights, loadable by every verb (model/: in float32)
        optimizer.safetensors    AdamW's state, by parameter name
        random.safetensors       the generators' states, by rank
        state.json               step, best evaluation, open sums
        manifest.json            size and SHA-256 of every other file, written last

No pickle file is written or read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftkit.distributed import World, place_like, whole
from ftkit.errors import StorageError, UserError
from ftkit.runs import move_aside

MANIFEST, STATE, OPTIMIZER, RANDOM = "manifest.json", "state.json", "optimizer.safetensors", "random.safetensors"
STAGING = ".staging-"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of one parameter."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def write_checkpoint(
    directory: Path,
    step: int,
    *,
    write_weights: Callable[[Path], None],
    optimizer: Mapping[str, Tensor],
    random: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Publish `directory/step-XXXXXXXX`: written beside, flushed, hashed, renamed. Called by the main process.

    Args:
        write_weights: writes the weights into the staging directory that it is given.

    Raises:
        StorageError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = directory / f"step-{step:08d}"
    staging = directory / f"{STAGING}{step:08d}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_weights(staging)
        save_file(dict(optimizer), staging / OPTIMIZER)
        save_file(dict(random), staging / RANDOM)
        (staging / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        for path in files:
            # safetensors writes files that only their owner may read, whatever the umask.
            path.chmod(staging.stat().st_mode & 0o666)
        manifest = {path.relative_to(staging).as_posix(): _measure(path) for path in files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*files, staging / MANIFEST, *(p for p in staging.rglob("*") if p.is_dir()), staging):
            _flush(path)
        if final.exists():
            # The same step again, after a resume from an older checkpoint: the new one replaces it.
            shutil.rmtree(final)
        staging.rename(final)
        _flush(directory)
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for a full disk.
        shutil.rmtree(staging, ignore_errors=True)
        raise StorageError(
            f"cannot write the checkpoint of step {step}: {(isinstance(error, OSError) and error.strerror) or error}",
            where=str(final),
            how="free some space and go on with --resume; older checkpoints are intact",
        ) from error
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose files all have the size and hash of its manifest.

    Raises:
        UserError: it is none, is incomplete or has changed.
    """
    problem = find_damage(path)
    if problem is not None:
        raise UserError(f"not a valid checkpoint: {problem}", where=str(path), how="name another with --from")
    return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no manifest.json"
    except (OSError, ValueError) as error:
        return f"its manifest.json cannot be read ({error})"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"] or _measure(file) != expected:
            return f"{name} has changed"
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir() and path.suffix == "")


def newest_verified(directory: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over."""
    for path in reversed(list_checkpoints(directory)):
        problem = find_damage(path)
        if problem is None:
            return read_checkpoint(path)
        warn(f"{path} is damaged ({problem}); trying the one before")
    return None


def set_aside_later(checkpoint: Checkpoint) -> None:
    """Rename the checkpoints of later steps to `NAME.old-1`: a run that goes on from here will write its own."""
    for path in list_checkpoints(checkpoint.path.parent):
        if path.name > checkpoint.path.name:
            move_aside(path)


def rotate(directory: Path, *, keep: int, best: Path | None) -> None:
    """Delete the oldest checkpoints, down to `keep` besides the best one, and what a killed save left behind."""
    for leftover in directory.glob(f"{STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    others = [path for path in list_checkpoints(directory) if best is None or path.name != best.name]
    for path in others[: max(0, len(others) - keep)]:
        shutil.rmtree(path)


# --------------------------------------------------------------------------------- what is saved, as plain tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as `NAME.exp_avg` etc., whole tensors on the CPU. A collective: every process must call it."""
    tensors = {}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{moment}"] = whole(value).detach().to("cpu", copy=True).contiguous()
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Restore AdamW's state by parameter name.

    `Optimizer.load_state_dict` is not used: it goes by position, and casts the moments to the parameter's type.
    """
    tensors = load_file(path / OPTIMIZER)
    for name, parameter in parameters.items():
        if f"{name}.step" not in tensors:
            continue
        state = {moment: tensors.pop(f"{name}.{moment}") for moment in MOMENTS}
        # Fused AdamW wants the step count on the parameter's device.
        optimizer.state[parameter] = {
            moment: value.to(parameter.device) if moment == "step" else place_like(value, parameter)
            for moment, value in state.items()
        }
    assert not tensors, f"optimizer state of unknown parameters: {sorted(tensors)[:5]}"


def random_tensors(world: World) -> dict[str, Tensor]:
    """The states of torch's generators on every rank, `RANK.cpu` and `RANK.cuda`. A collective."""
    own = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(world.device)
    states = world.gather(own)
    return {f"{rank}.{kind}": state for rank, part in enumerate(states) for kind, state in part.items()}


def load_random(path: Path, world: World) -> None:
    """Restore this rank's generators."""
    tensors = load_file(path / RANDOM)
    needed = [f"{rank}.{kind}" for rank in range(world.size) for kind in {"cpu", world.device.type}]
    if set(needed) != set(tensors):
        processes = len({name.split(".")[0] for name in tensors})
        kind = "GPU" if any(name.endswith("cuda") for name in tensors) else "CPU"
        raise UserError(
            f"{path} was written by {processes} process(es) on {kind}, and this run has {world.size} on "
            f"{world.device.type}",
            how=f"go on with --num-processes {processes} on the same kind of device",
        )
    torch.set_rng_state(tensors[f"{world.rank}.cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"{world.rank}.cuda"], world.device)


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
