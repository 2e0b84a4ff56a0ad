"""The thoughts of an assistant's turn: read from its text, and found again in what a chat template prints."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ftkit.data.types import Message

_INLINE = re.compile(r"(\s*<think>)(.*?)(</think>)", re.DOTALL)
_CLOSING_TAG = re.compile(r"\s*(?:<[^<>\s]{1,40}>|\[/\w{1,40}\])")
"""</think>, <channel|>, <|end|>, [/THINK]."""
_STAND_IN = "\U0010fffd"
"""The last private-use character; stands where a thought was."""


def has_thoughts(message: Message) -> bool:
    """Whether the turn holds thoughts: in `reasoning_content`, or as <think>...</think> before its text."""
    inline = _INLINE.match(message.content)
    return bool((message.reasoning_content or "").strip() or (inline and inline[2].strip()))


def split_thoughts(message: Message) -> Message:
    """The message with what stands between <think> and </think> at its beginning as its `reasoning_content`.

    The newlines around both belong to neither: the template prints its own.
    """
    inline = _INLINE.match(message.content) if message.role == "assistant" else None
    if inline is None or message.reasoning_content is not None:
        return message
    content = message.content[inline.end() :].lstrip("\n")
    return replace(message, content=content, reasoning_content=inline[2].strip("\n") or None)


def find_end_of_thoughts(
    render: Callable[[Sequence[dict[str, Any]]], str], messages: Sequence[dict[str, Any]], turn: str
) -> int:
    """Characters at the beginning of a turn that are its thoughts, their tags included; 0 where it has none.

    The turn is rendered once more with a stand-in for its thoughts: what surrounds it are the template's own words.

    Args:
        render: the template, without the text of the turn's generation prompt.
        messages: in the template's form; the last one is the turn.
        turn: what `render(messages)` gave.

    Raises:
        ValueError: the thoughts do not stand before the answer, between tags.
    """
    last = messages[-1]
    thoughts, answer, replaced = _thoughts(last)
    if not thoughts.strip():
        return 0
    opening, _, after = render([*messages[:-1], replaced]).partition(_STAND_IN)
    end = len(turn) - len(after)
    closing = _CLOSING_TAG.match(after)
    printed = turn[len(opening) : end]
    if closing is None or opening + printed + after != turn or printed.strip() != thoughts.strip():
        raise ValueError("between tags of their own")
    end += closing.end()
    names = (call["function"]["name"] for call in last.get("tool_calls", ()))
    if not all(text in turn[end:] for text in (answer.strip(), *names)):
        raise ValueError("before the answer")
    return end


def _thoughts(message: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Thoughts and answer of a turn, and the message with the stand-in for its thoughts."""
    content = message["content"]
    if thoughts := message.get("reasoning_content"):
        return thoughts, content, {**message, "reasoning_content": _STAND_IN}
    if (inline := _INLINE.match(content)) is not None:
        answer = content[inline.end() :]
        return inline[2], answer, {**message, "content": inline[1] + _STAND_IN + inline[3] + answer}
    return "", content, message
