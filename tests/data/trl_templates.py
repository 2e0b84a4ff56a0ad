"""The chat templates that trl ships, and a small tokenizer that knows the control tokens of one of them."""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

_FOLDER = files("trl") / "chat_templates"
_CONTROL = re.compile(
    r"<\|[^|<>\s{}'+]+\|?>|<[^|<>\s{}'+]+\|>|<\|\"\|>|<｜[^<>]+?｜>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|</?s>"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\n  What is the answer? It is forty-two.\nassistant user system\n"
]

SMALL_TOKENIZERS = ("bytes", "merges", "seams")

BOS_EOS = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<bos>", "<eos>"),
    "diffusion": ("<bos>", "<eos>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
}


def template_names() -> list[str]:
    """Templates for inference, without the `_training` variants."""
    names = sorted(path.name.removesuffix(".jinja") for path in _FOLDER.iterdir() if path.name.endswith(".jinja"))
    names = [name for name in names if not name.endswith("_training")]
    assert len(names) >= 41
    return names


def read_template(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def training_template(name: str) -> str:
    """The template's variant with {% generation %} marks; empty where there is none."""
    try:
        return read_template(f"{name}_training")
    except FileNotFoundError:
        return ""


def tokenizer_for(name: str, source: str = "merges") -> PreTrainedTokenizerFast:
    """A tokenizer with the template's control tokens registered as special, and the template.

    Args:
        source: one of SMALL_TOKENIZERS, or the directory of a real one, which is read once: it is the same object for
            every template, with the control tokens of all.
    """
    prefix = next((prefix for prefix in BOS_EOS if name.startswith(prefix)), None)
    bos, eos = BOS_EOS[prefix] if prefix else ("<|startoftext|>", "<|endoftext|>")
    if source in SMALL_TOKENIZERS:
        fast = _with_control_tokens(Tokenizer.from_str(_small(source)), [bos, eos, *_control_tokens(name)])
    else:
        fast = _real(source)
    fast.bos_token, fast.eos_token = bos, eos
    fast.chat_template = read_template(name)
    return fast


@cache
def _small(source: str) -> str:
    """A small tokenizer as JSON.

    Args:
        source: "bytes": no merges. "merges": a byte-level BPE with a few, split as SmolLM2's tokenizer splits. "seams":
            the same with nothing but control tokens to split a text, so that newlines and spaces merge with words.
    """
    tokenizer = Tokenizer(BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=source != "seams")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab_size = len(alphabet) if source == "bytes" else 400
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    return tokenizer.to_str()


@cache
def _real(source: str) -> PreTrainedTokenizerFast:
    tokens = [token for tokens in BOS_EOS.values() for token in tokens]
    tokens += [
        "<|startoftext|>",
        "<|endoftext|>",
        *(token for name in template_names() for token in _control_tokens(name)),
    ]
    return _with_control_tokens(Tokenizer.from_file(str(Path(source) / "tokenizer.json")), tokens)


def _control_tokens(name: str) -> list[str]:
    return _CONTROL.findall(read_template(name))


def _with_control_tokens(tokenizer: Tokenizer, tokens: list[str]) -> PreTrainedTokenizerFast:
    special = [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(tokens)]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
