"""Lists of turns -> messages: the keys and roles of OpenAI, ShareGPT, Glaive and LLaMA-Factory in one parser."""

import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from ftkit.data.problems import RowError, quoted, shorten
from ftkit.data.types import Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""The sources' names of roles -> ours."""

_FOLLOWS: dict[str, tuple[str, ...]] = {
    # Greetings open many ShareGPT and role-play conversations: an assistant may begin.
    "start": ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Role -> the roles that may come next."""


def parse_turns(value: Any, column: str, roles: Mapping[str, Role]) -> tuple[Message, ...]:
    """A list of turns as messages; `roles` are the recipe's names, on top of `ROLES`.

    Raises:
        RowError: no list, or a turn whose role, content or marks are not understood.
    """
    if not isinstance(value, list) or not value:
        raise RowError(f"{column} must be a list of turns, found {quoted(value)}", "give at least one turn")
    return tuple(_parse_turn(turn, f"{column}[{index}]", roles) for index, turn in enumerate(value))


def check_order(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages up to the last assistant turn, in an order that chat templates render.

    What follows the last assistant turn is cut: no target comes after it, and no target sees it.

    Raises:
        RowError: two turns of a role in a row, a role that cannot follow another, no assistant turn that answers.
    """
    previous = "start"
    for index, message in enumerate(messages):
        if message.role not in _FOLLOWS[previous]:
            where = "at the start" if previous == "start" else f"after one of {previous}"
            expected = " or ".join(_FOLLOWS[previous])
            raise RowError(f"turn {index}: a turn of {message.role} {where}", f"put a turn of {expected} there")
        previous = message.role
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and index > 0]
    if not answers:
        raise RowError("no assistant turn to train on", "add an answer or remove the row")
    return messages[: answers[-1] + 1]


def answer(text: str) -> Message:
    """An assistant turn that holds `text`."""
    return _without_empty_training(Message("assistant", text))


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools' JSON schemas, a list or the JSON text of one, in OpenAI's form."""
    if isinstance(value, str):
        value = _parse_json(value, "tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"tools must be a list of JSON schemas, found {quoted(value)}", "give a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _parse_turn(turn: Any, place: str, roles: Mapping[str, Role]) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{place} must be an object, found {quoted(turn)}", "give a role and a content")
    source_role = turn.get("role") or turn.get("from")
    role = roles.get(source_role) or ROLES.get(str(source_role).lower()) if isinstance(source_role, str) else None
    if role is None:
        alike = get_close_matches(str(source_role).lower(), ROLES, n=1)
        meant = ROLES[alike[0]] if alike else "assistant"
        how = f"use {', '.join(ROLES)}, or map it: `roles: {{{source_role}: {meant}}}`"
        raise RowError(f"{place}: unknown role {source_role!r}", how)
    content = _content(turn.get("content", turn.get("value")), place)
    calls = _tool_calls(turn, place)
    if source_role == "function_call" and "function_call" not in roles:
        content, calls = "", _calls_from_text(content, place)
    if calls and role != "assistant":
        raise RowError(f"{place}: tool calls in a turn of {role}", "give them to the assistant")
    message = Message(
        role=role,
        content=content,
        train=_train_mark(turn, role, place),
        reasoning_content=_optional_text(turn, ("reasoning_content", "reasoning", "thinking"), place),
        tool_calls=calls,
        name=_optional_text(turn, ("name",), place),
        tool_call_id=_optional_text(turn, ("tool_call_id",), place),
    )
    return _without_empty_training(message)


def _without_empty_training(message: Message) -> Message:
    # Public instruction sets hold empty outputs (28 in Alpaca). They would teach the model to say nothing; as turns
    # without a target they are dropped and counted instead of stopping the run.
    empty = not message.content.strip() and not message.tool_calls and not message.reasoning_content
    return replace(message, train=False) if message.role == "assistant" and empty else message


def _content(value: Any, place: str) -> str:
    """A text, or a list of text parts ({type: text, text | value: ...}); null is the empty text of a tool call."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{place}: content must be text, found {quoted(value)}", "give a text")
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text", part.get("value")) if isinstance(part, dict) else part
        if kind not in ("text", None) or not isinstance(text, str):
            raise RowError(f"{place}: a content part that is no text: {shorten(part)}", "keep the text parts only")
        texts.append(text)
    return "".join(texts)


def _train_mark(turn: dict[str, Any], role: Role, place: str) -> bool | None:
    """`train`, or OpenAI's `weight` and LLaMA-Factory's `loss_weight`, of which 1 leaves the choice to the recipe."""
    mark = turn.get("train")
    if mark is not None and not isinstance(mark, bool):
        raise RowError(f"{place}: train must be true or false, found {quoted(mark)}", "give true or false")
    for name in ("weight", "loss_weight"):
        weight = turn.get(name)
        if weight is None:
            continue
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RowError(f"{place}: {name} {quoted(weight)} is neither 0 nor 1", "give 0 or 1")
        if weight == 0:
            mark = False
        elif role != "assistant":
            mark = True
    if role == "assistant":
        return mark
    if mark:
        raise RowError(f"{place}: a turn of {role} is marked for training", "mark assistant turns only")
    return None


def _optional_text(turn: dict[str, Any], names: tuple[str, ...], place: str) -> str | None:
    for name in names:
        value = turn.get(name)
        if value is not None and not isinstance(value, str):
            raise RowError(f"{place}: {name} must be text, found {quoted(value)}", "give a text")
        if value:
            return value
    return None


# --------------------------------------------------------------------------------------------------- tool calls


def _tool_calls(turn: dict[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(calls, list):
        raise RowError(f"{place}: tool_calls must be a list, found {quoted(calls)}", "give a list of calls")
    return tuple(_tool_call(call, place) for call in calls)


def _calls_from_text(text: str, place: str) -> tuple[dict[str, Any], ...]:
    """Glaive and LLaMA-Factory: the turn's text is the JSON of one call or of a list of calls."""
    value = _parse_json(text, place)
    return tuple(_tool_call(call, place) for call in (value if isinstance(value, list) else [value]))


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        how = 'give {"name": ..., "arguments": {...}}'
        raise RowError(f"{place}: a tool call without a name: {shorten(call)}", how)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, f"{place}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError(f"{place}: arguments must be an object, found {quoted(arguments)}", "give name: value pairs")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return parsed | {"id": call["id"]} if isinstance(call.get("id"), str) else parsed


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{place}: malformed JSON: {quoted(text)} ({error})", "correct the JSON") from None
