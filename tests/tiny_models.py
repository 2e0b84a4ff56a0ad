"""Models and tokenizers of a few thousand parameters, built in-process: no test needs a network."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
VOCAB_SIZE = 320

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": VOCAB_SIZE}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SMALL, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SMALL, "head_dim": 8},
    # A window of 16 on the first layer, full attention on the second.
    "gemma3": {
        "model_type": "gemma3_text",
        **_SMALL,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "mistral": {"model_type": "mistral", **_SMALL, "sliding_window": 16},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "vocab_size": VOCAB_SIZE,
    },
}
"""Architecture -> keyword arguments of `AutoConfig.for_model`: those that ftkit must work on."""

MORE_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB_SIZE,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "phi3": {"model_type": "phi3", **_SMALL, "sliding_window": 16},
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB_SIZE,
        "dropout": 0.0,
    },
    "mixtral": {"model_type": "mixtral", **_SMALL, "num_local_experts": 8, "num_experts_per_tok": 2},
    # Sinks in both layers.
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_SMALL,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Three layers of linear attention, which begin with a convolution, and one of full attention.
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        **_SMALL,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {
        "model_type": "lfm2",
        **_SMALL,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
}
"""Likewise: those besides whose packing is tested."""


def tiny_config(architecture: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of 2 to 4 layers and width 32; the special tokens are those of `tiny_tokenizer`."""
    # The byte-level tokenizer below puts its four special tokens at ids 256 to 259.
    tokens = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 259}
    return AutoConfig.for_model(**{**(CONFIGS | MORE_CONFIGS)[architecture], **tokens, **overrides})


def tiny_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model in training mode without dropout; noise on every parameter, norms included."""
    config = tiny_config(architecture, **overrides)
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name) and name not in overrides:
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return add_noise(model, seed=seed)


@torch.no_grad()
def add_noise(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Noise on every parameter: stock initialisation (zeros, ones, std 0.02) hides leaks and forgotten tensors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            # Stock decays add up to 700 within 64 tokens of linear attention, of which float32 keeps 6e-5.
            parameter.zero_()
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and four special tokens; every text survives a round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = chat_template
    return fast


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a form that llama.cpp's converter knows, as Llama 2 has it: what is no piece becomes bytes."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    core = Tokenizer(
        BPE(
            {piece: number for number, piece in enumerate(vocabulary)},
            [("a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny(directory: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """Write a tiny model with its tokenizer as an ordinary Hugging Face directory; returns `directory`."""
    tiny_model(architecture, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
