"""What fits into a GPU? Memory of one training step, method by method, for models of the Qwen 2.5 and Llama 3 families.

    python -m benchmarks.what_fits

Nothing is downloaded and no weight is made: the shapes are those of the published configurations, and it is
`ftkit/estimate.py` that counts, as for `ftkit plan`. The batch is one document of 2,048 tokens, in bfloat16 and with
gradient checkpointing.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig

from ftkit.estimate import Memory, Place, estimate_model
from ftkit.models.quiet import quiet_transformers
from ftkit.recipe.load import load_recipe
from ftkit.training.prepare import prepare_model

TOKENS = 2048
GIBIBYTE = 2**30
CARDS = (8, 16, 24, 48, 80)
"""GiB of memory."""
SPARE = 0.92
"""Share of a card that a run can have: CUDA's own context and the allocator's leftovers take the rest."""

_QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int], bool]] = {
    "Qwen 2.5 0.5B": (_QWEN | {"vocab_size": 151936}, (896, 4864, 24, 14, 2), True),
    "Qwen 2.5 1.5B": (_QWEN | {"vocab_size": 151936}, (1536, 8960, 28, 12, 2), True),
    "Qwen 2.5 3B": (_QWEN | {"vocab_size": 151936}, (2048, 11008, 36, 16, 2), True),
    "Qwen 2.5 7B": (_QWEN, (3584, 18944, 28, 28, 4), False),
    "Llama 3.1 8B": (_LLAMA, (4096, 14336, 32, 32, 8), False),
    "Qwen 2.5 14B": (_QWEN, (5120, 13824, 48, 40, 8), False),
    "Qwen 2.5 32B": (_QWEN, (5120, 27648, 64, 40, 8), False),
    "Llama 3.1 70B": (_LLAMA, (8192, 28672, 80, 64, 8), False),
}
"""Model -> family, (width, width of feed-forward, layers, heads, heads of keys and values), is the head tied?"""

METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {"method": {"type": "lora", "rank": 16, "alpha": 32}, "model": {"quantization": "nf4"}},
    "LoRA": {"method": {"type": "lora", "rank": 16, "alpha": 32}, "model": {}},
    "full": {"method": {"type": "full"}, "model": {}},
}
"""Column -> what of a recipe makes it."""


@dataclass(frozen=True)
class Row:
    """One model."""

    model: str
    parameters: int
    bytes: dict[str, int]
    """Method -> bytes that a step takes."""


def configuration(model: str) -> PreTrainedConfig:
    """The model's configuration, without a hub."""
    family, (width, feed_forward, layers, heads, key_heads), tied = SHAPES[model]
    return AutoConfig.for_model(
        **family,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM" if family["model_type"] == "qwen2" else "LlamaForCausalLM"],
    )


def measure(model: str) -> Row:
    """Count what a step of every method takes."""
    found: dict[str, int] = {}
    parameters = 0
    with tempfile.TemporaryDirectory() as place:
        configuration(model).save_pretrained(place)
        for name, sections in METHODS.items():
            recipe = {"base_model": ".", "data": {"train": [{"path": "none.jsonl"}], "max_length": TOKENS}} | sections
            recipe["model"] = {"dtype": "bfloat16"} | recipe["model"]
            recipe["training"] = {"gradient_checkpointing": True, "max_tokens_per_device": TOKENS}
            file = Path(place) / "recipe.yaml"
            file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            prepared = prepare_model(load_recipe(file), offline=True, trust_remote_code=False)
            result = estimate_model(prepared, Place.gpu(prepared))
            found[name] = result.memory_bytes.total
            if name == "full":
                parameters = result.parameters
    return Row(model, parameters, found)


def smallest_card(size: int) -> str:
    """The smallest card that holds so many bytes."""
    return next((f"{card}" for card in CARDS if size <= SPARE * card * GIBIBYTE), "—")


def table(rows: list[Row]) -> Iterator[str]:
    """The Markdown table of docs/choosing_a_method.md: GiB of a step, and the smallest card that it fits into."""
    yield "| | parameters | " + " | ".join(f"{name} | GPU" for name in METHODS) + " |"
    yield "|-|-:|" + "-:|-:|" * len(METHODS)
    for row in rows:
        cells = [f"{row.bytes[name] / GIBIBYTE:.1f} | {smallest_card(row.bytes[name])}" for name in METHODS]
        yield f"| {row.model} | {row.parameters / 1e9:.2f} B | " + " | ".join(cells) + " |"


def caption() -> str:
    """What is counted, as `ftkit plan` has it."""
    # A GPU's allocator takes nothing that could be planned.
    parts = [field.name for field in fields(Memory) if field.init and field.name != "allocator"]
    return f"GiB of {', '.join(parts[:-1])} and {parts[-1]} in a step:"


def main() -> None:
    """Print the caption and the table."""
    quiet_transformers()
    print(caption() + "\n")
    print("\n".join(table([measure(model) for model in SHAPES])))


if __name__ == "__main__":
    main()
