"""The quick proof that a template prints every text: what it says holds is also found by looking."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from ftkit.data import frames
from ftkit.data.chat import ChatTemplate
from ftkit.data.frames import Frames
from ftkit.data.shadow import find_lost_text, template_constants
from ftkit.errors import UserError
from tests.data.conversations import cases
from tests.data.trl_templates import read_template, template_names, tokenizer_for

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages], str]


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CHAT = [message("system", "Be kind."), message("user", "Hi"), message("assistant", "Hello")]


def written(messages: Messages, change: Callable[[dict[str, Any]], str] = lambda m: str(m["content"])) -> str:
    return "".join(f"<{m['role']}>{change(m)}</>\n" for m in messages)


def holds(render: Render, messages: Messages, found: Frames | None = None) -> bool:
    return (found or Frames()).hold(messages, render(messages), render)


@pytest.mark.parametrize(
    "texts", [("Be kind.", "Hi", "Hello"), ("", "", ""), ("same", "same", "same"), (" a ", "\n", "b\n")]
)
def test_a_template_that_prints_every_text(texts: tuple[str, ...]) -> None:
    messages = [message(m["role"], text) for m, text in zip(CHAT, texts, strict=True)]
    assert holds(written, messages)
    assert holds(lambda shown: written(shown, lambda m: m["content"].strip()), messages)


def test_private_use_characters_of_a_text_are_text() -> None:
    texts = ["\U000f0000", "\U000f0001\U000f0000", "\U000f0005"]
    messages = [message(m["role"], text) for m, text in zip(CHAT, texts, strict=True)]
    assert holds(written, messages)
    assert not holds(lambda shown: written(shown, lambda m: m["content"].replace("\U000f0005", "")), messages)


LOSING: dict[str, Render] = {
    "drops a role": lambda shown: written([m for m in shown if m["role"] != "system"]),
    "drops all": lambda shown: "constant",
    "drops what it knows": lambda shown: written(shown, lambda m: m["content"].replace("kind", "")),
    "drops the last character": lambda shown: written(shown, lambda m: m["content"][:-1] or m["content"]),
    "cuts long texts": lambda shown: written(shown, lambda m: m["content"][:4]),
    "changes case": lambda shown: written(shown, lambda m: m["content"].lower()),
    "drops a text that stands elsewhere": lambda shown: written([m for m in shown if m["content"] != " Hi "]),
    "prints another in its place": lambda shown: written(shown, lambda m: m["content"].replace("Hello", "Hi")),
    "prints a known text in full, others not": lambda shown: written(
        shown, lambda m: m["content"] if len(m["content"]) == 1 else "?"
    ),
    "turns two round": lambda shown: written(shown if len(shown[0]["content"]) == 1 else [*shown[1:], shown[0]]),
    "trims inside": lambda shown: written(shown, lambda m: m["content"].replace(" ", "")),
    "prints one twice": lambda shown: written([*shown, shown[0]]),
    "prints one twice if it is long": lambda shown: written([*shown, *(m for m in shown[:1] if len(m["content"]) > 1)]),
    "prints the last first": lambda shown: written(shown[::-1]),
    "trims one of them": lambda shown: written(
        shown, lambda m: m["content"].strip() if m["role"] == "user" else m["content"]
    ),
}


@pytest.mark.parametrize("name", LOSING)
def test_no_proof_where_a_text_is_missing_or_otherwise(name: str) -> None:
    messages = [message("system", "Be kind. "), message("user", " Hi "), message("assistant", "Hello")]
    assert not holds(LOSING[name], messages)


def test_thoughts_are_texts() -> None:
    def with_thoughts(shown: Messages) -> str:
        return written(shown, lambda m: f"({m.get('reasoning_content', '')}){m['content']}")

    messages = [*CHAT, message("assistant", "Bye", reasoning_content="They leave.")]
    found = Frames()
    assert holds(with_thoughts, messages, found)
    assert not found.hold(messages, with_thoughts(messages).replace("They", ""), with_thoughts)
    assert holds(with_thoughts, [*CHAT, message("assistant", "Bye")], found)  # another shape
    assert not holds(written, messages)
    assert not holds(lambda shown: written(shown, lambda m: m["content"] + m.get("reasoning_content", "")), messages)


@pytest.mark.parametrize("more", [{"tool_calls": []}, {"name": "x"}, {"tool_call_id": "x"}])
def test_messages_with_other_parts_are_not_judged(more: dict[str, Any]) -> None:
    assert not holds(written, [*CHAT, message("assistant", "Bye", **more)])


def test_a_template_that_prints_a_stand_in_of_its_own_has_no_frame() -> None:
    assert not holds(lambda shown: written(shown) + chr(frames._FIRST_STAND_IN), CHAT)


def test_a_template_that_refuses_the_stand_ins_has_no_frame() -> None:
    def refusing(shown: Messages) -> str:
        if shown[1]["content"] != "Hi":
            raise UserError("only Hi")
        return written(shown)

    assert not holds(refusing, CHAT)


def test_a_frame_is_found_once_for_a_sequence_of_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Messages] = []

    def render(shown: Messages) -> str:
        rendered.append(shown)
        return written(shown)

    found = Frames()
    for text in ("a", "b", "c"):
        messages = [*CHAT, message("user", text)]
        assert found.hold(messages, written(messages), render)
    assert len(rendered) == 1
    monkeypatch.setattr(frames, "_MOST", 2)
    for count in range(1, 6):
        messages = CHAT[1:2] * count
        assert found.hold(messages, written(messages), render)
        assert len(found._frames) <= 2


@pytest.mark.parametrize("name", template_names())
def test_what_is_proved_holds(name: str) -> None:
    """Of every template: the texts are found in order in what it printed, and the shadow finds none lost."""
    template = ChatTemplate(tokenizer_for(name), read_template(name))
    proved, constants = Frames(), partial(template_constants, read_template(name))
    for case in cases():
        messages = [m.to_template() for m in case.data.messages]
        try:
            rendered = template.render(messages)
        except UserError:
            continue
        if proved.hold(messages, rendered, template.render):
            place = 0
            for m in messages:
                for text in (m.get("reasoning_content", ""), m["content"]):
                    found = rendered.find(text.strip(), place)
                    assert found >= 0
                    place = found + len(text.strip())
            everything = range(len(messages))
            assert find_lost_text(template.render, messages, everything, rendered, constants) is None


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma", "phi3", "gptoss"])
def test_plain_conversations_need_no_shadow(name: str) -> None:
    template = ChatTemplate(tokenizer_for(name), read_template(name))
    messages = [message("user", "What?"), message("assistant", " This.\n"), message("user", ""), CHAT[-1]]
    assert holds(template.render, messages)


def test_the_check_of_a_chat_template_goes_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizer_for("qwen2_5"), read_template("qwen2_5"))
    monkeypatch.setattr("ftkit.data.chat.find_lost_text", lambda *args: "drops what was looked for")
    rendered = template.render(CHAT)
    template.check_text(CHAT, rendered, {0, 1, 2})
    with pytest.raises(UserError, match="drops what was looked for"):
        template.check_text(CHAT, rendered.replace("Be kind.", ""), {0, 1, 2})
