"""Short ways to build conversations and encoders, and to show which tokens are targets."""

from itertools import groupby
from typing import Any

import numpy as np

from ftkit.data.chat import ChatTemplate
from ftkit.data.encode import (
    Encoder,
)
from ftkit.data.types import IGNORE, Conversation, Document, Example, Message
from tests.tiny_models import tiny_tokenizer


def user(text: str, **fields: Any) -> Message:
    return Message("user", text, **fields)


def assistant(text: str, **fields: Any) -> Message:
    return Message("assistant", text, **fields)


def encoder_for(tokenizer: Any, template: str | None = None, **options: Any) -> Encoder:
    kwargs = options.pop("kwargs", None)
    options = {"max_length": 2048, "turns": "auto", "train_on": "assistant"} | options
    return Encoder(tokenizer, ChatTemplate(tokenizer, template or tokenizer.chat_template, kwargs), **options)


def encode(encoder: Encoder, *messages: Message) -> list[Example]:
    result = encoder.encode(Conversation(messages), "rows.jsonl:7")
    assert result.reason is None
    return result.examples


def marked(tokenizer: Any, example: Example) -> str:
    """The example's text with its targets in ⟦⟧."""
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    assert example.labels[0] == IGNORE
    is_target = example.labels != IGNORE
    assert (example.labels[is_target] == example.input_ids[is_target]).all()
    text = ""
    for trained, run in groupby(range(len(is_target)), key=lambda index: bool(is_target[index])):
        piece = tokenizer.decode(example.input_ids[list(run)], clean_up_tokenization_spaces=False)
        text += f"⟦{piece}⟧" if trained else piece
    return text


def target_text(tokenizer: Any, example: Example) -> str:
    return tokenizer.decode(example.input_ids[example.labels != IGNORE], clean_up_tokenization_spaces=False)


HI = (user("Hi"), assistant("Hello 👋 you"), user("And?"), assistant("Bye"))


def chatml_encoder(**options: Any) -> Encoder:
    return encoder_for(tiny_tokenizer(), **options)


def result_of(document: Document, **options: Any) -> Any:
    return chatml_encoder(**options).encode(document, "rows.jsonl:7")
