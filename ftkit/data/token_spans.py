"""Token ids of a rendered conversation, with the tokens of each assistant turn."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ftkit.data.end_of_turn import common_length

Spans = Sequence[tuple[int, int]]
"""[start, end) of each turn, ascending."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's token ids and where its turns lie among them."""

    ids: list[int]
    spans: list[tuple[int, int]]
    answers: list[int]
    """The token of each span at which training begins: the first that is not wholly before the answer."""


class SpanTokenizer:
    """Encodes rendered text as a server does: nothing is added; where BOS is wanted, the template prints it.

    A server encodes the generation prompt and lets the model go on. A tokenizer may merge the prompt's last characters
    with the answer's first ones ("\\n" and " Hi" to "\\n Hi"), or split the prompt's end otherwise because of what
    follows. Then the ids of prompt and answer in one are not what a model sees, and the two are encoded apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prompt_ends: dict[str, list[int]] = {}
        # A call of such a tokenizer adds nothing to what its Rust half gives but a good deal of time.
        self._is_plain = (
            isinstance(tokenizer, PreTrainedTokenizerFast)
            and type(tokenizer).__call__ is PreTrainedTokenizerFast.__call__
            and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
        )

    def ids(self, text: str) -> list[int]:
        """Ids of `text` alone."""
        return self._encode(text)[0]

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over all that decides which ids the tokenizer gives."""
        tokenizer: Any = self._tokenizer
        parts: list[Any]
        if tokenizer.is_fast:
            # Truncation and padding are what the last call asked for, not what the tokenizer is.
            parts = [{**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}]
        else:
            with tempfile.TemporaryDirectory() as directory:
                files = [Path(name) for name in tokenizer.save_vocabulary(directory) if name is not None]
                parts = [file.read_bytes().hex() for file in files]
            parts.append(sorted(tokenizer.get_vocab().items()))
        content = [type(tokenizer).__name__, tokenizer.special_tokens_map, parts]
        return hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()

    def encode_all(self, texts: Sequence[str]) -> list[Encoding | None]:
        """Each text in one; None for tokenizers that do not say where their tokens lie."""
        if (backend := self._backend()) is not None:
            return list(backend.encode_batch(list(texts), add_special_tokens=False))
        return [self._encode(text)[1] if self._tokenizer.is_fast else None for text in texts]

    def together(self, text: str, spans: Spans, answers: Sequence[int], encoding: Encoding | None) -> Tokens | None:
        """The tokens of the text encoded in one; `answers` are the characters of the spans at which training begins.

        None where that does not give, for each span, the ids of the text before it as a server would encode them; and
        for tokenizers that do not say where their tokens lie (`encoding` is `encode_all`'s).
        """
        if encoding is None:
            return None
        ids = encoding.ids
        token_spans, token_answers = [], []
        for (start, end), answer in zip(spans, answers, strict=True):
            # The last character belongs to the end-of-turn token: a control token, which merges with nothing.
            last = encoding.char_to_token(end - 1)
            first = None if last is None else self._first_token(ids, encoding, text, start, last)
            if last is None or first is None or first > last:
                return None
            token_spans.append((first, last + 1))
            token_answers.append(_first_after(encoding, first, last, answer) if answer > start else first)
        return Tokens(ids, token_spans, token_answers)

    def apart(self, text: str, spans: Spans, answers: Sequence[int]) -> Tokens:
        """Encode what lies before, in and between the spans each for itself, and join the ids.

        The ids before the first span are exactly a server's. Before later ones (`turns: whole` only) the seams of
        earlier turns remain, where a server would see that history merged.
        """
        ids: list[int] = []
        token_spans, token_answers = [], []
        before = 0
        for (start, end), answer in zip(spans, answers, strict=True):
            ids += self._between(ids, text[before:start])
            turn, first = self._continuation("\n", text[start:end], answer - start)
            token_answers.append(len(ids) + first)
            token_spans.append((len(ids), len(ids) + len(turn)))
            ids += turn
            before = end
        return Tokens(ids + self._between(ids, text[before:]), token_spans, token_answers)

    def _first_token(self, ids: list[int], encoding: Encoding, text: str, start: int, last: int) -> int | None:
        """Index of the first token after `text[:start]`; None where that prefix has other ids when encoded alone.

        Tokenizers split a text at control tokens first, so only what follows the prompt's last control token needs
        encoding again; it is the same few words for every turn ("<|im_start|>assistant\\n"). Positions of tokens are
        not trusted, since some tokenizers leave white space out of them.
        """
        control, begin = 0, 0
        special_ids = self._special_ids
        for index in range(last - 1, -1, -1):
            if ids[index] in special_ids:
                place = encoding.token_to_chars(index)
                if place is not None and place[0] < start:
                    control, begin = index, place[0]
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
        return self._continuation(self._tokenizer.convert_ids_to_tokens(ids[-1:])[0], text)[0] if text else []

    def _continuation(self, anchor: str, text: str, place: int = 0) -> tuple[list[int], int]:
        """Ids of `text` as it stands after other text: without the space that SentencePiece puts at a beginning.

        And the index of the first of them that is not wholly before the character `place`.
        """
        anchor_ids, shift = self.ids(anchor), len(anchor)
        ids, encoding = self._encode(anchor + text)
        num_before = len(anchor_ids)
        if ids[:num_before] != anchor_ids:
            (ids, encoding), num_before, shift = self._encode(text), 0, 0
        ids = ids[num_before:]
        if place == 0:
            return ids, 0
        if encoding is not None:
            return ids, _first_after(encoding, num_before, len(ids) + num_before - 1, shift + place) - num_before
        # Where the text before `place` merges with what follows, the token belongs to the latter.
        return ids, common_length(self._continuation(anchor, text[:place])[0], ids)

    def _encode(self, text: str) -> tuple[list[int], Encoding | None]:
        """Ids, and where they lie in the text; None for tokenizers that do not say."""
        if (backend := self._backend()) is not None:
            encoding = backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding
        called = self._tokenizer(text, add_special_tokens=False, verbose=False)
        found = called.encodings[0] if called.encodings else None
        return called.input_ids, found if found is not None and found.ids == called.input_ids else None

    def _backend(self) -> Tokenizer | None:
        """The tokenizer's Rust half, where it now gives what a call of the tokenizer gives."""
        if not self._is_plain:
            return None
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        # Calls of others leave their settings behind; the next call of the tokenizer sets them back.
        as_called = backend.encode_special_tokens == self._tokenizer.split_special_tokens
        return backend if as_called and backend.truncation is None and backend.padding is None else None


def _first_after(encoding: Encoding, first: int, last: int, place: int) -> int:
    """Index of the first of the tokens `first` to `last` that ends after the character `place`."""
    for index in range(first, last):
        chars = encoding.token_to_chars(index)
        if chars is not None and chars[1] > place:
            return index
    return last
