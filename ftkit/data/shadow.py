"""Checks that a chat template prints all of a conversation's text, by rendering a shadow of it.

In the shadow every non-space character is a private-use character of its own (U+F0000 + n). What comes out of the
template says of each character whether it was printed, however often the same words stand elsewhere; put back place by
place, it must give the real rendering.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jinja2
import numpy as np

from ftkit.data.end_of_turn import common_length

Messages = Sequence[dict[str, Any]]

# The two private-use planes, without their last two code points (noncharacters).
_HIDDEN = np.array([*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)], np.uint32)
# Every white-space character lies below U+3001; the last entry stands for all above.
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])
_JSON_ESCAPED = r'["\\\x00-\x1f\x7f]'


def template_constants(template: str) -> re.Pattern[str]:
    """Matches (group 1) what a template may look for in a text, and must therefore find in the shadow too.

    Its string constants (`'</think>' in content`), and the characters that JSON escapes (`content | tojson`).
    """
    strings = [value for _, kind, value in jinja2.Environment().lex(template) if kind == "string"]
    decoded = {text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape") for text in strings}
    longest_first = sorted((text for text in decoded if text.strip()), key=len, reverse=True)
    # A lookahead finds constants that overlap. Case is ignored because a template may compare `content | lower`.
    return re.compile(f"(?=({'|'.join([*map(re.escape, longest_first), _JSON_ESCAPED])}))", re.IGNORECASE)


def find_lost_text(
    render: Callable[[Messages], str],
    messages: Messages,
    needed: Collection[int],
    rendered: str,
    constants: Callable[[], re.Pattern[str]],
) -> str | None:
    """What the template loses or changes of the messages, in words; None where it prints everything.

    Args:
        render: the template.
        messages: in the template's form.
        needed: indices of the messages that must be printed in full. The others (answers of earlier turns) may lose
            text that the template drops from the history on purpose, such as thoughts.
        rendered: what `render(messages)` gave.
        constants: gives `template_constants`; asked for only where the template treats the shadow otherwise.
    """
    shadow = _Shadow(messages)
    printed = shadow.restore(render(shadow.messages))
    if printed != rendered:
        # The template acts on the text itself: let it see what it looks for.
        shadow = _Shadow(messages, constants())
        printed = shadow.restore(render(shadow.messages))
    if (lost := shadow.first_lost(needed)) is not None:
        return f"drops {lost}"
    if printed != rendered:
        place = common_length(printed, rendered)
        return f"changes the text around {rendered[max(0, place - 20) : place + 20]!r}"
    return None


class _Shadow:
    """A conversation whose characters are hidden, but for what matches `keep`."""

    def __init__(self, messages: Messages, keep: re.Pattern[str] | None = None) -> None:
        self._source = messages
        self._texts = [(index, *found) for index, message in enumerate(messages) for found in _texts(message)]
        self._joined = "".join(text for _, _, text in self._texts)
        self._codes = _code_points(self._joined)
        self._positions = np.flatnonzero(self._choose(keep))  # of the hidden characters in the joined text
        self._printed = np.zeros(len(self._positions), bool)

        hidden = self._codes.copy()
        hidden[self._positions] = _HIDDEN[: len(self._positions)]
        shown = _text(hidden)
        lengths = [len(text) for _, _, text in self._texts]
        pieces = iter([shown[end - length : end] for length, end in zip(lengths, np.cumsum(lengths), strict=True)])
        self.messages = [_map_texts(message, lambda name, text: next(pieces)) for message in messages]

    def restore(self, rendered: str) -> str:
        """The shadow's rendering with the original characters put back; notes which were printed."""
        codes = _code_points(rendered)
        index = np.searchsorted(_HIDDEN[: len(self._positions)], codes)
        inside = index < len(self._positions)
        inside[inside] = _HIDDEN[index[inside]] == codes[inside]
        self._printed[index[inside]] = True
        codes[inside] = self._codes[self._positions[index[inside]]]
        return _text(codes)

    def first_lost(self, needed: Collection[int]) -> str | None:
        """The first text of the messages `needed` that was not printed in full."""
        if self._printed.all():
            return None
        lost = self._positions[~self._printed]
        start = 0
        for message, name, text in self._texts:
            inside = lost[(lost >= start) & (lost < start + len(text))]
            if message in needed and len(inside):
                excerpt = text[inside[0] - start :][:30]
                return f"{name} of message {message + 1} ({self._source[message].get('role')}): {excerpt!r}"
            start += len(text)
        return None

    def _choose(self, keep: re.Pattern[str] | None) -> np.ndarray:
        """bool [characters of the joined text]: which are hidden."""
        chosen = ~_IS_SPACE[np.minimum(self._codes, len(_IS_SPACE) - 1)]
        # Where there are not enough private-use characters, the beginning of every text is hidden; the rest is compared
        # as it is.
        limit = len(self._joined) if len(self._joined) <= len(_HIDDEN) else len(_HIDDEN) // len(self._texts)
        start = 0
        for _, _, text in self._texts:
            chosen[start + limit : start + len(text)] = False
            for match in keep.finditer(text) if keep is not None else ():
                chosen[start + match.start(1) : start + match.end(1)] = False
            start += len(text)
        return chosen


def _texts(message: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each text of the message."""
    found: list[tuple[str, str]] = []
    _map_texts(message, lambda name, text: found.append((name, text)))
    return found


def _map_texts(message: dict[str, Any], change: Callable[[str, str], Any]) -> dict[str, Any]:
    """The message with each of its texts replaced by `change(name, text)`, always in the same order."""
    changed = dict(message)
    for name in ("reasoning_content", "content"):
        if isinstance(text := message.get(name), str):
            changed[name] = change(name, text)
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_map_call(call, change) for call in calls]
    return changed


def _map_call(call: dict[str, Any], change: Callable[[str, str], Any]) -> dict[str, Any]:
    function = dict(call["function"])
    function["name"] = change("the tool call's name", function["name"])
    function["arguments"] = _map_leaves(function.get("arguments"), change)
    return {**call, "function": function}


def _map_leaves(value: Any, change: Callable[[str, str], Any]) -> Any:
    """Texts inside a call's arguments. Keys stay, because templates sort them; numbers are no text."""
    if isinstance(value, str):
        return change("the tool call's arguments", value)
    if isinstance(value, dict):
        return {key: _map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_leaves(item, change) for item in value]
    return value


def _code_points(text: str) -> np.ndarray:
    """uint32 [characters], writable."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).copy()


def _text(code_points: np.ndarray) -> str:
    return code_points.tobytes().decode("utf-32-le", "surrogatepass")
