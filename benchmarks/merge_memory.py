"""How much memory does a merge need, against the largest file of the model?

    python -m benchmarks.merge_memory [--width 1024] [--layers 12]

merges a LoRA into a random bfloat16 Llama of several shards, and into a mixture of experts in two whose experts lie one
by one in the files, each in a process of its own, with each `--proof`. Printed is the largest amount of memory that
belongs to the process alone (RssAnon: pages of mapped files can be dropped at any time) above what it had before the
merge, when all libraries were loaded, and that amount as a share of the largest file.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.prepare import MemoryWatch
from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import PROOFS, merge
from ftkit.console import Console, human_bytes, make_table
from ftkit.methods import lora
from ftkit.methods.files import BaseIdentity
from ftkit.methods.lora_saved import B
from ftkit.models.load import find_base, fingerprint, load_weights
from ftkit.models.quiet import quiet_transformers
from ftkit.recipe.schema import LoraMethod, ModelSection
from ftkit.runs import find_target
from tests.tiny_models import tiny_tokenizer

SHARDS = {"llama": 6, "mixtral": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
SECTIONS = {
    "llama, all-linear": LoraMethod(type="lora", rank=16, alpha=32.0),
    "mixtral, attention": LoraMethod(type="lora", rank=16, alpha=32.0, targets=ATTENTION),
    "mixtral, experts too": LoraMethod(type="lora", rank=16, alpha=32.0, targets=ATTENTION, target_parameters=EXPERTS),
}


def write_model(directory: Path, case: str, *, width: int, layers: int) -> None:
    """Write `directory/base` in bfloat16 and `directory/adapter`, for a key of SECTIONS."""
    kind, section = case.partition(",")[0], SECTIONS[case]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": 4096}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **experts), dtype=torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory / "base", max_shard_size=int(size / SHARDS[kind] * 1.15))
    tiny_tokenizer().save_pretrained(directory / "base")
    base = find_base(str(directory / "base"), ModelSection(), base=directory)
    model = load_weights(base, dtype=torch.bfloat16)
    lora.apply(model, section, seed=1)
    noise = torch.Generator().manual_seed(1)
    state = {
        key: torch.randn(tensor.shape, generator=noise) * 5e-4 if key.endswith(B) else tensor
        for key, tensor in lora.trained_state(model).items()
    }
    lora.save(model, section, directory / "adapter", BaseIdentity(base.name, None, fingerprint(base)), state=state)


def merge_here(directory: Path, proof: str) -> None:
    """Merge, and print the figures as JSON; runs in a process of its own."""
    quiet_transformers()
    adapter = WeightedAdapter(find_target(str(directory / "adapter")))
    # What is read for the first time, e.g. modules of transformers, is no part of a merge.
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=1, hidden_size=64, vocab_size=99))
    watch, start = MemoryWatch(), perf_counter()
    merge([adapter], directory / "merged", proof=proof, overwrite=True)
    print(json.dumps({"seconds": perf_counter() - start, "memory": watch.stop()}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here is not None:
        merge_here(Path(arguments.here[0]), arguments.here[1])
        return
    quiet_transformers()
    headers = ("model", "files", "in all", "largest file", "proof", "memory", "of the largest file", "seconds")
    table = make_table("merging", [(header, "right") for header in headers])
    for case in SECTIONS:
        with TemporaryDirectory() as place:
            directory = Path(place)
            write_model(directory, case, width=arguments.width, layers=arguments.layers)
            sizes = [path.stat().st_size for path in (directory / "base").glob("*.safetensors")]
            for proof in reversed(PROOFS):
                command = [sys.executable, "-m", "benchmarks.merge_memory", "--here", str(directory), proof]
                ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                figures = json.loads(ended.stdout.splitlines()[-1])
                table.add_row(
                    case,
                    str(len(sizes)),
                    human_bytes(sum(sizes)),
                    human_bytes(max(sizes)),
                    proof,
                    human_bytes(figures["memory"]),
                    f"{figures['memory'] / max(sizes):.2f}",
                    f"{figures['seconds']:.1f}",
                )
                Console().line(f"{case}, --proof {proof} done", style="dim")
    Console().table(table)


if __name__ == "__main__":
    main()
