"""Documents to training examples. The one encoder of training, evaluation and preview."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import jinja2
import numpy as np
import tokenizers
import transformers

from ftkit.data.chat import ChatTemplate
from ftkit.data.reasoning import has_thoughts, split_thoughts
from ftkit.data.rendering import RenderedExample, TurnsMode, render_examples
from ftkit.data.token_spans import SpanTokenizer, Tokens
from ftkit.data.truncation import cut_left, shorten
from ftkit.data.types import IGNORE, Conversation, Document, Example, Message, Text
from ftkit.errors import UserError
from ftkit.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TURN = "no assistant turn to train on"
NO_TEXT = "no text"
NO_TARGET = "no token to train on"
TOO_LONG = "longer than max_length"
ANSWER_TOO_LONG = "the answer alone is longer than max_length"
PROMPT_TOO_LONG = "longer than max_length even without the text of its user message"

_REVISION = 1
"""Part of the digest; goes up when the same document and options give other examples."""


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """What became of one document."""

    examples: list[Example]
    """Each has a token to train on."""
    reason: str | None = None
    """Why there is no example, or with one example a turn, why at least one turn has none."""
    uncut: int = 0
    """Tokens of the document's longest example before anything was cut; 0 where nothing was encoded."""
    has_thoughts: bool = False
    """Whether a trained turn has thoughts, or the row's own keywords ask for none."""


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

    An encoder can be pickled, and gives the same examples in another process.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: ChatTemplate,
        *,
        max_length: int,
        turns: TurnsMode = "auto",
        train_on: Literal["assistant", "last_assistant", "all"] = "assistant",
        train_on_reasoning: bool = True,
        truncation: Literal["oldest_turns", "left", "drop", "error"] = "oldest_turns",
        system_prompt: str | None = None,
    ) -> None:
        """The options are those of the recipe's data section.

        Raises:
            UserError: the template does not print the system prompt.
        """
        self.template = template
        self.max_length = max_length
        self.turns = turns
        self.train_on = train_on
        self.train_on_reasoning = train_on_reasoning
        self.truncation = truncation
        self.system_prompt = system_prompt
        self._tokenizer = tokenizer
        self._spans = SpanTokenizer(tokenizer)
        if system_prompt is not None:
            template.check_system(system_prompt)

    @property
    def digest(self) -> str:
        """SHA-256 in hex over everything that decides which examples a document gives."""
        options = [self.max_length, self.turns, self.train_on, self.train_on_reasoning, self.truncation]
        content = {
            "revision": _REVISION,
            "versions": [module.__version__ for module in (transformers, tokenizers, jinja2)],
            "tokenizer": self._spans.digest,
            "template": [self.template.templates, self.template.kwargs],
            "options": [*options, self.system_prompt],
        }
        return hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()

    def encode(self, document: Document, where: str = "") -> EncodeResult:
        """The examples of a document: none, with the reason, where nothing is left to train on.

        What happens to examples over `max_length` is what `truncation` says; the last answer is never cut. An assistant
        message that opens a conversation has no prompt: it is context, never a target.

        Raises:
            UserError: the chat template cannot render the conversation, loses some of its text, or cannot be trained
                on; it is too long and `truncation` is `error`; names `where`, the row.
        """
        if isinstance(document, Text):
            return self._encode_text(document, where)
        assert isinstance(document, Conversation), "a task record is put into words before it is encoded"
        turns = self._turns_to_render(document.messages, where)
        if not turns and self.train_on != "all":
            return EncodeResult([], NO_TURN)
        conversation = self._completed(document, where)
        turns = [turn + len(conversation.messages) - len(document.messages) for turn in turns]
        examples: list[Example] = []
        reason, uncut = None, 0
        for encoded in self._encode_conversation(conversation, turns, self.turns, where):
            uncut = max(uncut, len(encoded.tokens.ids))
            example = self._fitting(encoded, where)
            if isinstance(example, str):
                reason = example
            elif example.num_targets:
                examples.append(example)
            else:
                reason = NO_TARGET
        return EncodeResult(examples, reason, uncut, self._has_thoughts(conversation, turns))

    def encode_prompt(self, conversation: Conversation, where: str = "") -> list[int]:
        """Ids of what a server feeds the model: the messages and the generation prompt.

        A conversation that ends in an answer is asked for this answer, any other for the next one.

        Raises:
            UserError: as `encode`.
        """
        asked = self._completed(replace(conversation, messages=_question(conversation.messages)), where)
        prompt = self._template_of(asked, where).generation_prompt(asked.messages, asked.tools, where=where)
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
        answered = self._completed(replace(conversation, messages=messages), where)
        tokens = self._encode_conversation(answered, [len(answered.messages) - 1], "each", where)[0].tokens
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
        examples = [_with_labels(piece, piece) for piece in pieces]
        return EncodeResult(examples, None if pieces else NO_TEXT, uncut=max(map(len, pieces), default=0))

    def _template_of(self, conversation: Conversation, where: str) -> ChatTemplate:
        return self.template.with_kwargs(conversation.chat_template_kwargs, where=where)

    def _completed(self, conversation: Conversation, where: str) -> Conversation:
        """With the system prompt where it has none, and with thoughts apart where the template prints them so."""
        template, tools = self._template_of(conversation, where), conversation.tools
        messages = tuple(
            split_thoughts(message)
            if template.prints_reasoning("tool_call" if message.tool_calls else "text", tools)
            else message
            for message in conversation.messages
        )
        if self.system_prompt is not None and all(message.role != "system" for message in messages):
            messages = (Message("system", self.system_prompt), *messages)
        return replace(conversation, messages=messages)

    def _has_thoughts(self, conversation: Conversation, turns: Sequence[int]) -> bool:
        if any(has_thoughts(conversation.messages[turn]) for turn in turns):
            return True
        return self.template.expects_thoughts and not self._template_of(conversation, "").expects_thoughts

    def _encode_conversation(
        self, conversation: Conversation, turns: Sequence[int], mode: TurnsMode, where: str
    ) -> list[_Encoded]:
        everything = self.train_on == "all"
        rendered = render_examples(
            self._template_of(conversation, where),
            conversation,
            turns,
            mode=mode,
            to_the_end=everything and mode != "each",
            train_on_reasoning=self.train_on_reasoning,
            where=where,
        )
        encoded = []
        for example in rendered:
            _check_unicode(example.text, where)
            tokens = self._spans.together(example.text, example.spans, example.answers)
            if tokens is None and mode == "auto" and len(example.spans) > 1 and not everything:
                return self._encode_conversation(conversation, turns, "each", where)
            tokens = tokens or self._spans.apart(example.text, example.spans, example.answers)
            encoded.append(_Encoded(conversation, example, tokens))
        return encoded

    def _fitting(self, encoded: _Encoded, where: str) -> Example | str:
        """The example in at most `max_length` tokens, or why there is none."""
        num_tokens = len(encoded.tokens.ids)
        if num_tokens <= self.max_length:
            return self._example(encoded)
        if self.truncation == "error":
            raise UserError(
                f"{num_tokens} tokens are more than data.max_length: {self.max_length}",
                how="raise it, shorten the row, or set data.truncation to oldest_turns, left or drop",
                where=where or None,
            )
        if self.truncation == "drop":
            return TOO_LONG
        start, end = self._last_answer(encoded)
        if self.truncation == "left":
            bos = self._tokenizer.bos_token_id
            rest = cut_left(self._example(encoded), start, max_length=self.max_length, bos=bos)
            return rest or ANSWER_TOO_LONG
        if (shorter := self._shorten(encoded, where)) is not None:
            return replace(self._example(shorter), truncated=True)
        return ANSWER_TOO_LONG if end - start >= self.max_length else PROMPT_TOO_LONG

    def _shorten(self, encoded: _Encoded, where: str) -> _Encoded | None:
        messages = encoded.conversation.messages[: encoded.rendered.num_messages]
        return shorten(
            replace(encoded.conversation, messages=messages),
            encoded.rendered.turns,
            encode=lambda conversation, turns: self._encode_conversation(conversation, turns, "whole", where)[0],
            length=lambda shorter: len(shorter.tokens.ids),
            max_length=self.max_length,
        )

    def _last_answer(self, encoded: _Encoded) -> tuple[int, int]:
        """[start, end) of the tokens of the last trained turn; nothing at the end where there is none."""
        num_tokens, messages = len(encoded.tokens.ids), encoded.conversation.messages
        turns = zip(encoded.rendered.turns, encoded.tokens.spans, strict=True)
        trained = [span for turn, span in turns if messages[turn].train is not False]
        return trained[-1] if trained else (num_tokens, num_tokens)

    def _example(self, encoded: _Encoded) -> Example:
        tokens = encoded.tokens
        ids = np.array(tokens.ids, np.int32)
        if self.train_on == "all":
            labels = ids.copy()
            for turn, (start, end), answer in zip(encoded.rendered.turns, tokens.spans, tokens.answers, strict=True):
                untrained = encoded.conversation.messages[turn].train is False
                labels[start : end if untrained else answer] = IGNORE
        else:
            labels = np.full_like(ids, IGNORE)
            for (_, end), answer in zip(tokens.spans, tokens.answers, strict=True):
                labels[answer:end] = ids[answer:end]
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


def make_encoder(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, section: DataSection) -> Encoder:
    """The encoder that a recipe's data section asks for.

    Raises:
        UserError: as `Encoder`.
    """
    return Encoder(
        tokenizer,
        template,
        max_length=section.max_length,
        turns=section.turns,
        train_on=section.train_on,
        train_on_reasoning=section.train_on_reasoning,
        truncation=section.truncation,
        system_prompt=section.system_prompt,
    )


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
