"""Many documents encoded, with the tokenizer given many texts at a time: it is faster, and uses every core."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from ftkit.data.encode import Encoder, EncodeResult, Rendered
from ftkit.data.types import Document
from ftkit.errors import UserError

TOGETHER = 2**18
"""Characters of texts that the tokenizer gets at a time; what it says of them takes some 50 MB."""

Found = tuple[Document, str] | UserError
"""A document and the name of its row in errors, or why there is none."""
Started = Rendered | EncodeResult | UserError
"""A document before the tokenizer, or what became of one that never gets there."""


def encode_many(encoder: Encoder, documents: Iterable[Found]) -> Iterator[EncodeResult | UserError]:
    """`encoder.encode` for each in order; an error, also a given one, stands in place of the result it prevents."""
    waiting: list[tuple[Started, str]] = []
    num_characters = 0
    for found in documents:
        started, where = (found, "") if isinstance(found, UserError) else (_start(encoder, *found), found[1])
        waiting.append((started, where))
        if isinstance(started, Rendered):
            num_characters += sum(map(len, started.texts))
        if num_characters >= TOGETHER:
            yield from _finish(encoder, waiting)
            waiting, num_characters = [], 0
    yield from _finish(encoder, waiting)


def _start(encoder: Encoder, document: Document, where: str) -> Started:
    try:
        return encoder.start(document, where)
    except UserError as error:
        return error


def _finish(encoder: Encoder, waiting: Sequence[tuple[Started, str]]) -> Iterator[EncodeResult | UserError]:
    texts = [text for started, _ in waiting if isinstance(started, Rendered) for text in started.texts]
    encodings = iter(encoder.tokenize(texts) if texts else [])
    for started, where in waiting:
        if not isinstance(started, Rendered):
            yield started
            continue
        own = list(islice(encodings, len(started.examples)))
        try:
            result: EncodeResult | UserError = encoder.finish(started, own, where)
        except UserError as error:
            result = error
        yield result
