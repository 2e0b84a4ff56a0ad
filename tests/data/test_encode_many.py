"""Many documents encoded together give what each gives alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ftkit.data import encode_many as module
from ftkit.data.encode import Encoder, EncodeResult
from ftkit.data.encode_many import Found, encode_many
from ftkit.data.types import Conversation, Text
from ftkit.errors import UserError
from tests.data.conversations import cases
from tests.data.encoding import assistant, chatml_encoder, encoder_for, user
from tests.data.test_token_spans import merging_tokenizer
from tests.data.trl_templates import tokenizer_for
from tests.tiny_models import CHATML

Outcome = tuple[list[tuple[list[int], list[int], bool]], str | None, int, bool] | list[Any]


def plain(result: EncodeResult | UserError) -> Outcome:
    """What can be compared of a result."""
    if isinstance(result, UserError):
        return list(result.problems)
    examples = [(e.input_ids.tolist(), e.labels.tolist(), e.truncated) for e in result.examples]
    return examples, result.reason, result.uncut, result.has_thoughts


def alone(encoder: Encoder, found: Found) -> Outcome:
    if isinstance(found, UserError):
        return plain(found)
    try:
        return plain(encoder.encode(*found))
    except UserError as error:
        return plain(error)


def mixed_documents() -> list[Found]:
    """Conversations of all kinds, texts, some that become nothing, and rows that are no document."""
    found: list[Found] = [(case.data, f"rows.jsonl:{line}") for line, case in enumerate(cases(), start=1)]
    found[5:5] = [(Text("A text.\n" * 9), "texts:1"), (Text(" "), "texts:2")]
    found[9:9] = [UserError("no such column", how="name another", where="rows:9")]
    found[20:20] = [(Conversation((user("Hi"),)), "rows:20"), (Conversation((assistant("Hi"),)), "rows:21")]
    found[30:30] = [(Conversation((user("\ud83d"), assistant("Hello"))), "rows:30")]
    return found


@pytest.mark.parametrize("together", [1, 300, 2**18])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2_5", {}),
        ("qwen3", {}),
        ("qwen3", {"train_on_reasoning": False, "max_length": 200, "truncation": "drop"}),
        ("gemma", {"train_on": "all", "system_prompt": None}),
        ("llama3", {"train_on": "last_assistant", "turns": "each"}),
        ("qwen2_5", {"turns": "whole", "truncation": "error", "max_length": 60}),
        ("qwen2_5", {"truncation": "left", "max_length": 40}),
    ],
)
def test_the_same_as_one_by_one(
    name: str, options: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOGETHER", together)
    encoder, documents = encoder_for(tokenizer_for(name), **options), mixed_documents()
    expected = [alone(encoder, found) for found in documents]
    assert [plain(result) for result in encode_many(encoder, documents)] == expected
    assert any(isinstance(outcome, tuple) and outcome[0] for outcome in expected)  # not all are refused
    assert any(isinstance(outcome, list) for outcome in expected)  # and not none


def test_conversations_that_need_an_example_a_turn() -> None:
    """The tokenizer merges prompts and answers: what was encoded together is encoded again, apart."""
    encoder = encoder_for(merging_tokenizer(), CHATML)
    seam = Conversation((user("Hi"), assistant(" Hello"), user("And?"), assistant("\nBye")))
    none = Conversation((user("Hi"), assistant("Hello")))
    documents: list[Found] = [(seam, "a:1"), (none, "a:2"), (seam, "a:3")]
    results = list(encode_many(encoder, documents))
    assert [len(result.examples) for result in results if isinstance(result, EncodeResult)] == [2, 1, 2]
    assert [plain(result) for result in results] == [alone(encoder, found) for found in documents]


def test_nothing_gives_nothing() -> None:
    assert list(encode_many(chatml_encoder(), [])) == []


class Counting:
    """An encoder whose calls of the tokenizer are noted."""

    def __init__(self) -> None:
        self._encoder = chatml_encoder()
        self.start, self.finish = self._encoder.start, self._encoder.finish
        self.sizes: list[int] = []

    def tokenize(self, texts: Sequence[str]) -> Any:
        self.sizes.append(len(texts))
        return self._encoder.tokenize(texts)


def test_the_tokenizer_gets_many_texts_at_a_time_and_rows_are_read_as_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOGETHER", 400)
    encoder, read = Counting(), 0

    def documents() -> Iterator[Found]:
        nonlocal read
        for _ in range(40):
            read += 1
            yield Conversation((user("x" * 30), assistant("y" * 20))), "rows:1"

    results = encode_many(encoder, documents())  # type: ignore[arg-type]
    next(results)
    assert 2 <= read <= 5
    assert len(list(results)) == 39
    assert len(encoder.sizes) >= 8
    assert set(encoder.sizes[:-1]) == {read for read in encoder.sizes[:1]}
    assert encoder.sizes[0] > 1
    assert sum(encoder.sizes) == 40
