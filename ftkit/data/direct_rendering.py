"""Chat templates rendered without what `apply_chat_template` does around them, where that changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftkit.data.straight_templates import MOST_MESSAGES, Frame, fill, find_frame, is_straight, probe, special_tokens_of

_PLAIN = {"role", "content"}
_MOST_SHAPES = 4096
"""Sequences of roles that are remembered at a time."""


class DirectRenderer:
    """Renders plain conversations with the template that transformers compiles, and with the same variables.

    `apply_chat_template` rebuilds every message from plain data, fills in other names of thoughts, looks for media:
    more than half of its time, and without effect on messages that hold a role and a text. The template then gets equal
    variables of equal types, so that it cannot tell the two ways apart, whatever it does with the text. That a future
    transformers still works so is not assumed: the first conversation of every sequence of roles is rendered both ways,
    and after a difference none is rendered here.

    A template that never looks at the texts is not even rendered: what it prints around those of a sequence of roles is
    kept (`straight_templates.py`), under the same check.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
        """`kwargs` are the keywords of the template."""
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs)
        method = getattr(tokenizer.apply_chat_template, "__func__", None)
        self._usable = method is PreTrainedTokenizerBase.apply_chat_template and _is_plain_data(self._kwargs)
        self._compared: set[tuple[Any, ...]] = set()
        self._frames: dict[tuple[Any, ...], Frame] = {}

    def render(
        self,
        template: str,
        messages: Sequence[dict[str, Any]],
        *,
        generation_prompt: bool,
        reference: Callable[[], str],
    ) -> str:
        """The template's text for `messages`, a conversation without tools.

        Args:
            template: Jinja text.
            messages: in the template's form.
            generation_prompt: whether it is asked for.
            reference: renders them by `apply_chat_template`; what it raises is raised.
        """
        if not self._usable or not messages or not all(_is_plain(message) for message in messages):
            return reference()
        shape = (template, generation_prompt, *[message["role"] for message in messages])
        try:
            rendered = self._fill(shape, messages) or self._render(template, messages, generation_prompt)
        except Exception:  # A template is foreign code. Whatever it raises, the reference words the error.
            return reference()
        if shape not in self._compared:
            expected = reference()
            self._usable = rendered == expected
            if len(self._compared) >= _MOST_SHAPES:
                self._compared.clear()
                self._frames.clear()
            self._compared.add(shape)
            return expected
        return rendered

    def _fill(self, shape: tuple[Any, ...], messages: Sequence[dict[str, Any]]) -> str | None:
        """The texts in the frame of such messages; None where the template, or a text, is not made for it."""
        template, generation_prompt, *_ = shape
        if not is_straight(template) or not all(message["content"].strip() for message in messages):
            return None
        special_tokens = [getattr(self._tokenizer, name, None) for name in special_tokens_of(template)]
        shape = (*shape, *special_tokens)
        if shape not in self._frames:
            if len(messages) > MOST_MESSAGES:
                return None
            self._frames[shape] = find_frame(self._render(template, probe(messages), generation_prompt))
        return fill(self._frames[shape], messages)

    def _render(self, template: str, messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        # Transformers has no public name for it. Where it is gone, the caller's reference is left.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        variables = {**self._tokenizer.special_tokens_map, **self._kwargs}
        rendered: str = _compile_jinja_template(template).render(
            # New dicts, as the reference makes them: a template can ask whether two messages are the same object.
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **variables,
        )
        return rendered


def _is_plain(message: dict[str, Any]) -> bool:
    return message.keys() == _PLAIN and type(message["content"]) is str and type(message["role"]) is str


def _is_plain_data(value: Any) -> bool:
    """Whether the value is made of what JSON has, and of nothing derived from it; all else transformers alters."""
    if type(value) is dict:
        return all(_is_plain_data(part) for pair in value.items() for part in pair)
    if type(value) is list:
        return all(map(_is_plain_data, value))
    return value is None or type(value) in (str, int, float, bool)
