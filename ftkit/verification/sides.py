"""What the trained model is compared with: something that renders conversations, and may answer them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ftkit.verification.conversations import Probe

PRECISIONS = ("float32", "float16", "bfloat16", "q8_0", "coarser")
"""What weights may be stored in, the finest first."""
GGUF_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}
"""Their names in .gguf files and of llama.cpp's server."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer."""

    ids: tuple[int, ...] | None
    """With the token that ended it, where the side tells it; None where it tells only the text."""
    text: str
    stopped: bool
    """Whether it ended by itself, not at the number of tokens that was allowed."""
    num_fed: int | None = None
    """Tokens of the prompt, as a server counts them."""


class Side(Protocol):
    """Exported files, or a server."""

    name: str
    kind: str
    """In a few words."""
    precision: str
    """Of its weights: one of `PRECISIONS`."""
    context: int | None
    """Tokens that prompt and answer may have together; None: no fewer than the model takes."""
    hint: str
    """What to do where it differs."""

    def prompt(self, probe: Probe, kwargs: Mapping[str, Any]) -> list[int]:
        """Ids that it feeds its model before an answer, `kwargs` being keywords of the chat template.

        Raises:
            RefusedError: it does not take the conversation.
            UserError: it takes none.
        """
        ...

    def answers(
        self, asked: Sequence[tuple[Probe, Sequence[int]]], kwargs: Mapping[str, Any], limit: int
    ) -> list[Answer] | None:
        """Greedy answers of at most `limit` tokens to conversations, each given with the ids of its prompt.

        None where there is nothing that could answer.
        """
        ...

    def stops_at(self, token_id: int, probe: Probe, kwargs: Mapping[str, Any]) -> bool | None:
        """Whether generation ends at this token; None where that cannot be found out."""
        ...
