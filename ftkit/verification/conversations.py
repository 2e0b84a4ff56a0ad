"""The conversations that every model is asked, made of what templates and tokenizers are known to differ in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ftkit.data.chat import ChatTemplate
from ftkit.data.types import Conversation, Message
from ftkit.errors import UserError

LONG_TOKENS, LONG_LINES = 512, 32
"""Of the long text, at most; fewer tokens where the model's context is shorter."""

_CODE = (
    'def area(r):\n    """pi * r ** 2"""\n    return 3.14 * r ** 2\n\n\nif __name__ == "__main__":\n\tprint(area(2))'
)
_CALL_ID = "abcdefghi"  # Mistral's templates ask for nine characters.
_PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "name of the city"}},
    "required": ["city"],
}
_FUNCTION = {"name": "get_weather", "description": "The weather of a city", "parameters": _PARAMETERS}
_TOOLS = ({"type": "function", "function": _FUNCTION},)
_CALL = {
    "id": _CALL_ID,
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "São Paulo"}},
}
_WEATHER = Message("user", "How is the weather in São Paulo?")


@dataclass(frozen=True)
class Probe:
    """A conversation to render and to answer."""

    name: str
    conversation: Conversation
    answered: bool = True
    """Whether answers are compared. Not with tools: servers hold such an answer to a grammar, and parse it."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return [message.to_template() for message in self.conversation.messages]


def make_probes(
    template: ChatTemplate,
    words: tuple[str, ...],
    *,
    system_prompt: str | None,
    count: Callable[[str], int],
    context: int,
) -> list[Probe]:
    """The conversations that the template can render without losing text.

    Args:
        words: texts of special tokens, to be written by a user.
        system_prompt: the run's own, for conversations without a system message.
        count: tokens of a text.
        context: tokens that the model takes.
    """
    lines = LONG_LINES
    while lines > 1 and count(_long_text(lines)) > min(LONG_TOKENS, context // 2):
        lines //= 2
    candidates = _candidates(words, system_prompt, _long_text(lines))
    return [probe for probe in candidates if _is_rendered(template, probe)]


def _candidates(words: tuple[str, ...], system_prompt: str | None, long_text: str) -> Iterator[Probe]:
    question = Message("user", "What is the capital of France?")
    answer, again = Message("assistant", "Paris."), Message("user", "And of Italy?")
    asked = {
        "one question": (question,),
        "system prompt": (Message("system", "Answer in one word."), question),
        "several turns": (question, answer, again),
        "other scripts": (Message("user", "Übersetze: naïve café, cafe\u0301, 你好世界, नमस्ते, مرحبا, ½ ﬁ"),),
        "emoji": (Message("user", "What do 😀, 👩‍👩‍👧‍👦, 🏳️‍🌈 and 🇫🇷 mean?"),),
        "spaces at the ends": (Message("user", "  Two spaces before, a tab and a newline after.\t\n"),),
        "empty lines first": (Message("user", "\n\n\nWhat is 2 + 2?"),),
        "words of special tokens": (Message("user", f"What do {' and '.join((*words, '[INST]'))} mean?"),),
        "code": (Message("user", f"What does this print?\n\n```python\n{_CODE}\n```"),),
        "long text": (Message("user", long_text),),
    }
    for name, messages in asked.items():
        if system_prompt is not None and messages[0].role != "system":
            messages = (Message("system", system_prompt), *messages)
        yield Probe(name, Conversation(messages))
    thoughts = replace(answer, reasoning_content="France is a country. Its capital is Paris.")
    yield Probe("thoughts", Conversation((question, thoughts, again)))
    yield Probe("tools", Conversation((_WEATHER,), _TOOLS), answered=False)
    call = Message("assistant", "", tool_calls=(_CALL,))
    result = Message("tool", '{"degrees": 21}', name="get_weather", tool_call_id=_CALL_ID)
    yield Probe("a tool's result", Conversation((_WEATHER, call, result), _TOOLS), answered=False)


def _long_text(num_lines: int) -> str:
    lines = [f"{number}. Box number {number} holds {number * 7} apples." for number in range(1, num_lines + 1)]
    return "\n".join((*lines, "How many apples does the last box hold?"))


def _is_rendered(template: ChatTemplate, probe: Probe) -> bool:
    """Whether the template prints every message, its thoughts and tools; others are not what it is for."""
    conversation = probe.conversation
    if any(m.reasoning_content for m in conversation.messages) and not template.prints_reasoning("text"):
        return False
    try:
        template.check_tools(conversation.tools)
        if any(message.tool_calls for message in conversation.messages):
            template.end_of_turn("tool_call", conversation.tools)
        rendered = template.render(probe.messages, conversation.tools)
        # Thoughts of an earlier turn may be left out on purpose.
        needed = {place for place, message in enumerate(conversation.messages) if message.role != "assistant"}
        template.check_text(probe.messages, rendered, needed, conversation.tools)
    except UserError:
        return False
    return True
