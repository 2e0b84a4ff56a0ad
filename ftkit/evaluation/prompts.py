"""Items as token ids: through a chat template as training has them, or as plain text."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftkit.data.encode import Encoder
from ftkit.data.truncation import shorten
from ftkit.data.types import IGNORE, Conversation, Example, Text
from ftkit.errors import UserError
from ftkit.evaluation.items import Item
from ftkit.evaluation.schema import PromptMode

BLOCK_END = "\n\n"
"""Between the parts of a plain-text prompt."""


class Prompts(Protocol):
    """How a model is asked, and how its answers are read. `limit` is the number of tokens that the result may have."""

    end_ids: tuple[int, ...]
    """Tokens that end an answer."""

    def question(self, item: Item, limit: int) -> list[int]:
        """What the model is fed before it answers."""
        ...

    def answered(self, item: Item, answer: str, limit: int) -> Example:
        """The question with an answer, whose tokens are the targets."""
        ...

    def document(self, item: Item, limit: int) -> list[Example]:
        """All that is trained on in the item's document."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, from the beginning of the answer."""
        ...

    def answer_end(self, items: Sequence[Item]) -> str | None:
        """Text at which an answer to one of `items` is over, though no token has ended it. None: there is none."""
        ...


class ChatPrompts:
    """Through the chat template: before an answer stands what a server feeds, after it the end of turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((*encoder.template.end_of_turn_ids, *eos)))

    def question(self, item: Item, limit: int) -> list[int]:
        """The generation prompt. One that is too long loses what training cuts: its oldest exchanges, then the middle
        of its first user message."""
        ids = self._encoder.encode_prompt(_conversation(item), item.where)
        if len(ids) <= limit:
            return ids
        conversation = _conversation(item)
        shorter = shorten(
            conversation,
            [len(conversation.messages) - 1],
            encode=lambda kept, _: self._encoder.encode_prompt(kept, item.where),
            length=len,
            max_length=limit,
        )
        return shorter if shorter is not None else ids[-limit:]

    def answered(self, item: Item, answer: str, limit: int) -> Example:
        """The generation prompt, the answer and its end of turn."""
        answer_ids = self._encoder.encode_answer(_conversation(item), answer, where=item.where)
        return _example(self.question(item, max(1, limit - len(answer_ids))), answer_ids, limit)

    def document(self, item: Item, limit: int) -> list[Example]:
        """Exactly the examples that training or its validation would have made of the document."""
        examples = self._encoder.encode(item.document, item.where).examples
        return [piece for example in examples for piece in _pieces(example, limit)]

    def decode(self, ids: Sequence[int]) -> str:
        """The answer without the thoughts before it, where the model writes its thoughts into `<think>`."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return text.rpartition("</think>")[2].lstrip()

    def answer_end(self, items: Sequence[Item]) -> None:
        """A chat's answers end in the end of turn, and in nothing else."""


class RawPrompts:
    """As plain text: user and system messages as they are, answers after a space, blank lines between the parts.

    A raw model goes on writing: an answer is over at the end of its line, or at a blank line where a reference of the
    task has several lines.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.end_ids: tuple[int, ...] = () if eos is None else (int(eos),)
        # Asked of the tokenizer itself: some have a BOS that they never put before a text.
        self._begin = [int(bos)] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []

    def question(self, item: Item, limit: int) -> list[int]:
        """The text before the answer. One that is too long loses its beginning."""
        return (self._begin + self._encode(_raw_question(item))[0])[-limit:]

    def answered(self, item: Item, answer: str, limit: int) -> Example:
        """Question and answer encoded in one, since tokenizers join the space and the word after it.

        A token that lies across the boundary belongs to the answer.
        """
        question = _raw_question(item)
        ids, ends = self._encode(question + _separator(question) + answer)
        num_before = sum(end <= len(question) for end in ends)
        return _example(self._begin + ids[:num_before], ids[num_before:], limit)

    def document(self, item: Item, limit: int) -> list[Example]:
        """Plain text as a whole; of a conversation the last answer."""
        if isinstance(item.document, Text):
            ids = np.array(self._begin + self._encode(item.document.text)[0], np.int32)
            return _pieces(Example(ids, _targets_from(ids, 1)), limit)
        return [self.answered(item, item.document.messages[-1].content, limit)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without white space before it."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).lstrip()

    def answer_end(self, items: Sequence[Item]) -> str:
        """The end of a line; a blank line where a reference has several lines."""
        several_lines = any("\n" in reference for item in items for reference in item.truth.references)
        return BLOCK_END if several_lines else "\n"

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids without special tokens, and the character that each ends at."""
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoding.input_ids), [end for _, end in encoding.offset_mapping]


def choose_mode(requested: PromptMode, *, has_template: bool) -> PromptMode:
    """`chat` or `raw`, for all models alike.

    Args:
        requested: the suite's `prompt`.
        has_template: whether any model that is compared has a chat template.

    Raises:
        UserError: chat was asked for and there is no template.
    """
    if requested == "auto":
        return "chat" if has_template else "raw"
    if requested == "chat" and not has_template:
        raise UserError("no model that is compared has a chat template", how="set `prompt: raw`", key=("prompt",))
    return requested


def _conversation(item: Item) -> Conversation:
    assert isinstance(item.document, Conversation), "plain text asks nothing"
    return item.document


def _raw_question(item: Item) -> str:
    """Everything before the answer; without spaces at the end, which tokenizers expect before the next word."""
    text = ""
    for message in item.question.messages:
        if message.role == "assistant":
            text += _separator(text) + message.content
        else:
            text += (BLOCK_END if text else "") + message.content
    return text.rstrip(" ")


def _separator(question: str) -> str:
    return "" if not question or question[-1].isspace() else " "


def _example(before: Sequence[int], answer: Sequence[int], limit: int) -> Example:
    """An example whose targets are the answer; what exceeds `limit` goes from the beginning."""
    ids = np.array([*before, *answer], np.int32)
    kept, first = ids[-limit:], max(1, len(ids) - len(answer) - max(0, len(ids) - limit))
    return Example(kept, _targets_from(kept, first))


def _targets_from(ids: np.ndarray, first: int) -> np.ndarray:
    labels = np.full_like(ids, IGNORE)
    labels[first:] = ids[first:]
    return labels


def _pieces(example: Example, limit: int) -> list[Example]:
    """The example in pieces that the model can take, each begun with the last token of the one before, so that every
    target is predicted once."""
    starts = range(0, max(1, example.num_tokens - 1), limit - 1)
    pieces = []
    for start in starts:
        labels = example.labels[start : start + limit].copy()
        labels[:1] = IGNORE
        pieces.append(Example(example.input_ids[start : start + limit], labels, example.truncated))
    return pieces
