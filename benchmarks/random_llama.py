"""The model that benchmarks build where any will do: a Llama of random weights, heads of width 64."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def random_llama(
    *, width: int, layers: int, vocabulary: int, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """The same weights each time, the head tied to the embeddings."""
    heads = max(1, width // 64)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model
