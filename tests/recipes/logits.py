"""The logits of a model on a few fixed tokens, as a file: those of a run's last step, and those of what is on disk.

python -m tests.recipes.logits live FILE ARGUMENTS...   runs `ftkit ARGUMENTS`, a training; FILE: the trained model's
python -m tests.recipes.logits loaded FILE TARGET       FILE: those of TARGET, as `ftkit eval` loads it
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.cli import run
from ftkit.evaluation.contestants import load_contestants
from ftkit.models.attention import attend_to_prompts
from ftkit.models.load import choose_compute_dtype
from ftkit.models.soft_prompt import prompt_ids
from ftkit.runs import find_target
from ftkit.training.loop import Loop
from ftkit.training.state import LoopState

INPUT_IDS = torch.arange(250)[None, ::5]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Float32 [1, T, V], of the tokens after a soft prompt."""
    # Attention of packed rows, which a training may use, wants the bounds of documents; this one wants none.
    model.set_attn_implementation("sdpa")
    attend_to_prompts(model)
    before = torch.tensor([prompt_ids(model)], dtype=INPUT_IDS.dtype)
    ids = torch.cat([before, INPUT_IDS], dim=1)
    return model.eval()(input_ids=ids, use_cache=False).logits[:, before.shape[1] :].float()


def train(file: Path, arguments: list[str]) -> int:
    """Run a command line that trains, and keep the logits of the model in memory once its loop is done."""
    run_loop = Loop.run

    def run_and_keep(loop: Loop, state: LoopState) -> None:
        run_loop(loop, state)
        save_file({"logits": logits(loop.objective.model)}, file)

    Loop.run = run_and_keep
    return run(arguments)


def load(file: Path, target: str) -> int:
    """Keep the logits of a target."""
    device = torch.device("cpu")
    dtype, _ = choose_compute_dtype("auto", device)
    (contestant,) = load_contestants([find_target(target)], mode="raw", dtype=dtype, device=device)
    save_file({"logits": logits(contestant.model)}, file)
    return 0


if __name__ == "__main__":
    what, file, *arguments = sys.argv[1:]
    sys.exit(train(Path(file), arguments) if what == "live" else load(Path(file), *arguments))
