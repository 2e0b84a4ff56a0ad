"""Checkpoints: staged, hashed, published by a rename; only verified ones are resumed from.

    step-00000100/
        adapter/ | model/        the trained weights, loadable by every verb (model/: in float32)
        optimizer.safetensors    AdamW's state, by parameter name
        random.safetensors       the generators' states, by rank
        state.json               step, best evaluation, open sums
        manifest.json            size and SHA-256 of every other file, written last

No pickle file is written or read. Whatever else lies beside checkpoints is the user's, such as those that `--from` sets
aside as `step-00000100.old-1`: it is never read, counted or removed.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftkit.distributed import World, place_like, whole
from ftkit.errors import UserError
from ftkit.models.files import flush, flush_entry, storage_errors
from ftkit.runs import move_aside

MANIFEST, STATE, OPTIMIZER, RANDOM = "manifest.json", "state.json", "optimizer.safetensors", "random.safetensors"
STAGING = ".staging-"
_NAME = re.compile(r"step-(\d{8,})")
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
    final = directory / checkpoint_name(step)
    staging = directory / f"{STAGING}{step:08d}"
    what, how = f"cannot write the checkpoint of step {step}", "free some space and go on with --resume"
    try:
        with storage_errors(what, how=f"{how}; older checkpoints are intact", where=str(final)):
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
            flush(staging)
            if final.exists():
                # The same step again, after a resume from an older checkpoint: the new one replaces it.
                shutil.rmtree(final)
            staging.rename(final)
            flush_entry(directory)
    finally:
        # Nothing of a failed or interrupted save stays.
        shutil.rmtree(staging, ignore_errors=True)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose files all have the size and hash of its manifest.

    Raises:
        UserError: it is none, was set aside or renamed, is incomplete or has changed.
    """
    path = path.resolve()
    if not _NAME.fullmatch(path.name):
        how = "name a step-XXXXXXXX, or rename this one back, moving another of its step out of the way"
        raise UserError("not a checkpoint's name: it was set aside, or is a copy", where=str(path), how=how)
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
    if not isinstance(manifest, dict) or not {OPTIMIZER, RANDOM, STATE} <= manifest.keys():
        return "its manifest.json does not list its files"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            if _measure(file) != expected:
                return f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def checkpoint_name(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Published checkpoints, oldest first; copies and those set aside have other names and are none."""
    steps = {
        int(named[1]): path
        for path in directory.glob("step-*")
        if path.is_dir() and (named := _NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


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
    checkpoints = list_checkpoints(checkpoint.path.parent)
    names = [path.name for path in checkpoints]
    for path in checkpoints[names.index(checkpoint.path.name) + 1 :]:
        move_aside(path)


def rotate(directory: Path, *, keep: int, best: Path | None) -> None:
    """Delete the oldest checkpoints, down to `keep` besides the best one, and what a killed save left behind."""
    for leftover in directory.glob(f"{STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    others = [path for path in list_checkpoints(directory) if best is None or path.name != best.name]
    for path in others[: max(0, len(others) - keep)]:
        shutil.rmtree(path)


# --------------------------------------------------------------------------------- what is saved, as plain tensors


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, keep: bool = True
) -> dict[str, Tensor]:
    """AdamW's state as `NAME.exp_avg` etc., whole tensors on the CPU. A collective: every process must call it.

    Args:
        keep: whether this process writes them; the others only take part, one tensor at a time, and get none.
    """
    tensors = {}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensor = whole(value).detach()
            if keep:
                tensors[f"{name}.{moment}"] = tensor.to("cpu", copy=True).contiguous()
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
    """The states of torch's generators on every rank, `RANK.cpu` and `RANK.cuda` or `RANK.mps`. A collective."""
    own = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(world.device)
    elif world.device.type == "mps":
        own["mps"] = torch.mps.get_rng_state()
    states = world.gather(own)
    return {f"{rank}.{kind}": state for rank, part in enumerate(states) for kind, state in part.items()}


def check_world(checkpoint: Checkpoint, world: World) -> None:
    """Check that a run on these processes can go on from the checkpoint: each has its generators in it.

    Raises:
        UserError: it was written by another number of processes, or on another kind of device.
    """
    with safe_open(checkpoint.path / RANDOM, framework="pt") as file:
        names = set(file.keys())
    if names != {f"{rank}.{kind}" for rank in range(world.size) for kind in ("cpu", world.device.type)}:
        processes = len({name.split(".")[0] for name in names})
        kind = "CPU" if all(name.endswith("cpu") for name in names) else "GPU"
        raise UserError(
            f"{checkpoint.path} was written by {processes} process(es) on {kind}, and this run has {world.size} on "
            f"{world.device.type}",
            how=f"go on with --num-processes {processes} on the same kind of device",
        )


def load_random(path: Path, world: World) -> None:
    """Restore this rank's generators."""
    tensors = load_file(path / RANDOM)
    torch.set_rng_state(tensors[f"{world.rank}.cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"{world.rank}.cuda"], world.device)
    elif world.device.type == "mps":
        torch.mps.set_rng_state(tensors[f"{world.rank}.mps"])


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
