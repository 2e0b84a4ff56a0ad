"""Documents to training examples. The one encoder of training, evaluation and preview."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ftkit.data.chat import ChatTemplate
from ftkit.data.rendering import RenderedExample, TurnsMode, render_examples
from ftkit.data.token_spans import SpanTokenizer, Tokens
from ftkit.data.truncation import shorten
from ftkit.data.types import IGNORE, Conversation, Document, Example, Message, Text
from ftkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TURN = "no assistant turn to train on"
NO_TEXT = "no text"
ANSWER_TOO_LONG = "the answer alone is longer than max_length"
PROMPT_TOO_LONG = "longer than max_length even without the text of its user message"


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """What became of one document."""

    examples: list[Example]
    reason: str | None = None
    """Why there is no example, or with one example a turn, why at least one turn has none."""
    uncut: int = 0
    """Tokens of the longest example before anything was cut; 0 where nothing was."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One example before its labels."""

    conversation: Conversation
    rendered: RenderedExample
    tokens: Tokens


class Encoder:
    """Turns documents into examples of at most `max_length` tokens.

    Conversations go through the chat template. Targets are the tokens of assistant turns, end of turn included; the ids
    before a turn are those that a server would feed for its generation prompt. Where a tokenizer merges across that
    boundary, `turns: auto` makes one example a turn, whose prompt and answer are encoded apart. Texts do not go through
    the template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: ChatTemplate,
        *,
        max_length: int,
        turns: TurnsMode,
        train_on: Literal["assistant", "last_assistant", "all"],
    ) -> None:
        self.template = template
        self.max_length = max_length
        self.turns = turns
        self.train_on = train_on
        self._tokenizer = tokenizer
        self._spans = SpanTokenizer(tokenizer)

    @property
    def digest(self) -> str:
        """SHA-256 in hex."""
        from ftkit.data.cache import digest_of

        return digest_of(
            self._tokenizer.backend_tokenizer.to_str(),
            self.template.templates,
            self.template.kwargs,
            self.max_length,
            self.turns,
            self.train_on,
        )

    def encode(self, document: Document, where: str = "") -> EncodeResult:
        """The examples of a document: none, with the reason, where nothing is left to train on.

        Too long conversations lose their oldest exchanges, then the middle of the first remaining user message; answers
        are never cut. An assistant message that opens a conversation has no prompt: it is context, never a target.

        Raises:
            UserError: the chat template cannot render the conversation, loses some of its text, or cannot be trained
                on; names `where`, the row.
        """
        if isinstance(document, Text):
            return self._encode_text(document, where)
        turns = self._turns_to_render(document.messages, where)
        if not turns and self.train_on != "all":
            return EncodeResult([], NO_TURN)
        examples, reason = [], None
        for encoded in self._encode_conversation(document, turns, self.turns, where):
            if len(encoded.tokens.ids) <= self.max_length:
                examples.append(self._example(encoded))
            elif (shorter := self._shorten(encoded, where)) is not None:
                examples.append(replace(self._example(shorter), truncated=True))
            else:
                start, end = encoded.tokens.spans[-1] if encoded.tokens.spans else (0, 0)
                reason = ANSWER_TOO_LONG if end - start >= self.max_length else PROMPT_TOO_LONG
        return EncodeResult(examples, reason)

    def encode_prompt(self, conversation: Conversation, where: str = "") -> list[int]:
        """Ids of what a server feeds the model: the messages and the generation prompt.

        A conversation that ends in an answer is asked for this answer, any other for the next one.

        Raises:
            UserError: as `encode`.
        """
        messages = _question(conversation.messages)
        prompt = self.template.generation_prompt(messages, conversation.tools, where=where)
        _check_unicode(prompt, where)
        return self._spans.ids(prompt)

    def encode_answer(
        self, conversation: Conversation, answer: str, *, end_of_turn: bool = True, where: str = ""
    ) -> list[int]:
        """Ids that follow `encode_prompt(conversation)` when the assistant answers `answer`, as training has them.

        Raises:
            UserError: as `encode`.
        """
        messages = (*_question(conversation.messages), Message("assistant", answer))
        answered = replace(conversation, messages=messages)
        tokens = self._encode_conversation(answered, [len(messages) - 1], "each", where)[0].tokens
        start, end = tokens.spans[0]
        return tokens.ids[start : end if end_of_turn else end - 1]

    def _encode_text(self, document: Text, where: str) -> EncodeResult:
        """Pieces of at most `max_length` tokens, EOS at the document's end; begun as the tokenizer begins a text.

        A piece begins with the last token of the one before, so that every token but the document's first is a target
        exactly once.
        """
        if not document.text.strip():
            return EncodeResult([], NO_TEXT)
        _check_unicode(document.text, where)
        ids = self._tokenizer(document.text, verbose=False).input_ids
        eos = self._tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        starts = range(0, len(ids) - 1, self.max_length - 1)
        pieces = [np.array(ids[start : start + self.max_length], np.int32) for start in starts]
        return EncodeResult([_with_labels(piece, piece) for piece in pieces], None if pieces else NO_TEXT)

    def _encode_conversation(
        self, conversation: Conversation, turns: Sequence[int], mode: TurnsMode, where: str
    ) -> list[_Encoded]:
        everything = self.train_on == "all"
        rendered = render_examples(
            self.template, conversation, turns, mode=mode, to_the_end=everything and mode != "each", where=where
        )
        encoded = []
        for example in rendered:
            _check_unicode(example.text, where)
            tokens = self._spans.together(example.text, example.spans)
            if tokens is None and mode == "auto" and len(example.spans) > 1 and not everything:
                return self._encode_conversation(conversation, turns, "each", where)
            tokens = tokens or self._spans.apart(example.text, example.spans)
            encoded.append(_Encoded(conversation, example, tokens))
        return encoded

    def _shorten(self, encoded: _Encoded, where: str) -> _Encoded | None:
        messages = encoded.conversation.messages[: encoded.rendered.num_messages]
        return shorten(
            replace(encoded.conversation, messages=messages),
            encoded.rendered.turns,
            encode=lambda conversation, turns: self._encode_conversation(conversation, turns, "whole", where)[0],
            length=lambda shorter: len(shorter.tokens.ids),
            max_length=self.max_length,
        )

    def _example(self, encoded: _Encoded) -> Example:
        ids = np.array(encoded.tokens.ids, np.int32)
        if self.train_on == "all":
            labels = ids.copy()
            for turn, (start, end) in zip(encoded.rendered.turns, encoded.tokens.spans, strict=True):
                if encoded.conversation.messages[turn].train is False:
                    labels[start:end] = IGNORE
        else:
            labels = np.full_like(ids, IGNORE)
            for start, end in encoded.tokens.spans:
                labels[start:end] = ids[start:end]
        return _with_labels(ids, labels)

    def _turns_to_render(self, messages: Sequence[Message], where: str) -> list[int]:
        """Assistant turns whose place must be known: the trained ones, and with `train_on: all` the untrained too."""
        answers = [index for index, message in enumerate(messages) if message.role == "assistant" and index > 0]
        _check_flags(messages, self.train_on == "all", where)
        if self.train_on == "all":
            return answers
        by_default = answers[-1:] if self.train_on == "last_assistant" else answers
        flags = {index: messages[index].train for index in answers}
        return [index for index in answers if flags[index] or (flags[index] is None and index in by_default)]


def _check_flags(messages: Sequence[Message], everything: bool, where: str) -> None:
    """Refuse `train` on a message that cannot follow it: only of the assistant's is known where their tokens lie."""
    for number, message in enumerate(messages, start=1):
        if message.role != "assistant" and message.train is not None and message.train != everything:
            raise UserError(
                f"message {number} ({message.role}) has train: {str(message.train).lower()}, which only assistant "
                f"messages can have with data.train_on: {'all' if everything else 'assistant'}",
                how="take the flag out",
                where=where or None,
            )


def _check_unicode(text: str, where: str) -> None:
    """Refuse halves of characters, which JSON can write (`"\\ud83d"`) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        what = f"the text has half a character: {half}"
        raise UserError(what, how="write the row as valid Unicode", where=where or None) from None


def _question(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without an answer at their end."""
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def _with_labels(input_ids: np.ndarray, labels: np.ndarray) -> Example:
    """An example; its first token is predicted from nothing and is no target."""
    labels = labels.copy()
    labels[:1] = IGNORE
    return Example(input_ids, labels)
