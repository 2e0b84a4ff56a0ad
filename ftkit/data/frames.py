"""What a chat template prints around the texts of a conversation: a quick proof that it prints them all.

The frame of a sequence of roles comes from a conversation whose texts are one private-use character each. Where every
one of them is printed once, in order, what lies between them is the frame. A rendering that is the frame filled in with
a conversation's own texts holds all of them; nothing more needs to be asked of the template. One that is not may still
be right (the template acts on the texts): the shadow of `shadow.py` decides.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from ftkit.errors import UserError

Messages = Sequence[dict[str, Any]]
Frame = tuple[str, ...]
"""What stands before, between and after the texts."""

_KEYS = ("reasoning_content", "content")
_PLAIN = {"role", *_KEYS}
_FIRST_STAND_IN = 0xF0000
_MOST = 256
"""Frames that are kept at a time."""


class Frames:
    """The frames of one template, found as conversations ask for them."""

    def __init__(self) -> None:
        self._frames: dict[tuple[Any, ...], Frame | None] = {}

    def hold(self, messages: Messages, rendered: str, render: Callable[[Messages], str]) -> bool:
        """Whether `rendered` is the frame of such messages, filled in with their texts (or with these trimmed).

        False says nothing: such messages may have no frame, or the template acts on their texts.

        Args:
            messages: in the template's form.
            rendered: what `render(messages)` gave.
            render: the template.
        """
        shape = tuple([(message["role"], "reasoning_content" in message) for message in messages])
        if not all(message.keys() <= _PLAIN for message in messages):
            return False
        if shape not in self._frames:
            if len(self._frames) >= _MOST:
                self._frames.clear()
            self._frames[shape] = _find_frame(messages, render)
        frame = self._frames[shape]
        if frame is None:
            return False
        texts = [message[key] for message in messages for key in _KEYS if key in message]
        return rendered == _fill(frame, texts) or rendered == _fill(frame, [text.strip() for text in texts])


def _find_frame(messages: Messages, render: Callable[[Messages], str]) -> Frame | None:
    """None where the template does not print every text of such messages once, in order."""
    probe: list[dict[str, Any]] = []
    stand_ins: list[str] = []
    for message in messages:
        probe.append(dict(message))
        for key in _KEYS:
            if key in message:
                stand_ins.append(chr(_FIRST_STAND_IN + len(stand_ins)))
                probe[-1][key] = stand_ins[-1]
    try:
        printed = rest = render(probe)
    except UserError:
        return None
    frame: list[str] = []
    for stand_in in stand_ins:
        before, _, rest = rest.partition(stand_in)
        frame.append(before)
    frame.append(rest)
    once = all(printed.count(stand_in) == 1 for stand_in in stand_ins)
    return tuple(frame) if once and _fill(frame, stand_ins) == printed else None


def _fill(frame: Sequence[str], texts: Sequence[str]) -> str:
    """The texts between the parts of the frame, of which there is one more."""
    return "".join(chain.from_iterable(zip(frame, texts, strict=False))) + frame[-1]
