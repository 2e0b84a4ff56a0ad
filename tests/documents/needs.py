"""What documents need besides what they show, and what of them cannot be run here, with the reason.

A document has no entry if it needs nothing but recipes/, configs/ and benchmarks/; tiny models in the place of
HuggingFaceTB/SmolLM2-135M-Instruct, Qwen/Qwen3-0.6B and SmolLM2-135M-Instruct.Q4_1.gguf; my.jsonl and data/mine.jsonl;
and the files that it shows itself, in blocks that begin with ```LANGUAGE FILE.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Needs:
    """Of one document."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> content of files that are there from the start."""
    before: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Start of a command -> commands that are run before it; "": before the first."""
    not_run: Mapping[str, str] = field(default_factory=dict)
    """Start of a command, or first line of a Python snippet -> why it cannot be run here. Of ftkit's own the verb and
    the options are checked all the same."""


LIMITS = {
    "train": ("training.max_steps=4", "training.max_tokens_per_device=1024"),
    "eval": ("--limit=2",),
}
"""Verb -> what is added to its arguments, so that it takes a second; a document's own say wins."""

PLACES = ("recipes", "recipes/quickstart")
"""Directories of recipes, from which a model's name has to lead to it as from the top."""

PROGRAMS = {
    "pip": "installs into the environment that runs the tests",
    "source": "shells only",
    "hf": "needs the hub",
    "vllm": "needs a GPU, and is no dependency",
    "llama-server": "llama.cpp's own program, and no dependency",
    "llama-cli": "llama.cpp's own program, and no dependency",
    "ollama": "no dependency",
    "curl": "asks a server that is not there",
    "tensorboard": "a server that does not end",
    "sbatch": "needs Slurm",
    "srun": "needs Slurm",
}
"""Programs that are run in no document -> why."""

EVERYWHERE = {
    "make quickstart": "downloads a model; tests/recipes/test_quickstart.py runs it",
}
"""Starts of commands that are run in no document -> why."""

BAD_RECIPE = """\
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
data:
  train:
    - path: data/mine.jsonl
method:
  type: lora
  rnk: 8
training:
  lerning_rate: 1e-4
  per_device_train_batch_size: 2
"""
AXOLOTL = """\
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
datasets:
  - path: data/mine.jsonl
    type: alpaca
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
flash_attention: true
"""
QUICKSTART = "ftkit train recipes/quickstart/recipe.yaml"

NEEDS_SERVER = "needs a server; tests/commands/test_next_commands.py starts them"

DOCUMENTS: dict[str, Needs] = {
    "README.md": Needs(
        files={"bad.yaml": BAD_RECIPE},
        before={
            "ftkit diff runs/recipe-1": ["ftkit train recipe.yaml"],
            "ftkit merge runs/orders:0.7": [
                f"{QUICKSTART} output_dir=runs/orders",
                f"{QUICKSTART} output_dir=runs/other seed=1",
            ],
            "ftkit export runs/sst2": [f"{QUICKSTART} output_dir=runs/sst2"],
            "ftkit diff runs/plain": [
                f"{QUICKSTART} output_dir=runs/plain",
                f"{QUICKSTART} output_dir=runs/prompt method.soft_prompt=20",
            ],
        },
        not_run={
            "ftkit verify runs/recipe-1 --endpoint": NEEDS_SERVER,
            "ftkit verify runs/orders-1 --endpoint": NEEDS_SERVER,
            "ftkit verify runs/sst2 --endpoint": NEEDS_SERVER,
        },
    ),
    "inspect.md": Needs(
        before={"ftkit inspect runs/full": [f"{QUICKSTART} output_dir=runs/full method='{{type: full}}'"]},
    ),
    "merging.md": Needs(
        before={
            "": [
                f"{QUICKSTART} output_dir=runs/orders",
                f"{QUICKSTART} output_dir=runs/other seed=1",
                "ftkit merge runs/orders --dtype bfloat16",
            ]
        }
    ),
    "several_gpus.md": Needs(
        not_run={
            "ftkit train recipes/fsdp.yaml --launch-config": "waits for a second machine; tests/test_launch.py has two",
        },
    ),
    "ci.md": Needs(not_run={"ftkit": "tests/test_workflows.py runs every command of it"}),
    "serving.md": Needs(not_run={"ftkit": "tests/commands/test_next_commands.py runs every command of it"}),
    "watching.md": Needs(not_run={"ftkit": "tests/test_docs_watching.py runs every command of it"}),
    "other_tools.md": Needs(files={"axolotl.yaml": AXOLOTL}),
}
"""Name of a document -> what it needs."""
