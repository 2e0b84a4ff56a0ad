"""Fifty conversations with the unusual content that real data has, from a seeded generator."""

import random
from dataclasses import dataclass, replace

from ftkit.data.types import Conversation, Message

WORDS = ("the", "a", "fox", "river", "answers", "quickly", "42", "and", "then", "never", "Über", "naïve", "data-set")
WORDS += ("f(x)=x²", "e.g.", "it's", "[1]", "{'k':", "1}", "#5")
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "same",
    "  leading and trailing  \n",
    "\n\nnewlines first\n\n\nand between",
    "tab\tand\r\nreturn",
    "😀👩‍👩‍👧 is a family 🏳️‍🌈",
    "مرحبا بالعالم, שלום עולם!",
    "中文和日本語が混ざる",
    "e\u0301 a\u0300 \u200b\u200d\ufeff\u00a0",
    "What is <|im_end|>\n<|im_start|>assistant\nI am?",
    "<|eot_id|><|end|><end_of_turn><turn|></s><|return|>",
    "<|END_OF_TURN_TOKEN|> and <｜end▁of▁sentence｜> and <|eot|>",
    '{"role": "assistant", "content": "{{ not_jinja }} {% raw %}"}',
    "```python\nprint('x')\n\n```",
    "### Assistant:\nsame",
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
)
THOUGHTS = ("They greet me.", "First 2 + 2.\n\nThen 🤔 <b>more</b>.\n- שלום", "k", "  indented\n    code  ")


@dataclass(frozen=True)
class Case:
    """A conversation as a data set has it, and as a server gets it."""

    data: Conversation
    """Some thoughts stand in `reasoning_content`, others as <think>...</think> before the text."""
    apart: Conversation
    """The same with all thoughts in `reasoning_content`."""
    kinds: frozenset[str]
    """Which of "system", "tools", "thoughts" it has."""


def cases(count: int = 50, seed: int = 0) -> list[Case]:
    """The conversations; the same for equal arguments."""
    generator = random.Random(seed)
    return [_case(generator, index) for index in range(count)]


def _case(generator: random.Random, index: int) -> Case:
    """Of five conversations one has tools and one thoughts, of ten one both; every third has a system message."""
    kinds = {"system"} if index % 3 == 0 else set()
    kinds |= {"thoughts"} if index % 5 == 3 or index % 10 == 9 else set()
    kinds |= {"tools"} if index % 5 == 4 else set()
    data: list[Message] = []
    apart: list[Message] = []

    def say(message: Message, thoughts: str | None = None) -> None:
        written = message
        if thoughts is not None and index % 2:
            written = replace(message, content=f"<think>\n{thoughts}\n</think>\n\n{message.content}")
            # The newlines after the tag are no part of the answer.
            message = replace(message, content=message.content.lstrip("\n"))
        elif thoughts is not None:
            written = replace(message, reasoning_content=thoughts)
        data.append(written)
        apart.append(replace(message, reasoning_content=thoughts))

    if "system" in kinds:
        say(Message("system", _text(generator) or "Be kind."))
    for _ in range(generator.randint(1, 3)):
        question = _text(generator)
        say(Message("user", question))
        if "tools" in kinds:
            arguments = {"city": _words(generator), "days": generator.randint(1, 9)}
            function = {"name": "weather", "arguments": arguments}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            say(Message("assistant", "", tool_calls=(call,)), _thoughts(generator, kinds))
            say(Message("tool", _words(generator), name="weather", tool_call_id="abcdefghi"))
        answer = question if generator.random() < 0.15 else _text(generator)
        say(Message("assistant", answer), _thoughts(generator, kinds))
    tools = TOOLS if "tools" in kinds else ()
    return Case(Conversation(tuple(data), tools), Conversation(tuple(apart), tools), frozenset(kinds))


def _thoughts(generator: random.Random, kinds: set[str]) -> str | None:
    return generator.choice(THOUGHTS) if "thoughts" in kinds else None


def _text(generator: random.Random) -> str:
    odd = generator.choice(ODD_TEXTS)
    return odd if generator.random() < 0.5 else generator.choice(("", odd)) + _words(generator)


def _words(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(1, 12)))
