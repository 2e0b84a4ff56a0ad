"""The short way through a chat template gives what `apply_chat_template` gives, and is taken only where it does."""

import re
from collections.abc import Callable, Sequence
from datetime import date
from types import MethodType
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ftkit.data import direct_rendering
from ftkit.data.direct_rendering import DirectRenderer
from ftkit.data.template_texts import pin_date
from tests.data.conversations import cases
from tests.data.trl_templates import read_template, template_names, tokenizer_for
from tests.tiny_models import CHATML, tiny_tokenizer

Messages = list[dict[str, Any]]
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


class Watched:
    """A renderer of one template beside `apply_chat_template`, whose calls are counted."""

    def __init__(self, template: str, tokenizer: Any = None, **kwargs: Any) -> None:
        self.template, self.kwargs = template, kwargs
        self.tokenizer = tokenizer or tiny_tokenizer()
        self.renderer = DirectRenderer(self.tokenizer, kwargs)
        self.calls = 0

    def reference(self, messages: Messages, generation_prompt: bool = False) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **self.kwargs,
        )
        assert isinstance(rendered, str)
        return rendered

    def render(self, messages: Messages, generation_prompt: bool = False) -> str:
        def reference() -> str:
            self.calls += 1
            return self.reference(messages, generation_prompt)

        return self.renderer.render(self.template, messages, generation_prompt=generation_prompt, reference=reference)

    def is_direct(self, messages: Messages, generation_prompt: bool = False) -> bool:
        """Whether such messages no longer need the reference; they are rendered rightly in any case."""
        self.render(messages, generation_prompt)
        before = self.calls
        assert self.render(messages, generation_prompt) == self.reference(messages, generation_prompt)
        return self.calls == before


def outcome(render: Callable[..., str], messages: Messages, generation_prompt: bool) -> str:
    """The text, or how rendering fails; without places in memory, which a template may print."""
    try:
        return re.sub(r"0x[0-9a-f]+", "0x", render(messages, generation_prompt))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", template_names())
def test_every_template_renders_what_apply_chat_template_renders(name: str) -> None:
    watched = Watched(pin_date(read_template(name)), tokenizer_for(name))
    conversations: list[Messages] = []
    for case in cases():
        if not case.kinds & {"tools"}:
            messages = [message.to_template() for message in case.data.messages]
            conversations += [messages, messages[:-1], messages[:1]]
    for messages in conversations * 2:
        for generation_prompt in (False, True):
            expected = outcome(watched.reference, messages, generation_prompt)
            assert outcome(watched.render, messages, generation_prompt) == expected


def test_a_sequence_of_roles_is_compared_once() -> None:
    watched = Watched(CHATML)
    for text in ("a", "", "{{ x }}", "\n\n b"):
        messages = [{"role": "user", "content": text}, ANSWER]
        assert watched.render(messages) == watched.reference(messages)
    assert watched.calls == 1
    watched.render([USER, ANSWER], generation_prompt=True)
    watched.render([USER])
    assert watched.calls == 3
    watched.template += " "  # Another template, as one for tools is.
    assert watched.render([USER, ANSWER]) == watched.reference([USER, ANSWER])
    assert watched.calls == 4


def test_no_more_than_so_many_sequences_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_rendering, "_MOST_SHAPES", 3)
    watched = Watched(CHATML)
    for count in range(1, 9):
        assert watched.is_direct([USER] * count)
        assert len(watched.renderer._compared) <= 3


EVERYTHING = (
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ tools is none }}{{ documents is none }}"
    "{{ add_generation_prompt is true }}{{ chat_template is defined }}{{ continue_final_message is defined }}"
    "{{ mode | tojson }}{{ messages is sequence }}{{ messages | tojson }}{{ dict(a=1) }}"
    "{% for m in messages %}{% generation %}{{ m.items() | list }}{{ loop.index }}{% endgeneration %}"
    "{{ m.content.__class__ }}{{ m is sameas messages[-1] }}{{ m.content | trim | upper }}"
    "{{ m.thinking is defined }}{{ m.reasoning_content is defined }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
)


def test_a_template_sees_the_same_variables() -> None:
    watched = Watched(EVERYTHING, mode={"a": [1, 2.5, True, None, "x"]})
    assert watched.is_direct([USER, ANSWER])
    same = [USER, USER, ANSWER]  # One object twice: the reference makes two of it.
    assert watched.is_direct(same)
    assert "True" in watched.render(same)


def test_keywords_win_over_special_tokens() -> None:
    assert Watched("{{ eos_token }}", eos_token="<mine>").is_direct([USER])
    assert Watched("{{ eos_token }}", eos_token="<mine>").render([USER]) == "<mine>"


def test_special_tokens_are_those_of_the_moment() -> None:
    watched = Watched("{{ eos_token }}{{ messages[0].content }}")
    assert watched.is_direct([USER])
    watched.tokenizer.eos_token = "<|pad|>"
    assert watched.render([USER]) == "<|pad|>Hi"


class Derived(str):
    """A text with a method that templates could call."""

    def shout(self) -> str:
        return self.upper() + "!"


@pytest.mark.parametrize(
    "message",
    [
        {**ANSWER, "reasoning_content": "k"},
        {**ANSWER, "thinking": "k"},
        {**ANSWER, "name": None},
        {**ANSWER, "tool_calls": []},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": Derived("Hello")},
        {"role": Derived("assistant"), "content": "Hello"},
        {"role": "assistant", "content": 5},
    ],
)
def test_messages_with_more_than_role_and_text_are_the_references(message: dict[str, Any]) -> None:
    template = "{% for m in messages %}{{ m | tojson }}{{ (m.content | default('')).shout is defined }}{% endfor %}"
    assert not Watched(template).is_direct([USER, message])
    assert Watched(template).is_direct([USER, ANSWER])


@pytest.mark.parametrize("value", [date(2026, 1, 1), Derived("x"), (1, 2), {1, 2}, [Derived("x")], {"a": (1,)}])
def test_keywords_that_are_no_plain_data_are_the_references(value: Any) -> None:
    assert not Watched("{{ value }}{{ value.shout is defined }}", value=value).is_direct([USER])


def test_an_empty_conversation_is_the_references_error() -> None:
    with pytest.raises(ValueError, match="empty conversation"):
        Watched("constant").render([])


class OwnTokenizer(PreTrainedTokenizerFast):
    """As remote code may do."""

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return "own " + str(conversation[0]["content"])


def test_tokenizers_with_a_way_of_their_own_are_asked() -> None:
    own = OwnTokenizer(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    watched = Watched(CHATML, own)
    assert not watched.is_direct([USER])
    assert watched.render([{"role": "user", "content": "changed"}]) == "own changed"
    patched = tiny_tokenizer()
    patched.apply_chat_template = MethodType(OwnTokenizer.apply_chat_template, patched)  # type: ignore[method-assign]
    assert not Watched(CHATML, patched).is_direct([USER])


def test_after_a_difference_nothing_is_rendered_here() -> None:
    renderer = DirectRenderer(tiny_tokenizer(), {})

    def render(messages: Sequence[dict[str, Any]], expected: str) -> str:
        return renderer.render(CHATML, messages, generation_prompt=False, reference=lambda: expected)

    right = "<|im_start|>user\nHi<|im_end|>\n"
    assert render([USER], right) == right
    assert render([USER], "not asked") == right
    assert render([USER, USER], "different") == "different"
    assert render([USER, USER], "asked") == "asked"
    assert render([USER], "asked") == "asked"
    assert render([ANSWER], "<|im_start|>assistant\nHello<|im_end|>\n").startswith("<|im_start|>")
    assert render([ANSWER], "asked") == "asked"


@pytest.mark.parametrize("text", ["", " \n"])
def test_blank_texts_are_left_to_the_template(text: str) -> None:
    watched = Watched(
        "{% for m in messages %}{% if m.content | trim %}<{{ m.content }}>{% else %}-{% endif %}{% endfor %}"
    )
    assert watched.is_direct([USER, ANSWER])
    blank = [USER, {"role": "assistant", "content": text}]
    assert watched.render(blank) == watched.reference(blank) == "<Hi>-"


def test_the_reference_words_errors() -> None:
    refusing = "{% if messages[0].content == 'bad' %}{{ raise_exception('no ' + messages[0].content) }}{% endif %}ok"
    watched = Watched(refusing)
    assert watched.is_direct([USER])
    for _ in range(2):
        with pytest.raises(jinja2.TemplateError, match="no bad"):
            watched.render([{"role": "user", "content": "bad"}])
    with pytest.raises(jinja2.TemplateSyntaxError):
        Watched("{% if %}").render([USER])


def test_without_transformers_private_name_the_reference_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content | upper }}"
    watched = Watched(template)
    assert watched.is_direct([USER])
    monkeypatch.delattr(chat_template_utils, "_compile_jinja_template")
    assert watched.renderer.render(template, [USER], generation_prompt=False, reference=lambda: "asked") == "asked"
