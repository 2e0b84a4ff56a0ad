"""Finds the token that ends an assistant's turn, by rendering a probe and looking at what follows the answer."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TurnKind = Literal["text", "tool_call"]

_ANSWER = "4f1c9e"
QUESTION = {"role": "user", "content": "question"}
"""A plain message to render where only the template is of interest."""
_CALL_ID = "abcdefghi"  # Mistral's templates ask for nine characters.
_CALL = {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": {"x": _ANSWER}}}
ANSWERS: dict[TurnKind, dict[str, Any]] = {
    "text": {"role": "assistant", "content": _ANSWER},
    "tool_call": {"role": "assistant", "content": "", "tool_calls": [_CALL]},
}
"""A plain turn of each kind."""
_FOLLOW_UPS: dict[TurnKind, dict[str, Any]] = {
    "text": QUESTION,
    "tool_call": {"role": "tool", "name": "probe", "tool_call_id": _CALL_ID, "content": "result"},
}
_NAMES: dict[TurnKind, str] = {"text": "turn", "tool_call": "tool calls"}


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """How a template ends a turn that is the last of its conversation."""

    token: str
    """The special token that stops generation, e.g. "<|im_end|>"; the last thing that is trained on."""
    after: str
    """What the template prints after it, e.g. "\\n"; never trained on."""


def find_end_of_turn(
    render: Callable[[Sequence[dict[str, Any]]], str], special_tokens: Collection[str], kind: TurnKind
) -> EndOfTurn:
    """Compare what follows the answer where the turn is the last one and where the conversation goes on.

    What both have in common is the end of the turn: a closing EOS of the whole conversation (Phi 3) is left out.
    Where they share no special token, the turn ends as the last one does: GPT-OSS writes <|return|> there, which its
    servers stop at, and <|end|> in the middle, which they do not.

    Raises:
        ValueError: the template does not print the answer, or ends it in no special token of the tokenizer.
    """
    probe = [QUESTION, ANSWERS[kind]]
    final = _after_answer(render(probe), kind)
    middle = _after_answer(render([*probe, _FOLLOW_UPS[kind]]), kind)
    common = final[: common_length(final, middle)]
    cut = min(_token_start(text, len(common), special_tokens) for text in (final, middle))
    for ending in (common[:cut].rstrip(), final.rstrip()):
        if token := max((t for t in special_tokens if t and ending.endswith(t)), key=len, default=""):
            return EndOfTurn(token, final[len(ending) :])
    if not final.strip():
        raise ValueError(f"it prints nothing after the assistant's {_NAMES[kind]} that would stop generation")
    raise ValueError(f"it ends the assistant's {_NAMES[kind]} in {final.rstrip()!r}, no special token of the tokenizer")


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of characters (or tokens) that two texts have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _after_answer(rendered: str, kind: TurnKind) -> str:
    _, found, after = rendered.rpartition(_ANSWER)
    if not found:
        raise ValueError(f"it does not print the assistant's {_NAMES[kind]}")
    return after


def _token_start(text: str, cut: int, tokens: Collection[str]) -> int:
    """Where the control token begins that `cut` falls into; `cut` itself where it falls into none."""
    starts = [
        start for token in tokens for start in range(max(0, cut - len(token) + 1), cut) if text.startswith(token, start)
    ]
    return min(starts, default=cut)
