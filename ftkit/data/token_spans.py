"""Token ids of a rendered conversation, with the tokens of each assistant turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Spans = Sequence[tuple[int, int]]
"""[start, end) of each turn, ascending."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's token ids and where its turns lie among them."""

    ids: list[int]
    spans: list[tuple[int, int]]


class SpanTokenizer:
    """Encodes rendered text as a server does: nothing is added; where BOS is wanted, the template prints it.

    A server encodes the generation prompt and lets the model go on. A tokenizer may merge the prompt's last characters
    with the answer's first ones ("\\n" and " Hi" to "\\n Hi"), or split the prompt's end otherwise because of what
    follows. Then the ids of prompt and answer in one are not what a model sees, and the two are encoded apart.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._prompt_ends: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Ids of `text` alone."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def together(self, text: str, spans: Spans) -> Tokens | None:
        """Encode the text in one.

        None where that does not give, for each span, the ids of the text before it as a server would encode them; and
        for tokenizers that do not say where their tokens lie.
        """
        if not self._tokenizer.is_fast:
            return None
        encoding = self._tokenizer(text, add_special_tokens=False, verbose=False)
        token_spans = []
        for start, end in spans:
            # The last character belongs to the end-of-turn token: a control token, which merges with nothing.
            last = encoding.char_to_token(end - 1)
            first = None if last is None else self._first_token(encoding, text, start, last)
            if last is None or first is None or first > last:
                return None
            token_spans.append((first, last + 1))
        return Tokens(encoding.input_ids, token_spans)

    def apart(self, text: str, spans: Spans) -> Tokens:
        """Encode what lies before, in and between the spans each for itself, and join the ids.

        The ids before the first span are exactly a server's. Before later ones (`turns: whole` only) the seams of
        earlier turns remain, where a server would see that history merged.
        """
        ids: list[int] = []
        token_spans = []
        before = 0
        for start, end in spans:
            ids += self._between(ids, text[before:start])
            first = len(ids)
            ids += self._continuation("\n", text[start:end])
            token_spans.append((first, len(ids)))
            before = end
        return Tokens(ids + self._between(ids, text[before:]), token_spans)

    def _first_token(self, encoding: "BatchEncoding", text: str, start: int, last: int) -> int | None:
        """Index of the first token after `text[:start]`; None where that prefix has other ids when encoded alone.

        Tokenizers split a text at control tokens first, so only what follows the prompt's last control token needs
        encoding again; it is the same few words for every turn ("<|im_start|>assistant\\n"). Positions of tokens are
        not trusted, since some tokenizers leave white space out of them.
        """
        ids = encoding.input_ids
        control, begin = 0, 0
        for index in range(last - 1, -1, -1):
            if ids[index] in self._special_ids:
                place = encoding.token_to_chars(index)
                if place is not None and place.start < start:
                    control, begin = index, place.start
                    break
        prompt_end = self._encode_prompt_end(text[begin:start])
        first = control + len(prompt_end)
        return first if ids[control:first] == prompt_end else None

    def _encode_prompt_end(self, text: str) -> list[int]:
        if text not in self._prompt_ends:
            if len(self._prompt_ends) >= 64:
                self._prompt_ends.clear()
            self._prompt_ends[text] = self.ids(text)
        return self._prompt_ends[text]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(index for index, token in added if token.special)

    def _between(self, ids: list[int], text: str) -> list[int]:
        """Ids of text that follows an end-of-turn token, the last of `ids`; it may swallow white space after it."""
        if not ids:
            return self.ids(text)
        return self._continuation(self._tokenizer.convert_ids_to_tokens(ids[-1:])[0], text) if text else []

    def _continuation(self, anchor: str, text: str) -> list[int]:
        """Ids of `text` as it stands after other text: without the space that SentencePiece puts at a beginning."""
        anchor_ids, ids = self.ids(anchor), self.ids(anchor + text)
        return ids[len(anchor_ids) :] if ids[: len(anchor_ids)] == anchor_ids else self.ids(text)
