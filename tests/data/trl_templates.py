"""The chat templates that trl ships, and a small tokenizer that knows the control tokens of one of them."""

import re
from functools import cache
from importlib.resources import files

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


@cache
def _model() -> str:
    """A byte-level BPE with a few merges, split as SmolLM2's tokenizer splits."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    return tokenizer.to_str()


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """The small tokenizer with the template's control tokens registered as special, and the template."""
    template = read_template(name)
    prefix = next((prefix for prefix in BOS_EOS if name.startswith(prefix)), None)
    bos, eos = BOS_EOS[prefix] if prefix else ("<|startoftext|>", "<|endoftext|>")
    tokenizer = Tokenizer.from_str(_model())
    tokens = dict.fromkeys([bos, eos, *_CONTROL.findall(template)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast
