from functools import partial
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ftkit.data.token_spans import SpanTokenizer
from ftkit.data.types import Conversation
from tests.data.encoding import HI, assistant, encode, encoder_for, marked, target_text, user
from tests.data.trl_templates import read_template
from tests.tiny_models import CHATML


def merging_tokenizer(post_processor: Any = None) -> PreTrainedTokenizerFast:
    """Bytes, and merges of newlines and a space with what follows them; only control tokens split a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "H")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


COLON = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPACED = (user("Hi"), assistant(" Hello"), user("And?"), assistant("\nBye"))
CHATML_TARGETS = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦ Hello<|im_end|>⟧"


def test_an_answer_that_merges_with_its_prompt_is_encoded_apart() -> None:
    tokenizer = merging_tokenizer()
    encoder = encoder_for(tokenizer, CHATML)
    together = tokenizer(encoder.template.render([m.to_template() for m in SPACED[:2]])).input_ids
    prompt = encoder.encode_prompt(Conversation(SPACED[:2]))
    assert together[: len(prompt)] != prompt  # the case is there
    first, second = encode(encoder, *SPACED)
    assert first.input_ids[: len(prompt)].tolist() == prompt
    assert marked(tokenizer, first) == CHATML_TARGETS
    assert marked(tokenizer, second) == (
        CHATML_TARGETS.replace("⟦", "").replace("⟧", "")
        + "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦\nBye<|im_end|>⟧"
    )


def test_forced_into_one_example_every_turn_has_its_own_seam() -> None:
    tokenizer = merging_tokenizer()
    (example,) = encode(encoder_for(tokenizer, CHATML, turns="whole"), *SPACED)
    assert marked(tokenizer, example) == (
        CHATML_TARGETS + "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦\nBye<|im_end|>⟧"
    )


def test_answers_that_do_not_merge_stay_one_example() -> None:
    tokenizer = merging_tokenizer()
    (example,) = encode(encoder_for(tokenizer, CHATML), *HI)
    rendered = CHATML_TARGETS.replace(" Hello", "Hello 👋 you")
    assert marked(tokenizer, example) == (
        rendered + "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Bye<|im_end|>⟧"
    )


def test_tokenizers_that_trim_white_space_from_token_positions() -> None:
    tokenizer = merging_tokenizer(processors.ByteLevel(trim_offsets=True))
    assert tokenizer("a b", return_offsets_mapping=True).offset_mapping[1] == (2, 2)  # the case is there
    (example,) = encode(encoder_for(tokenizer, COLON), user("Hi"), assistant("Bye"))
    assert marked(tokenizer, example) == "user: Hi<|im_end|>assistant: ⟦Bye<|im_end|>⟧"


@pytest.mark.parametrize("turns", ["auto", "whole"])
def test_control_tokens_that_swallow_the_white_space_after_them(turns: str) -> None:
    """Phi 3's do: <|end|> and the newline after it are one token, and so are <|assistant|> and the prompt's newline."""
    tokenizer = merging_tokenizer()
    swallowing = [AddedToken(token, special=True, rstrip=True) for token in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": swallowing})
    (example,) = encode(encoder_for(tokenizer, read_template("phi3"), turns=turns), *SPACED)
    # Decoded, a token is its own text, without what it swallowed.
    assert marked(tokenizer, example) == (
        "<|user|>Hi<|end|><|assistant|>⟦Hello<|end|>⟧<|user|>And?<|end|><|assistant|>⟦Bye<|end|>⟧"
    )


def test_an_end_of_turn_swallows_the_white_space_after_it_also_where_turns_are_encoded_apart() -> None:
    tokenizer = merging_tokenizer()
    tokens = [AddedToken("<|end|>", special=True, rstrip=True), "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    (example,) = encode(encoder_for(tokenizer, read_template("phi3"), turns="whole"), *SPACED)
    assert marked(tokenizer, example) == (
        "<|user|>\nHi<|end|><|assistant|>\n⟦ Hello<|end|>⟧<|user|>\nAnd?<|end|><|assistant|>\n⟦\nBye<|end|>⟧"
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space is ▁, and one is put before every piece of text between control tokens."""
    characters = ["▁", *map(chr, range(33, 127)), "\n"]
    words = ["▁H", "▁B"]
    merges = [("▁", "H"), ("▁", "B")]
    vocabulary = {token: index for index, token in enumerate([*characters, *words, "<unk>"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_sentencepiece_puts_no_space_before_an_answer() -> None:
    tokenizer = sentencepiece_tokenizer()
    encoder = encoder_for(tokenizer, COLON)
    (example,) = encode(encoder, user("Hi"), assistant("Hello"))
    # The prompt ends in a space, which the tokenizer would give to the answer's first token.
    prompt = encoder.encode_prompt(Conversation((user("Hi"),)))
    assert tokenizer.convert_ids_to_tokens(prompt)[-3:] == ["t", ":", "▁"]
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.convert_ids_to_tokens(example.input_ids[len(prompt) :]) == [*"Hello", "</s>"]


def test_a_tokenizer_without_token_positions() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert not tokenizer.is_fast
    encoder = encoder_for(tokenizer, CHATML, turns="whole")
    (example,) = encode(encoder, *HI)
    text = encoder.template.render([message.to_template() for message in HI]).removesuffix("\n")
    assert example.input_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert target_text(tokenizer, example) == "Hello 👋 you<|im_end|>Bye<|im_end|>"


@pytest.mark.parametrize("way", ["together", "apart"])
def test_a_token_that_thoughts_share_with_the_answer_is_the_answers(way: str) -> None:
    tokenizer = merging_tokenizer()
    prompt, thoughts, answer = "<|im_start|>", "k>\n", "\nHi<|im_end|>"
    assert len(tokenizer("\n\n").input_ids) == 1  # the case is there
    text = prompt + thoughts + answer
    spans, place = SpanTokenizer(tokenizer), ([(len(prompt), len(text))], [len(prompt + thoughts)])
    tokens = spans.apart(text, *place) if way == "apart" else spans.together(text, *place, *spans.encode_all([text]))
    assert tokens is not None
    assert [tokenizer.decode(tokens.ids[slice(*span)]) for span in tokens.spans] == [thoughts + answer]
    assert tokenizer.decode(tokens.ids[tokens.answers[0] :]) == "\n\nHi<|im_end|>"


# --- the short way to the tokenizer's Rust half ---

TEXTS = ["<|im_start|>Hi\n\nyou<|im_end|>", "", "a  b\tc 👋", "Hi"]


def called(tokenizer: Any, **options: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False, **options).input_ids for text in TEXTS]


def ids_of_all(spans: SpanTokenizer) -> list[list[int] | None]:
    return [None if encoding is None else encoding.ids for encoding in spans.encode_all(TEXTS)]


def spans_agree(tokenizer: Any) -> None:
    spans = SpanTokenizer(tokenizer)
    expected = called(tokenizer)
    for _ in range(2):
        assert [spans.ids(text) for text in TEXTS] == expected
        assert ids_of_all(spans) == expected


def bos_tokenizer() -> PreTrainedTokenizerFast:
    bos = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 259)])
    tokenizer = merging_tokenizer(bos)
    assert tokenizer("Hi").input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") == 259  # the case is there
    return tokenizer


@pytest.mark.parametrize("make", [merging_tokenizer, sentencepiece_tokenizer, bos_tokenizer])
def test_ids_are_those_of_a_call(make: Any) -> None:
    spans_agree(make())


def test_a_token_that_shall_be_split() -> None:
    tokenizer = merging_tokenizer()
    spans, expected = SpanTokenizer(tokenizer), called(tokenizer)
    tokenizer.split_special_tokens = True
    assert called(tokenizer) != expected  # the case is there
    tokenizer.split_special_tokens = False
    for other in (partial(called, tokenizer, split_special_tokens=True), lambda: None):
        other()  # leaves its setting in the Rust half
        assert [spans.ids(text) for text in TEXTS] == expected


def test_settings_that_other_calls_leave_behind_do_not_matter() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    spans, expected = SpanTokenizer(tokenizer), called(tokenizer)
    leave: list[dict[str, Any]] = [{"truncation": True, "max_length": 2}, {"padding": "max_length", "max_length": 50}]
    for options in leave:
        tokenizer(TEXTS, **options)
        assert ids_of_all(spans) == expected
        tokenizer(TEXTS, **options)
        assert [spans.ids(text) for text in TEXTS] == expected


class Doubling(PreTrainedTokenizerFast):
    """As remote code may do: a tokenizer that acts on a text before its Rust half does."""

    def __call__(self, text: Any, **options: Any) -> Any:
        return super().__call__(text + text, **options)


class Appending(PreTrainedTokenizerFast):
    """As remote code may do: a tokenizer that acts on the ids that its Rust half gives."""

    def _encode_plus(self, text: Any, **options: Any) -> Any:
        encoding = super()._encode_plus(text, **options)
        encoding["input_ids"] = [*encoding["input_ids"], 7]
        return encoding


def test_tokenizers_with_a_way_of_their_own_are_called() -> None:
    rust = merging_tokenizer().backend_tokenizer
    doubling = Doubling(tokenizer_object=rust)
    assert SpanTokenizer(doubling).ids("Hi") == SpanTokenizer(doubling).ids("Hi") == called(doubling)[-1]
    spans_agree(doubling)
    appending = SpanTokenizer(Appending(tokenizer_object=rust))
    assert appending.ids("Hi")[-1] == 7
    # Positions are those of other ids: none are better.
    assert appending.encode_all(["Hi"]) == [None]
