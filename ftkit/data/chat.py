"""Chat templates: rendering as a server does it, the token that ends a turn, and the check that no text is lost."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from ftkit.data.direct_rendering import DirectRenderer
from ftkit.data.end_of_turn import ANSWERS, QUESTION, EndOfTurn, TurnKind, find_end_of_turn
from ftkit.data.frames import Frames
from ftkit.data.shadow import find_lost_text, template_constants
from ftkit.data.template_texts import pin_date
from ftkit.data.types import Message
from ftkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateMessage = dict[str, Any]
"""`Message.to_template()`: a message as templates take it."""
Tools = Sequence[dict[str, Any]]
Templates = dict[str, str]
"""Jinja text by name: "default", and "tool_use" where a tokenizer has one of its own for conversations with tools."""

MOST_VARIANTS = 64
"""Of a template with keywords of rows, kept at a time."""

OTHER_TEMPLATE = "choose another template with model.chat_template (a file, chatml or plain)"
TEMPLATE_WITH_TOOLS = (
    "name a file with a template for tools in model.chat_template, e.g. that of Qwen 2.5 for ChatML tokens"
)

# Arguments that `apply_chat_template` keeps for itself.
_RESERVED = {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
_RESERVED |= {"continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length"}
_RESERVED |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"}


class ChatTemplate:
    """A tokenizer's chat template, or another in its place, with the keywords that the recipe gives it."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str | Templates,
        kwargs: Mapping[str, Any] | None = None,
        *,
        warning: str | None = None,
        where: str = "",
    ) -> None:
        """`warning` says what a user should know about the choice of the template, `where` whose keywords they are.

        Raises:
            UserError: a keyword is none that a chat template can get.
        """
        self.kwargs = dict(sorted((kwargs or {}).items()))
        self.warning = warning
        self.templates: Templates = {"default": template} if isinstance(template, str) else dict(template)
        self._tokenizer = tokenizer
        self._pinned = {name: pin_date(text) for name, text in self.templates.items()}
        self._direct = DirectRenderer(tokenizer, self.kwargs)
        self._frames = Frames()
        self._constants: dict[str, re.Pattern[str]] = {}
        self._ends: dict[tuple[TurnKind, bool], EndOfTurn] = {}
        self._prints_reasoning: dict[tuple[TurnKind, bool], bool] = {}
        self._variants: dict[str, ChatTemplate] = {}
        if reserved := sorted(_RESERVED & self.kwargs.keys()):
            key = ("data", "chat_template_kwargs")
            what = f"{', '.join(reserved)}: not a keyword of chat templates"
            raise UserError(what, how="remove it", key=key, where=where or None)

    def with_kwargs(self, kwargs: Mapping[str, Any], *, where: str = "") -> "ChatTemplate":
        """This template with keywords of a row besides its own; the row's win.

        Raises:
            UserError: a keyword is none that a chat template can get; names `where`.
        """
        if not kwargs:
            return self
        name = json.dumps(dict(sorted(kwargs.items())), default=repr)
        if name not in self._variants:
            if len(self._variants) >= MOST_VARIANTS:
                self._variants.clear()
            merged = {**self.kwargs, **kwargs}
            self._variants[name] = ChatTemplate(self._tokenizer, self.templates, merged, where=where)
        return self._variants[name]

    def of_today(self) -> "ChatTemplate":
        """This template with today's date where it prints one, as a server has it; training pins the date."""
        template = ChatTemplate(self._tokenizer, self.templates, self.kwargs)
        template._pinned = dict(template.templates)
        return template

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Texts of the tokenizer's special tokens."""
        added = self._tokenizer.added_tokens_decoder.values()
        return frozenset({token.content for token in added if token.special} | set(self._tokenizer.all_special_tokens))

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that end a turn, of text or of tool calls; empty where neither can be trained on."""
        ends: list[EndOfTurn] = []
        kinds: tuple[TurnKind, ...] = ("text", "tool_call")
        for kind in kinds:
            try:
                ends.append(self.end_of_turn(kind))
            except UserError:
                continue  # Reported when a conversation with such a turn is rendered.
        vocabulary = self._tokenizer.get_vocab()
        return tuple(dict.fromkeys(vocabulary[end.token] for end in ends))

    def save_to(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Make this the tokenizer's template, so that it is saved with it."""
        only_one = self.templates.keys() == {"default"}
        tokenizer.chat_template = self.templates["default"] if only_one else dict(self.templates)

    def render(
        self,
        messages: Sequence[TemplateMessage],
        tools: Tools = (),
        *,
        generation_prompt: bool = False,
        where: str = "",
    ) -> str:
        """The template's text for `messages`, as a server renders it (but for today's date, which is pinned).

        Raises:
            UserError: the template refuses the messages or fails on them; names `where`.
        """
        template = self._pinned[self._name_for(tools)]

        def reference() -> str:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.kwargs,
            )
            assert isinstance(rendered, str)
            return rendered

        try:
            if tools:
                return reference()
            return self._direct.render(template, messages, generation_prompt=generation_prompt, reference=reference)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is no valid Jinja: {error}", key=("model", "chat_template")) from None
        except Exception as error:  # A template is foreign code: whatever it raises, it cannot do this conversation.
            raise UserError(
                f"the chat template fails on this conversation: {error}",
                how=f"mend the row, or {OTHER_TEMPLATE}",
                where=where or None,
            ) from None

    def generation_prompt(self, messages: Sequence[Message], tools: Tools = (), *, where: str = "") -> str:
        """What a server renders before the model answers `messages`.

        Raises:
            UserError: as `render`.
        """
        return self.render([message.to_template() for message in messages], tools, generation_prompt=True, where=where)

    def end_of_turn(self, kind: TurnKind, tools: Tools = (), *, where: str = "") -> EndOfTurn:
        """How turns of this kind end; found once for conversations with and without tools.

        Raises:
            UserError: they end in no special token, or the template fails on a plain probe; names `where`.
        """
        key = (kind, bool(tools))
        if key not in self._ends:
            try:
                self._ends[key] = find_end_of_turn(
                    lambda probe: self.render(probe, tools, where=where), self.special_tokens, kind
                )
            except ValueError as error:
                what = f"the chat template cannot be trained on: {error}"
                how = TEMPLATE_WITH_TOOLS if kind == "tool_call" else OTHER_TEMPLATE
                raise UserError(what, how=how, where=where or None) from None
        return self._ends[key]

    def check_text(
        self,
        messages: Sequence[TemplateMessage],
        rendered: str,
        needed: Collection[int],
        tools: Tools = (),
        *,
        where: str = "",
    ) -> None:
        """Check that `rendered`, the template's text for `messages`, has all text of the messages `needed`.

        Raises:
            UserError: text of theirs is missing or altered: thoughts, tool calls, messages of a role that the template
                does not know; names `where`.
        """

        def render(shadow: Sequence[TemplateMessage]) -> str:
            return self.render(shadow, tools, where=where)

        def constants() -> re.Pattern[str]:
            name = self._name_for(tools)
            if name not in self._constants:
                self._constants[name] = template_constants(self.templates[name])
            return self._constants[name]

        if not tools and self._frames.hold(messages, rendered, render):
            return
        lost = find_lost_text(render, messages, needed, rendered, constants)
        if lost is not None:
            raise UserError(f"the chat template {lost}", how=f"take it out, or {OTHER_TEMPLATE}", where=where or None)

    def check_tools(self, tools: Tools, *, where: str = "") -> None:
        """Check that the template prints tools at all: a model never learns from a row what it may call otherwise.

        Raises:
            UserError: there are tools, and it prints none; names `where`.
        """
        if tools and not self._prints_tools:
            what = "the chat template does not print the tools of a conversation"
            raise UserError(what, how=f"take them out, or {TEMPLATE_WITH_TOOLS}", where=where or None)

    @cached_property
    def _prints_tools(self) -> bool:
        name = "probe_7b02d5"
        parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "a text"}}}
        function = {"name": name, "description": "a probe", "parameters": parameters}
        try:
            return name in self.render([QUESTION], [{"type": "function", "function": function}])
        except UserError:  # Reported when a conversation with tools is rendered.
            return True

    def check_system(self, text: str) -> None:
        """Check that the template prints a system message of this text.

        Raises:
            UserError: it refuses or drops it.
        """
        messages = [{"role": "system", "content": text}, QUESTION]
        try:
            self.check_text(messages, self.render(messages), {0})
        except UserError as error:
            raise UserError(error.problems[0].what, how="remove it", key=("data", "system_prompt")) from None

    def prints_reasoning(self, kind: TurnKind, tools: Tools = ()) -> bool:
        """Whether the template prints `reasoning_content` of such a turn: thoughts have a place of their own."""
        key = (kind, bool(tools))
        if key not in self._prints_reasoning:
            thoughts = "7b02d5"
            try:
                probe = [QUESTION, {**ANSWERS[kind], "reasoning_content": thoughts}]
                self._prints_reasoning[key] = thoughts in self.render(probe, tools)
            except UserError:  # Reported when a conversation with such a turn is rendered.
                self._prints_reasoning[key] = False
        return self._prints_reasoning[key]

    @property
    def knows_enable_thinking(self) -> bool:
        """Whether the keyword `enable_thinking` changes something."""
        return any("enable_thinking" in text for text in self.templates.values())

    @cached_property
    def expects_thoughts(self) -> bool:
        """Whether the model is asked to think before it answers.

        A template that knows `enable_thinking` asks for it unless its generation prompt is the one without thinking,
        any other if it prints thoughts or begins them in its generation prompt.
        """
        try:
            prompt = self.render([QUESTION], generation_prompt=True)
            if self.knows_enable_thinking:
                without = self.with_kwargs({"enable_thinking": False})
                return prompt != without.render([QUESTION], generation_prompt=True)
        except UserError:  # Reported when a conversation is rendered.
            return False
        return prompt.rstrip().endswith("<think>") or self.prints_reasoning("text")

    def how_to_mend_prompt(self, messages: Sequence[TemplateMessage], tools: Tools = ()) -> str:
        """The fix for a template whose rendering of the last message does not begin with its generation prompt."""
        for value in (False, True) if self.knows_enable_thinking else ():
            mended = self.with_kwargs({"enable_thinking": value})
            try:
                prompt = mended.render(messages[:-1], tools, generation_prompt=True)
                if mended.render(messages, tools).startswith(prompt):
                    keywords = f"{{enable_thinking: {str(value).lower()}}}"
                    return f"set data.chat_template_kwargs: {keywords}"
            except UserError:
                pass
        return OTHER_TEMPLATE

    def _name_for(self, tools: Tools) -> str:
        return "tool_use" if tools and "tool_use" in self._pinned else "default"
