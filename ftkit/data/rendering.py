"""A conversation as text, and which part of the text is the assistant's.

For turn k let G be the rendering of the messages before it with the generation prompt, which is what a server feeds the
model, and L the rendering of the messages up to and with it. Where L starts with G, the turn is L[len(G) : end of the
end-of-turn token]. No other mechanism is used: templates need no marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from ftkit.data.chat import OTHER_TEMPLATE, ChatTemplate, TemplateMessage, Tools
from ftkit.data.end_of_turn import common_length
from ftkit.data.reasoning import find_end_of_thoughts
from ftkit.data.types import Conversation
from ftkit.errors import UserError

TurnsMode = Literal["auto", "whole", "each"]


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """One example as text."""

    text: str
    """From the conversation's beginning to the end-of-turn token of the last span, or to the conversation's end."""
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) of each turn: from after its generation prompt to its end-of-turn token, inclusive."""
    answers: tuple[int, ...]
    """The character of each span at which training begins: after its thoughts where these are not trained on."""
    turns: tuple[int, ...]
    """Indices of the messages that the spans belong to."""
    num_messages: int
    """Messages that `text` was rendered from; the conversation's first ones."""

    @property
    def prompt_end(self) -> int:
        """Characters before the first turn: what a server renders."""
        return self.spans[0][0] if self.spans else 0


def render_examples(
    template: ChatTemplate,
    conversation: Conversation,
    turns: Sequence[int],
    *,
    mode: TurnsMode = "auto",
    to_the_end: bool = False,
    train_on_reasoning: bool = True,
    where: str = "",
) -> list[RenderedExample]:
    """Render assistant turns as one example, or as one a turn.

    They are one example if its text begins, for each of them, with the turn's own rendering up to its end: the same
    prompt, body and end of turn. Else (`mode="auto"`) each is one, because the template writes a turn otherwise once
    it is history: Qwen 3 drops its thoughts, GPT-OSS ends it in another token.

    Args:
        template: the chat template.
        conversation: messages and tools.
        turns: indices of the assistant's messages to render, ascending.
        mode: `whole` and `each` leave no choice.
        to_the_end: one example for all turns has the whole conversation's text, not only that up to the last turn.
        train_on_reasoning: whether the answers begin with their thoughts.
        where: names the row in errors.

    Raises:
        UserError: the template fails on this conversation, does not print all of its text or any of its tools, prints a
            turn that does not begin with its generation prompt or ends in no special token; or `mode="whole"` is
            impossible; or thoughts that are not to be trained on cannot be told from their answer.
    """
    template.check_tools(conversation.tools, where=where)
    messages = [message.to_template() for message in conversation.messages]
    rendered = [_render_turn(template, messages[: turn + 1], conversation.tools, where) for turn in turns]
    if not train_on_reasoning:
        rendered = [_without_thoughts(template, messages, turn, conversation.tools, where) for turn in rendered]
    if mode != "each":
        num_messages = len(messages) if to_the_end or not turns else turns[-1] + 1
        whole = _render_whole(template, messages[:num_messages], rendered, conversation.tools, where)
        if whole is not None:
            return [whole if to_the_end or not turns else _up_to_last_span(whole)]
        if mode == "whole":
            raise UserError(
                "the chat template writes an assistant turn otherwise once the conversation goes on, so that this "
                "conversation cannot be one example",
                how="set data.turns: each (or auto)",
                where=where or None,
            )
    for turn in rendered:
        needed = _others(messages[: turn.num_messages]) | set(turn.turns)
        template.check_text(messages[: turn.num_messages], turn.text, needed, conversation.tools, where=where)
    return [_up_to_last_span(turn) for turn in rendered]


def _render_turn(
    template: ChatTemplate, messages: Sequence[TemplateMessage], tools: Tools, where: str
) -> RenderedExample:
    """The last of `messages` as a turn; the text is all that the template prints."""
    prompt = template.render(messages[:-1], tools, generation_prompt=True, where=where)
    text = template.render(messages, tools, where=where)
    if not text.startswith(prompt):
        at = common_length(prompt, text)
        raise UserError(
            f"the chat template does not begin message {len(messages)} with its own generation prompt: the prompt has "
            f"{prompt[at : at + 30]!r} where the message has {text[at : at + 30]!r}",
            how=template.how_to_mend_prompt(messages, tools),
            where=where or None,
        )
    ending = template.end_of_turn("tool_call" if messages[-1].get("tool_calls") else "text", tools, where=where)
    end = len(text) - len(ending.after)
    # The known ending at the very end, not the last place where the token stands: the answer may quote the token.
    if not text.endswith(ending.token + ending.after) or end - len(ending.token) < len(prompt):
        raise UserError(
            f"the chat template does not end message {len(messages)} in {ending.token} as it ends others, but in "
            f"{text[-30:]!r}",
            how=OTHER_TEMPLATE,
            where=where or None,
        )
    return RenderedExample(text, ((len(prompt), end),), (len(prompt),), (len(messages) - 1,), len(messages))


def _without_thoughts(
    template: ChatTemplate, messages: Sequence[TemplateMessage], turn: RenderedExample, tools: Tools, where: str
) -> RenderedExample:
    """The turn with its answer beginning after its thoughts."""
    start, end = turn.spans[0]
    try:
        length = find_end_of_thoughts(
            lambda shadow: template.render(shadow, tools, where=where)[start:],
            messages[: turn.num_messages],
            turn.text[start:],
        )
    except ValueError as error:
        raise UserError(
            f"the thoughts of message {turn.num_messages} cannot be left out of the training: the chat template does "
            f"not print them {error}",
            how=f"set data.train_on_reasoning: true, take the thoughts out of the row, or {OTHER_TEMPLATE}",
            where=where or None,
        ) from None
    return replace(turn, answers=(min(start + length, end),))


def _render_whole(
    template: ChatTemplate,
    messages: Sequence[TemplateMessage],
    rendered: Sequence[RenderedExample],
    tools: Tools,
    where: str,
) -> RenderedExample | None:
    """All turns in one text; None where the template does not render them alike."""
    if rendered and rendered[-1].num_messages == len(messages):
        text = rendered[-1].text
    else:
        text = template.render(messages, tools, where=where)
    spans = tuple(span for turn in rendered for span in turn.spans)
    answers = tuple(place for turn in rendered for place in turn.answers)
    turns = tuple(index for turn in rendered for index in turn.turns)
    alike = all(text.startswith(turn.text[: turn.spans[0][1]]) for turn in rendered)
    if not alike or any(after[0] < before[1] for before, after in pairwise(spans)):
        return None
    template.check_text(messages, text, _others(messages) | set(turns), tools, where=where)
    return RenderedExample(text, spans, answers, turns, len(messages))


def _others(messages: Sequence[TemplateMessage]) -> set[int]:
    """Messages that are not the assistant's. Its own may lose text on purpose once they are history: thoughts."""
    return {index for index, message in enumerate(messages) if message["role"] != "assistant"}


def _up_to_last_span(example: RenderedExample) -> RenderedExample:
    """Without what comes after the last turn: nothing there is trained on."""
    text = example.text[: example.spans[-1][1]]
    return RenderedExample(text, example.spans, example.answers, example.turns, example.num_messages)
