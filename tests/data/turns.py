"""Short conversations, and what a template makes of them."""

from typing import Any

import pytest

from ftkit.data.chat import ChatTemplate, Tools
from ftkit.data.rendering import render_examples
from ftkit.data.types import Conversation, Message
from ftkit.errors import UserError
from tests.data.trl_templates import tokenizer_for
from tests.tiny_models import CHATML, tiny_tokenizer

USER, ANSWER = Message("user", "Hi there"), Message("assistant", "Hello you")


def call(**arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}


WEATHER = Message("assistant", "", tool_calls=(call(city='Bad "Bonn"\\x', unit="Kelvin"),))
RESULT = Message("tool", '{"degrees": 3, "sky": "clear"}', name="weather", tool_call_id="abcdefghi")


def template_of(name: str, **kwargs: Any) -> ChatTemplate:
    tokenizer = tokenizer_for(name)
    return ChatTemplate(tokenizer, tokenizer.chat_template, kwargs)


def render(
    template: ChatTemplate, *messages: Message, tools: Tools = (), where: str = "rows.jsonl:7", **kwargs: Any
) -> list[Any]:
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return render_examples(template, Conversation(messages, tuple(tools)), turns, where=where, **kwargs)


def refusal(template: ChatTemplate, *messages: Message, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        render(template, *messages, **kwargs)
    return str(caught.value)


def chatml() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(), CHATML)
