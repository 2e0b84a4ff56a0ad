"""Makes a conversation shorter without touching its last answer: `truncation: oldest_turns` and `left`."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ftkit.data.types import IGNORE, Conversation, Example, Message
from ftkit.errors import UserError

Encoded = TypeVar("Encoded")

_GAP = " ... "
"""Stands where the middle of a message was."""


class TooLongError(UserError):
    """An example is longer than `max_length`, and `truncation: error` asks for an error."""


def shorten(
    conversation: Conversation,
    turns: Sequence[int],
    encode: Callable[[Conversation, Sequence[int]], Encoded],
    length: Callable[[Encoded], int],
    max_length: int,
) -> Encoded | None:
    """The longest remainder of a conversation that fits, encoded; None where none does.

    The oldest exchanges (a user message and all up to the next one) go first, whole, so that roles still alternate.
    System messages at the beginning and the tools stay, and so does the exchange of the last of `turns`. If that is not
    enough, the middle of the first remaining user message goes: instructions stand at its beginning or its end.

    Args:
        conversation: too long.
        turns: indices of the assistant's messages that are rendered, ascending.
        encode: encodes a conversation with the turns that are left.
        length: tokens of what `encode` gave.
        max_length: tokens.
    """
    messages = conversation.messages
    num_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    newest = turns[-1] if turns else len(messages)
    starts = [i for i in range(num_system, newest) if messages[i].role == "user"]
    if not starts:
        return None

    def encode_from(start: int) -> Encoded:
        kept = replace(conversation, messages=messages[:num_system] + messages[start:])
        return encode(kept, [turn - start + num_system for turn in turns if turn >= start])

    # Dropping more never makes it longer: the first start that fits keeps the most.
    best = bisect_left(starts, True, key=lambda start: length(encode_from(start)) <= max_length)
    if best < len(starts):
        return encode_from(starts[best])

    start = starts[-1]
    user = messages[start]

    def encode_cut(keep: int) -> Encoded:
        kept = (*messages[:num_system], _cut_middle(user, keep), *messages[start + 1 :])
        return encode(
            replace(conversation, messages=kept), [turn - start + num_system for turn in turns if turn >= start]
        )

    # From the shortest cut to the strongest; `num_cut` characters go.
    num_characters = len(user.content)
    cuts = range(1, num_characters)
    num_cut = bisect_left(cuts, True, key=lambda cut: length(encode_cut(num_characters - cut)) <= max_length)
    return encode_cut(num_characters - cuts[num_cut]) if num_cut < len(cuts) else None


def cut_left(example: Example, last_answer: int, *, max_length: int, bos: int | None) -> Example | None:
    """The example without tokens of its beginning; a BOS there stays. None where that would cut the last answer.

    Args:
        example: too long.
        last_answer: index of the first token of the last trained answer, which at least one token must stand before.
        max_length: tokens.
        bos: the tokenizer's BOS.
    """
    # A token that also opens later turns (SmolLM2 has <|im_start|> as its BOS) is no mark of the text's beginning.
    num_bos = int(example.input_ids[0] == bos and not (example.input_ids[1:] == bos).any())
    start = example.num_tokens - max_length + num_bos
    if start > last_answer - (1 - num_bos):
        return None
    ids = np.concatenate([example.input_ids[:num_bos], example.input_ids[start:]])
    labels = np.concatenate([example.labels[:num_bos], example.labels[start:]])
    labels[0] = IGNORE
    return Example(ids, labels, truncated=True)


def _cut_middle(message: Message, keep: int) -> Message:
    """The message with `keep` characters of its text: those at the beginning and those at the end."""
    tail = keep // 2
    text = message.content
    return replace(message, content=text[: keep - tail] + _GAP + text[len(text) - tail :])
