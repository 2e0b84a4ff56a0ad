"""A whole run small enough for a test: a tiny model on disk, a few rows, a recipe."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.tiny_models import save_tiny

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "full": {"type": "full"},
    "adapter": {"type": "adapter", "bottleneck": 8},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "lora_soft_prompt": {"type": "lora", "rank": 4, "alpha": 8, "soft_prompt": 6, "soft_prompt_learning_rate_ratio": 5},
    "prefix": {"type": "prefix", "num_virtual_tokens": 6},
    "llama_adapter": {"type": "llama_adapter", "num_virtual_tokens": 6, "num_layers": 2},
}


def write_rows(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Rows in alpaca's form whose answer follows from the instruction, so that a tiny model can learn it."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(generator.choices("abcdefgh", k=generator.randint(2, 12)))
        rows.append({"instruction": f"Say {word}.", "input": "", "output": word[:3]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(
    directory: Path, *, method: str = "lora", architecture: str = "llama", rows: int = 40, **training: Any
) -> Path:
    """A recipe with its model and data in `directory`; float32, 6 steps of 4 examples, evaluation every 3."""
    model = directory / f"base-{architecture}"
    if not model.exists():
        save_tiny(model, architecture)
    write_rows(directory / "rows.jsonl", rows)
    recipe = {
        "base_model": model.name,
        "model": {"dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}], "val_size": 4, "max_length": 128},
        "method": (METHODS | PROMPTS)[method],
        "training": {
            "max_steps": 6,
            "global_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_steps": 3,
            "max_tokens_per_device": 256,
            **training,
        },
        "output_dir": str(directory / "runs" / "{name}-{n}"),
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def run_cli(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m ftkit ARGUMENTS` in a process of its own, with these variables besides."""
    return subprocess.run(
        cli_command(*arguments),
        cwd=cwd,
        env=cli_environment() | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def cli_command(*arguments: str | Path) -> list[str]:
    """The command line of `ftkit ARGUMENTS`."""
    return [sys.executable, "-m", "ftkit", *map(str, arguments)]


def cli_environment() -> dict[str, str]:
    """This environment, with the package importable from anywhere and without a hub."""
    root = str(Path(__file__).parent.parent)
    return os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def wait_until_ended(pids: Iterable[int], *, seconds: float = 10) -> None:
    """Until none of the processes runs; one that only its parent's look is missing to has ended."""

    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    left, deadline = [*pids], time.monotonic() + seconds
    while left := [pid for pid in left if runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)


def read_metrics(run: Path, *, timing: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what differs from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines if timing else [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def result_file(run: Path, method: str = "lora") -> Path:
    """The file with a finished run's weights."""
    return run / ("model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors")


def result_hash(run: Path, method: str = "lora") -> str:
    """SHA-256 of a finished run's weights."""
    return hashlib.sha256(result_file(run, method).read_bytes()).hexdigest()


def losses(run: Path) -> list[float]:
    """The training losses of the logged steps."""
    return [line["loss"] for line in read_metrics(run) if "loss" in line]
