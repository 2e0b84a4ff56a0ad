"""Thoughts: read in both forms, printed where the template has a place for them, left out of the targets."""

from typing import Any

import pytest
from transformers import ByT5Tokenizer

from ftkit.data.advice import warn_thinking
from ftkit.data.chat import ChatTemplate
from ftkit.data.reasoning import has_thoughts, split_thoughts
from ftkit.data.types import Conversation, Message
from ftkit.errors import UserError
from tests.data.encoding import assistant, encode, encoder_for, marked, target_text, user
from tests.data.trl_templates import read_template, tokenizer_for
from tests.tiny_models import CHATML, tiny_tokenizer

INLINE = assistant("<think>\nThey greet.\n</think>\n\nHello")
APART = assistant("Hello", reasoning_content="They greet.")


@pytest.mark.parametrize(
    ("content", "thoughts", "answer"),
    [
        ("<think>\nThey greet.\n</think>\n\nHello", "They greet.", "Hello"),
        ("\n<think>They greet.</think> Hello", "They greet.", " Hello"),
        ("<think>\n\n  two\n\nlines\n</think>Hello", "  two\n\nlines", "Hello"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("<think>\n\n</think>\n\nHello", None, "Hello"),
        ("<think>never closed", None, "<think>never closed"),
        ("Well, <think>late</think>", None, "Well, <think>late</think>"),
        ("plain", None, "plain"),
    ],
)
def test_thoughts_are_split_from_the_beginning_of_a_turn(content: str, thoughts: str | None, answer: str) -> None:
    message = split_thoughts(assistant(content))
    assert (message.reasoning_content, message.content) == (thoughts, answer)
    assert has_thoughts(assistant(content)) == has_thoughts(message) == (thoughts is not None)
    assert split_thoughts(user(content)) == user(content)
    apart = assistant(content, reasoning_content="apart")
    assert split_thoughts(apart) == apart


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "gemma4_v5", "lfm2_2_5", "muse_glimmer", "qwen3_6"])
def test_both_forms_are_one_where_the_template_prints_thoughts(name: str) -> None:
    tokenizer = tokenizer_for(name)
    (inline,) = encode(encoder_for(tokenizer), user("Hi"), INLINE)
    (apart,) = encode(encoder_for(tokenizer), user("Hi"), APART)
    assert inline.input_ids.tolist() == apart.input_ids.tolist()
    assert inline.labels.tolist() == apart.labels.tolist()


def test_where_it_does_not_inline_thoughts_are_text_and_others_are_lost() -> None:
    tokenizer = tokenizer_for("qwen2_5")
    (example,) = encode(encoder_for(tokenizer), user("Hi"), INLINE)
    assert target_text(tokenizer, example) == "<think>\nThey greet.\n</think>\n\nHello<|im_end|>"
    with pytest.raises(UserError, match="drops reasoning_content of message 2"):
        encode(encoder_for(tokenizer), user("Hi"), APART)


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}


def test_a_template_may_print_thoughts_before_tool_calls_only() -> None:
    tokenizer = tokenizer_for("gemma4")
    calling = assistant("<think>\nThey ask.\n</think>\n\n", tool_calls=(CALL,))
    (example,) = encode(encoder_for(tokenizer), user("Time?"), calling)
    assert target_text(tokenizer, example) == (
        '<|channel>thought\nThey ask.\n<channel|><|tool_call>call:now{zone:<|"|>UTC<|"|>}<tool_call|><|tool_response>'
    )
    (answered,) = encode(encoder_for(tokenizer), user("Hi"), INLINE)
    assert target_text(tokenizer, answered).startswith("<think>\nThey greet.")


# --- not trained on ---

WITHOUT: dict[str, tuple[str, str]] = {
    "qwen3": ("<think>\nThey greet.\n</think>", "\n\nHello<|im_end|>"),
    "qwen3_6": ("They greet.\n</think>", "\n\nHello<|im_end|>"),
    "gptoss": (
        "<|channel|>analysis<|message|>They greet.<|end|>",
        "<|start|>assistant<|channel|>final<|message|>Hello<|return|>",
    ),
    "muse_glimmer": (" to=self<|message|>They greet.<|eom|>", "<|start|>assistant to=user<|message|>Hello<|eot|>"),
    "gemma4_v5": ("<|channel>thought\nThey greet.\n<channel|>", "Hello<turn|>"),
    "lfm2_2_5": ("<think>They greet.</think>", "Hello<|im_end|>"),
    "nemotron_3_nano": ("They greet.\n</think>", "\nHello<|im_end|>"),
    "qwen2_5": ("<think>\nThey greet.\n</think>", "\n\nHello<|im_end|>"),
}


@pytest.mark.parametrize("source", ["bytes", "merges", "seams"])
@pytest.mark.parametrize(("name", "thoughts", "answer"), [(name, *texts) for name, texts in WITHOUT.items()])
def test_thoughts_and_their_tags_are_no_targets(name: str, thoughts: str, answer: str, source: str) -> None:
    tokenizer = tokenizer_for(name, source)
    (trained,) = encode(encoder_for(tokenizer), user("Hi"), INLINE)
    (untrained,) = encode(encoder_for(tokenizer, train_on_reasoning=False), user("Hi"), INLINE)
    assert untrained.input_ids.tolist() == trained.input_ids.tolist()
    assert target_text(tokenizer, trained) == thoughts + answer
    # Where the tokenizer merges the tag with what follows, the token is the answer's.
    assert target_text(tokenizer, untrained).endswith(answer)
    assert len(target_text(tokenizer, untrained)) - len(answer) <= (2 if source == "seams" else 0)


def test_in_every_turn_of_one_example_and_with_all_tokens_trained() -> None:
    tokenizer = tokenizer_for("qwen2_5", "bytes")
    messages = (user("Hi"), INLINE, user("And?"), assistant("Bye"))
    (example,) = encode(encoder_for(tokenizer, train_on_reasoning=False), *messages)
    assert target_text(tokenizer, example) == "\n\nHello<|im_end|>Bye<|im_end|>"
    (everything,) = encode(encoder_for(tokenizer, train_on_reasoning=False, train_on="all"), *messages)
    text = marked(tokenizer, everything)
    assert "assistant\n⟧<think>\nThey greet.\n</think>⟦\n\nHello<|im_end|>\n<|im_start|>user\nAnd?" in text


def test_with_a_tokenizer_that_does_not_say_where_its_tokens_lie() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    (example,) = encode(encoder_for(tokenizer, CHATML, train_on_reasoning=False), user("Hi"), INLINE)
    assert target_text(tokenizer, example) == "\n\nHello<|im_end|>"


@pytest.mark.parametrize("thoughts", ["think", "</think", "Hello", "<|im_end|>"])
def test_thoughts_that_say_what_stands_around_them(thoughts: str) -> None:
    tokenizer = tokenizer_for("qwen3", "bytes")
    message = assistant("Hello", reasoning_content=thoughts)
    (example,) = encode(encoder_for(tokenizer, train_on_reasoning=False), user("Hi"), message)
    assert target_text(tokenizer, example) == "\n\nHello<|im_end|>"


PRINTS_AFTER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PRINTS_WITHOUT_TAGS = (
    PRINTS_AFTER.replace("<think>", "")
    .replace("</think>", "\n")
    .replace("{{ m.content }}{%", "{%")
    .replace("{% endif %}<|im_end|>", "{% endif %}{{ m.content }}<|im_end|>")
)


@pytest.mark.parametrize(
    ("template", "how"), [(PRINTS_AFTER, "before the answer"), (PRINTS_WITHOUT_TAGS, "between tags of their own")]
)
def test_thoughts_that_cannot_be_told_from_the_answer_are_refused(template: str, how: str) -> None:
    tokenizer = tiny_tokenizer(template)
    assert encode(encoder_for(tokenizer), user("Hi"), APART)
    with pytest.raises(UserError) as caught:
        encode(encoder_for(tokenizer, train_on_reasoning=False), user("Hi"), APART)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: the thoughts of message 2 cannot be left out of the training")
    assert f"does not print them {how}; set data.train_on_reasoning: true" in message


def test_thoughts_after_a_tool_call_are_not_cut_with_it() -> None:
    calling = assistant("<think>\nThey ask.\n</think>\n\n", tool_calls=(CALL,))
    with pytest.raises(UserError, match="does not print them before the answer"):
        encode(encoder_for(tokenizer_for("gemma4_v2"), train_on_reasoning=False), user("Time?"), calling)


# --- models that think ---

EXPECTS: dict[tuple[str, bool | None], bool] = {
    ("qwen2_5", None): False,
    ("gemma3", None): False,
    ("qwen3", None): True,
    ("qwen3", True): True,
    ("qwen3", False): False,
    ("qwen3_5_think", None): True,
    ("qwen3_5_nothink", None): False,
    ("qwen3_5_nothink", True): True,
    ("nemotron_3_nano", None): True,
    ("gemma4_v5", None): False,
    ("gemma4_v5", True): True,
    ("gptoss", None): True,
    ("deepseekv3", None): True,
}


@pytest.mark.parametrize(("name", "keyword", "expected"), [(*case, thinks) for case, thinks in EXPECTS.items()])
def test_which_templates_ask_for_thoughts(name: str, keyword: bool | None, expected: bool) -> None:
    kwargs: dict[str, Any] = {} if keyword is None else {"enable_thinking": keyword}
    assert ChatTemplate(tokenizer_for(name), read_template(name), kwargs).expects_thoughts == expected


def test_the_warning_names_the_remedies_that_there_are() -> None:
    qwen, gptoss = (ChatTemplate(tokenizer_for(name), read_template(name)) for name in ("qwen3", "gptoss"))
    (warning,) = warn_thinking(qwen, 0, 100)
    assert "no trained turn has thoughts" in warning
    assert "set data.chat_template_kwargs: {enable_thinking: false}, or train on rows with thoughts" in warning
    # One row in 25 does not keep it from unlearning.
    (warning,) = warn_thinking(gptoss, 4, 100)
    assert "4 of 100 rows have thoughts" in warning
    assert "enable_thinking" not in warning
    assert warning.endswith("train on rows with thoughts (reasoning_content, or <think>...</think> before the answer)")
    assert warn_thinking(qwen, 5, 100) == []
    assert warn_thinking(qwen.with_kwargs({"enable_thinking": False}), 0, 100) == []


def test_an_encoder_says_whether_it_saw_thoughts() -> None:
    encoder = encoder_for(tokenizer_for("qwen3"))

    def saw(*messages: Message, **kwargs: Any) -> bool:
        return encoder.encode(Conversation(messages, **kwargs)).has_thoughts

    assert saw(user("Hi"), INLINE)
    assert saw(user("Hi"), APART)
    assert not saw(user("Hi"), assistant("Hello"))
    assert not saw(user("Hi"), assistant("<think>\n\n</think>\n\nHello"))
    # A thought that is not trained on does not count; a row that turns thinking off lacks none.
    assert not saw(
        user("Hi"), assistant("Hello", reasoning_content="They greet.", train=False), user("And?"), assistant("B")
    )
    assert saw(user("Hi"), assistant("Hello"), chat_template_kwargs={"enable_thinking": False})
