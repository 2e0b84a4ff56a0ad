"""Which chat templates print the messages' texts as they are, and never look at them.

ChatML, Gemma, Llama 3, Phi and Qwen 2.5 are of that kind: roles and places alone decide what they print around texts.
What they print for a sequence of roles can be kept, and the texts of a conversation put in their places.

The template's syntax tree shows it. What holds a text (`message.content`, and variables it was put into) may only be
printed, joined to other text, trimmed, or asked for its type or whether there is any; what holds a message may only be
asked for its fields; what holds the messages may only be gone through, indexed and counted. Anything else, a macro's
argument or a comparison, and the template is not of that kind. That a variable of that name exists elsewhere too makes
no difference: what it holds there is treated alike.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from jinja2 import meta, nodes

TEXT = "content"
_PADDING = "\u2003"
"""White space that no template prints: tells in the frame whether a text was trimmed."""
_FIRST_STAND_IN = 0xF0000
"""Private-use characters: one for each message."""
MOST_MESSAGES = 1000
_TYPE_TESTS = {"string", "defined", "undefined", "none", "mapping", "sequence", "iterable"}
_LOOP = {"first", "last", "index", "index0", "revindex", "revindex0", "length", "depth", "depth0", "cycle"}
_NEIGHBOURS = {"previtem", "nextitem"}
_APART = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block)
"""What is printed in these is a value of its own before it is printed."""
_JOINING = (nodes.Add, nodes.Concat, nodes.And, nodes.Or)
_ELSEWHERE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)

Use = Literal["printed", "truth", "value"]
"""What becomes of a value: it goes nowhere but into the rendering; it is asked whether it is empty; anything."""
Frame = tuple[tuple[str, int, bool], ...]
"""Text of the template, the index of the message whose text follows it (-1: none), whether that is trimmed."""


@lru_cache(maxsize=64)
def is_straight(template: str) -> bool:
    """Whether `template` does no more with the messages' texts, none of them blank, than print them, trimmed or not.

    Raises:
        TemplateSyntaxError: it is no Jinja that transformers could read.
    """
    if _PADDING in template:
        return False
    tree = _parse(template)
    return not any(True for _ in tree.find_all(_ELSEWHERE)) and _Reading(tree).is_straight


@lru_cache(maxsize=64)
def special_tokens_of(template: str) -> tuple[str, ...]:
    """Names of the tokenizer's special tokens that the template asks for, e.g. bos_token."""
    names = meta.find_undeclared_variables(_parse(template))
    return tuple(sorted(name for name in names if name.endswith(("_token", "_tokens"))))


def probe(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of the same roles, each with a text to find again."""
    return [
        {**message, TEXT: f"{_PADDING}{chr(_FIRST_STAND_IN + index)}{_PADDING}"}
        for index, message in enumerate(messages)
    ]


def find_frame(rendered: str) -> Frame:
    """The frame in what a straight template gave for a `probe`."""
    frame: list[tuple[str, int, bool]] = []
    start = 0
    for place, character in enumerate(rendered):
        if 0 <= ord(character) - _FIRST_STAND_IN < MOST_MESSAGES:
            trimmed = rendered[place - 1 : place] != _PADDING
            frame.append((rendered[start : place - (not trimmed)], ord(character) - _FIRST_STAND_IN, trimmed))
            start = place + 1 + (not trimmed)
    return (*frame, (rendered[start:], -1, False))


def fill(frame: Frame, messages: Sequence[dict[str, Any]]) -> str:
    """The frame with the messages' texts in their places."""
    pieces = []
    for before, index, trimmed in frame:
        pieces.append(before)
        if index >= 0:
            text = messages[index][TEXT]
            pieces.append(text.strip() if trimmed else text)
    return "".join(pieces)


def _parse(template: str) -> nodes.Template:
    # Transformers has no public name for it.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree: nodes.Template = _compile_jinja_template(template).environment.parse(template)
    return tree


class _Reading:
    """What the variables of a template may hold, and whether it treats them as it may."""

    def __init__(self, tree: nodes.Template) -> None:
        self._lists, self._messages, self._texts = {"messages"}, set[str](), set[str]()
        # A loop may use a variable above the line that sets it: names first, and again until there are no more.
        before = -1
        while before != (before := self._num_names()):
            for node in tree.find_all((nodes.For, nodes.Assign)):
                self._name(node)
        one_kind_each = not (self._lists & self._messages or self._texts & (self._lists | self._messages))
        self.is_straight = one_kind_each and self._may(tree)

    def _num_names(self) -> int:
        return len(self._lists) + len(self._messages) + len(self._texts)

    def _name(self, node: nodes.Node) -> None:
        """Note what the node puts into a variable."""
        if not isinstance(node, nodes.For | nodes.Assign) or not isinstance(node.target, nodes.Name):
            return
        if isinstance(node, nodes.For):
            if self._is_list(node.iter):
                self._messages.add(node.target.name)
        elif self._is_list(node.node):
            self._lists.add(node.target.name)
        elif self._is_message(node.node):
            self._messages.add(node.target.name)
        elif self._holds_text(node.node):
            self._texts.add(node.target.name)

    # ---------------------------------------------------------------------------------------------- kinds of values

    def _is_list(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._is_list(node.node)
        return isinstance(node, nodes.Name) and node.name in self._lists

    def _is_message(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getitem) and self._is_list(node.node):
            return not isinstance(node.arg, nodes.Slice)
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return node.attr in _NEIGHBOURS
        return isinstance(node, nodes.Name) and node.name in self._messages

    def _field(self, node: nodes.Node) -> str | None:
        """The field of a message that the node reads."""
        if isinstance(node, nodes.Getattr) and self._is_message(node.node):
            return node.attr
        if isinstance(node, nodes.Getitem) and self._is_message(node.node) and isinstance(node.arg, nodes.Const):
            return node.arg.value if isinstance(node.arg.value, str) else None
        return None

    def _is_trimmed(self, node: nodes.Node) -> bool:
        """`message.content | trim` or `message.content.strip()`."""
        if isinstance(node, nodes.Filter):
            plain = node.name == "trim" and not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
            return plain and node.node is not None and self._field(node.node) == TEXT
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "strip":
            plain = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
            return plain and self._field(node.node.node) == TEXT
        return False

    def _is_text(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._texts
        return self._field(node) == TEXT or self._is_trimmed(node)

    def _holds_text(self, node: nodes.Node) -> bool:
        """A text, or one joined to other text, or what may be one."""
        if isinstance(node, nodes.CondExpr):
            return self._holds_text(node.expr1) or (node.expr2 is not None and self._holds_text(node.expr2))
        if isinstance(node, _JOINING):
            return any(map(self._holds_text, node.iter_child_nodes()))
        return self._is_text(node)

    def _holds_any(self, node: nodes.Node) -> bool:
        """Whether anything of the conversation occurs in the node."""
        names = {found.name for found in node.find_all(nodes.Name)}
        if isinstance(node, nodes.Name):
            names.add(node.name)
        return bool(names & (self._lists | self._messages | self._texts)) or "loop" in names

    # -------------------------------------------------------------------------------------------- what may be done

    def _may(self, node: nodes.Node, use: Use = "value") -> bool:
        """Whether what the node does to the conversation leaves its texts unread."""
        if isinstance(node, _APART):
            return not any(map(self._holds_conversation, node.iter_child_nodes()))
        if isinstance(node, nodes.Output):
            return self._may_all(node, "printed")
        if isinstance(node, _JOINING):
            return self._may_all(node, use)
        if isinstance(node, nodes.Not):
            return self._may(node.node, "truth")
        if isinstance(node, nodes.If | nodes.CondExpr):
            inner: Use = use if isinstance(node, nodes.CondExpr) else "value"
            rest = [child for child in node.iter_child_nodes() if child is not node.test]
            return self._may(node.test, "truth") and all(self._may(child, inner) for child in rest)
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            kept = self._is_list(node.node) or self._is_message(node.node)
            return (kept and self._may_place(node.node)) or self._may(node.node, "printed")
        if isinstance(node, nodes.For) and isinstance(node.target, nodes.Name) and self._is_list(node.iter):
            rest = [*node.body, *node.else_, *([node.test] if node.test is not None else [])]
            return self._may_place(node.iter) and not node.recursive and all(map(self._may, rest))
        return self._may_value(node, use)

    def _may_value(self, node: nodes.Node, use: Use) -> bool:
        if self._is_text(node):
            return use != "value" and self._may_place(node)
        if (field := self._field(node)) is not None:
            # The name of a method of dict gives the method, which may give the texts.
            return not hasattr(dict, field) and self._may_place(node)
        if isinstance(node, nodes.Test) and node.name in _TYPE_TESTS:
            return self._holds_value(node.node) or self._may(node.node)
        if isinstance(node, nodes.Filter) and node.name in ("length", "count") and node.node is not None:
            return self._is_list(node.node) or self._may_all(node)
        if isinstance(node, nodes.Compare) and isinstance(node.expr, nodes.Const):
            # `'tool_calls' in message`
            rest = [each for each in node.ops if each.op not in ("in", "notin") or not self._is_message(each.expr)]
            return all(self._may(each.expr) for each in rest)
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return node.attr in _LOOP
        if isinstance(node, nodes.Name):
            return node.ctx != "load" or not (self._holds_any(node))
        return self._may_all(node)

    def _may_all(self, node: nodes.Node, use: Use = "value") -> bool:
        return all(self._may(child, use) for child in node.iter_child_nodes())

    def _holds_value(self, node: nodes.Node) -> bool:
        return self._is_list(node) or self._is_message(node) or self._is_text(node) or self._field(node) is not None

    def _may_place(self, node: nodes.Node) -> bool:
        """Whether the places that lead to the value (`messages[loop.index0 - 1:]`) are told without the texts."""
        places = [found.arg for found in [node, *node.find_all(nodes.Getitem)] if isinstance(found, nodes.Getitem)]
        return all(self._may(place) for place in places)

    def _holds_conversation(self, node: nodes.Node) -> bool:
        # A macro's own arguments may have any names; what it is called with is looked at where it is called.
        names = [node] if isinstance(node, nodes.Name) else []
        names += list(node.find_all(nodes.Name))
        return any(name.name in self._lists | self._messages | self._texts for name in names if name.ctx == "load")
