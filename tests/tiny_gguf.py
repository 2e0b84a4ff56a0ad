"""A tiny model of a form that llama.cpp's converter knows, and a llama.cpp server in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import CHATML, byte_fallback_tokenizer

END = "<|im_end|>"


def save_convertible(
    directory: Path,
    *,
    context: int = 128,
    chat_template: str = CHATML,
    says_beginning: bool = True,
    rope: dict[str, object] | None = None,
) -> Path:
    """A tiny Llama, bfloat16, whose tokenizer falls back on bytes; returns `directory`.

    Args:
        rope: `rope_parameters`, where its rotary positions are scaled.
        says_beginning: whether the tokenizer's configuration has what llama.cpp wants to know of a text's beginning.
    """
    tokenizer = byte_fallback_tokenizer()
    if says_beginning:
        tokenizer.init_kwargs |= {"add_bos_token": False, "add_prefix_space": False}
    tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        **({} if rope is None else {"rope_parameters": rope}),
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


_SERVE = """
import sys
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.chat_template = sys.argv[2]
# Threads that wait for each other take long on a machine that does other things too.
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.n_ctx, parameters.verbosity, parameters.warmup, parameters.n_parallel = 2048, 0, False, 1
server = xllamacpp.Server(parameters)
print("serving at", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(file: Path, *, chat_template: str = "") -> Iterator[str]:
    """llama.cpp's server with a .gguf file, on a free port; yields its address. `chat_template` replaces the file's."""
    command = [sys.executable, "-c", _SERVE, str(file), chat_template]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            for line in process.stdout:
                if line.startswith("serving at "):
                    yield line.removeprefix("serving at ").strip()
                    break
            else:
                raise AssertionError(f"the server did not start: {process.stderr.read()}")
        finally:
            process.kill()
