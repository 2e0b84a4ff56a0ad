"""What `ftkit plan` says of memory and time, beside what `ftkit train` takes.

    python -m benchmarks.plan_vs_measured MODEL... [--length 512] [--documents 4] [--dtype float32]

Each run is a process of its own: it imports what training imports, notes its resident memory, then trains two steps and
notes the highest since. On a GPU the peak of torch's allocator counts instead.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora"},
    "dora": {"type": "lora", "dora": True},
    "bottleneck": {"type": "adapter"},
    "prefix": {"type": "prefix"},
    "full": {"type": "full"},
}
CONFIGURATIONS = [
    ("lora", False),
    ("lora", True),
    ("dora", False),
    ("bottleneck", False),
    ("bottleneck", True),
    ("prefix", False),
    ("full", False),
    ("full", True),
]
"""Method, and whether activations are recomputed."""

CHILD = """
import json, sys
import torch, transformers
import ftkit.fit, ftkit.training.result, ftkit.training.start, ftkit.commands.train
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Gemma3ForCausalLM, Qwen2ForCausalLM
from ftkit.cli import run
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = 1024 * kib("VmRSS")
code = run(sys.argv[1:])
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * kib("VmHWM") - before
print(json.dumps({"code": code, "peak": peak}))
"""
WORDS = "the of and to in is was for that with as his on be at by it from are this had not but which have they you were"


@dataclass(frozen=True)
class Row:
    """One configuration."""

    model: str
    method: str
    checkpointing: bool
    planned: int
    measured: int
    seconds: float | None
    """Planned, of two steps."""
    took: float
    """Measured."""


def write_data(path: Path, length: int) -> None:
    """Rows of about `length` tokens, half of them an answer."""
    generator, words = random.Random(0), WORDS.split()

    def text(count: int) -> str:
        return " ".join(generator.choice(words) for _ in range(count))

    rows = [{"instruction": text(length // 2 - 20), "output": text(length // 2)} for _ in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(place: Path, model: str, method: str, checkpointing: bool, options: argparse.Namespace) -> Row:
    """Plan and train one configuration in `place`."""
    recipe = {
        "base_model": model,
        "model": {"dtype": options.dtype},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": options.length, "val_size": 0},
        "method": METHODS[method],
        "training": {
            "max_steps": 2,
            "global_batch_size": options.documents * options.micro_batches,
            "max_tokens_per_device": options.documents * options.length,
            "gradient_checkpointing": checkpointing,
            "save_total_limit": 1,
            "logging_steps": 1,
        },
        "output_dir": "runs/{name}-{n}",
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    keys: dict[str, Any] = {"cwd": place, "env": environment, "capture_output": True, "text": True, "check": True}
    plan = subprocess.run([sys.executable, "-m", "ftkit", "plan", "recipe.yaml", "--json"], **keys)
    planned = json.loads(plan.stdout.splitlines()[-1])
    run = subprocess.run([sys.executable, "-c", CHILD, "train", "recipe.yaml"], **keys)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["code"] == 0, run.stderr
    newest = max((place / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in (newest / "metrics.jsonl").read_text("utf-8").splitlines()]
    took = sum(line["timing"]["seconds"] for line in lines if "loss" in line)
    total = planned["memory_bytes"]["total"]
    return Row(Path(model).name[:24], method, checkpointing, total, found["peak"], planned["seconds"], took)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", help="directories, hub ids or .gguf files")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document")
    parser.add_argument("--documents", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print("| model | method | recomputed | planned MiB | measured MiB | planned / measured | planned s | measured s |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_data(place / "rows.jsonl", options.length)
        for model in options.models:
            for method, checkpointing in CONFIGURATIONS:
                row = measure(place, str(Path(model).absolute()), method, checkpointing, options)
                seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
                print(
                    f"| {row.model} | {row.method} | {'yes' if checkpointing else 'no'} | {row.planned / 2**20:,.0f} | "
                    f"{row.measured / 2**20:,.0f} | {row.planned / row.measured:.2f} | {seconds} | {row.took:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
