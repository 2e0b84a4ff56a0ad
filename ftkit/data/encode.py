"""Documents to training examples. The one encoder of training, evaluation and preview."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import jinja2
import tokenizers
import transformers
from tokenizers import Encoding

from ftkit.data.chat import ChatTemplate
from ftkit.data.labels import label_pieces, label_turns
from ftkit.data.reasoning import has_thoughts, split_thoughts
from ftkit.data.rendering import RenderedExample, TurnsMode, render_examples
from ftkit.data.token_spans import SpanTokenizer, Tokens
from ftkit.data.trained_turns import TrainOn, turns_to_render
from ftkit.data.truncation import TooLongError, cut_left, shorten
from ftkit.data.types import Conversation, Document, Example, Message, Text
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
class Rendered:
    """A conversation as text, before it is given to the tokenizer."""

    conversation: Conversation
    """Completed."""
    turns: Sequence[int]
    """To render."""
    mode: TurnsMode
    examples: list[RenderedExample]

    @property
    def texts(self) -> list[str]:
        """One for each of the examples."""
        return [example.text for example in self.examples]


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
        train_on: TrainOn = "assistant",
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
        started = self.start(document, where)
        return self.finish(started, self.tokenize(started.texts), where) if isinstance(started, Rendered) else started

    def start(self, document: Document, where: str = "") -> Rendered | EncodeResult:
        """`encode` up to the tokenizer: a conversation's text. Whatever needs none is done.

        Raises:
            UserError: as `encode`.
        """
        if isinstance(document, Text):
            return self._encode_text(document, where)
        assert isinstance(document, Conversation), "a task record is put into words before it is encoded"
        turns = turns_to_render(document.messages, self.train_on, where)
        if not turns and self.train_on != "all":
            return EncodeResult([], NO_TURN)
        conversation = self._completed(document, where)
        added = len(conversation.messages) - len(document.messages)
        return self._render(conversation, [turn + added for turn in turns], self.turns, where)

    def tokenize(self, texts: Sequence[str]) -> list[Encoding | None]:
        """What the tokenizer says of texts of `start`; None where it does not say which token lies where."""
        return self._spans.encode_all(texts)

    def finish(self, rendered: Rendered, encodings: Sequence[Encoding | None], where: str = "") -> EncodeResult:
        """The rest of `encode`; `encodings` are `tokenize`'s of the rendered texts.

        Raises:
            UserError: as `encode`.
        """
        examples: list[Example] = []
        reason, uncut = None, 0
        for encoded in self._with_tokens(rendered, encodings, where):
            uncut = max(uncut, len(encoded.tokens.ids))
            example = self._fitting(encoded, where)
            if isinstance(example, str):
                reason = example
            elif example.num_targets:
                examples.append(example)
            else:
                reason = NO_TARGET
        return EncodeResult(examples, reason, uncut, self._has_thoughts(rendered.conversation, rendered.turns))

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
        """Pieces of at most `max_length` tokens, EOS at the document's end; begun as the tokenizer begins a text."""
        if not document.text.strip():
            return EncodeResult([], NO_TEXT)
        _check_unicode(document.text, where)
        ids = self._tokenizer(document.text, verbose=False).input_ids
        eos = self._tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        examples = label_pieces(ids, self.max_length)
        uncut = max((example.num_tokens for example in examples), default=0)
        return EncodeResult(examples, None if examples else NO_TEXT, uncut)

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
        return conversation if messages == conversation.messages else replace(conversation, messages=messages)

    def _has_thoughts(self, conversation: Conversation, turns: Sequence[int]) -> bool:
        if any(has_thoughts(conversation.messages[turn]) for turn in turns):
            return True
        return self.template.expects_thoughts and not self._template_of(conversation, "").expects_thoughts

    def _encode_conversation(
        self, conversation: Conversation, turns: Sequence[int], mode: TurnsMode, where: str
    ) -> list[_Encoded]:
        rendered = self._render(conversation, turns, mode, where)
        return self._with_tokens(rendered, self.tokenize(rendered.texts), where)

    def _render(self, conversation: Conversation, turns: Sequence[int], mode: TurnsMode, where: str) -> Rendered:
        examples = render_examples(
            self._template_of(conversation, where),
            conversation,
            turns,
            mode=mode,
            to_the_end=self.train_on == "all" and mode != "each",
            train_on_reasoning=self.train_on_reasoning,
            where=where,
        )
        for example in examples:
            _check_unicode(example.text, where)
        return Rendered(conversation, turns, mode, examples)

    def _with_tokens(self, rendered: Rendered, encodings: Sequence[Encoding | None], where: str) -> list[_Encoded]:
        may_split = rendered.mode == "auto" and self.train_on != "all"
        encoded = []
        for example, encoding in zip(rendered.examples, encodings, strict=True):
            tokens = self._spans.together(example.text, example.spans, example.answers, encoding)
            if tokens is None and may_split and len(example.spans) > 1:
                return self._encode_conversation(rendered.conversation, rendered.turns, "each", where)
            tokens = tokens or self._spans.apart(example.text, example.spans, example.answers)
            encoded.append(_Encoded(rendered.conversation, example, tokens))
        return encoded

    def _fitting(self, encoded: _Encoded, where: str) -> Example | str:
        """The example in at most `max_length` tokens, or why there is none."""
        num_tokens = len(encoded.tokens.ids)
        if num_tokens <= self.max_length:
            return self._example(encoded)
        if self.truncation == "error":
            raise TooLongError(
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
        messages, turns = encoded.conversation.messages, encoded.rendered.turns
        return label_turns(encoded.tokens, turns, messages, everything=self.train_on == "all")


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
