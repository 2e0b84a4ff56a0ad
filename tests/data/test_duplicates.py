"""Rows that say the same."""

from datetime import date
from typing import Any

import numpy as np

from ftkit.data.duplicates import content_key, groups_of, record_key, repeated
from ftkit.data.store import KEY
from ftkit.data.types import Conversation, Message, RowContent, TaskRecord, Text


def chat(*texts: str, **keywords: Any) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)), **keywords)


def test_case_and_white_space_do_not_count() -> None:
    assert content_key(chat("What  is\nit?", "A")) == content_key(chat(" what is IT? ", "a "))
    assert content_key(Text("One  two")) == content_key(Text("one two"))
    assert content_key(TaskRecord({"q": "X", "r": None}, "y")) == content_key(TaskRecord({"q": "x", "r": ""}, "Y"))


def test_what_is_said_by_whom_does() -> None:
    different: list[RowContent] = [
        chat("a", "b"),
        chat("a", "c"),
        chat("ab", ""),
        Conversation((Message("system", "a"), Message("user", "b"))),
        Conversation((Message("user", "a"), Message("assistant", "", tool_calls=({"function": {"name": "b"}},)))),
        TaskRecord({"q": "a"}, "b"),
        TaskRecord({"q": "a"}, "c"),
        TaskRecord({"q": "a"}, "c", options=("c", "d")),
        chat("a", "b", tools=({"type": "function", "function": {"name": "f"}},)),
        Conversation((Message("user", "a"), Message("assistant", "b", train=False))),
        Conversation((Message("user", "a", train=True), Message("assistant", "b"))),
    ]
    assert len({content_key(content) for content in different}) == len(different)


def test_groups_go_over_all_data_sets() -> None:
    keys = [
        np.frombuffer(b"".join(content_key(Text(text)) for text in part), KEY)
        for part in (["a", "b", "A"], ["c", "B"], ["d"])
    ]
    groups = groups_of(keys)
    assert groups[0][0] == groups[0][2]
    assert groups[0][1] == groups[1][1]
    assert len({int(number) for part in groups for number in part}) == 4
    assert [part.tolist() for part in repeated(groups)] == [[False, False, True], [False, True], [False]]
    assert groups_of([]) == repeated([]) == []


def test_two_rows_are_one_by_any_kind_of_key() -> None:
    def keys(*texts: str) -> np.ndarray:
        return np.frombuffer(b"".join(content_key(Text(text)) for text in texts), KEY)

    def sets_of(groups: list[np.ndarray]) -> list[int]:
        numbers = np.concatenate(groups).tolist()
        return [numbers.index(number) for number in numbers]

    # The first is as the third by the first kind, the third as the fourth by the second, and so on in a chain.
    first = [keys("a", "b"), keys("a", "c", "d", "d")]
    second = [keys("1", "2"), keys("3", "3", "4", "2")]
    assert sets_of(groups_of(first, second)) == [0, 1, 0, 0, 1, 1]
    assert sets_of(groups_of(first)) == [0, 1, 0, 3, 4, 4]
    assert groups_of([], []) == []


def test_records_are_the_same_up_to_case_and_white_space() -> None:
    record = {"q": "What  is it?", "a": ["X", 1], "day": date(2020, 1, 1)}
    assert record_key(record) == record_key({"day": date(2020, 1, 1), "a": ["x", 1], "q": "what is IT?"})
    for name, value in (("q", "What"), ("a", ["X", 2]), ("b", "")):
        assert record_key(record) != record_key(record | {name: value})
