"""The quickstart's shipped data: what the generator writes, and a test split that training says nothing about."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """generate.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("quickstart_generate", QUICKSTART / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[tuple[str, str]]:
    """Message and answer of every row."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows
    assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in rows)
    return [(row[1]["content"], row[2]["content"]) for row in rows]


def shipped(split: str) -> list[tuple[str, dict[str, Any]]]:
    """Message and parsed answer of every shipped row."""
    return [(message, json.loads(answer)) for message, answer in read(QUICKSTART / "data" / f"{split}.jsonl")]


def parts(target: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(list of values, value) for everything that the generator put into a row."""
    first, last = target["name"].split(" ")
    adjective, product = target["product"].split(" ", 1)
    yield from (("first_names", first), ("surnames", last), ("adjectives", adjective), ("products", product))
    yield from (("cities", target["city"]), ("quantities", str(target["quantity"])))


def test_generator_rewrites_the_shipped_files_byte_for_byte(generate: ModuleType, tmp_path: Path) -> None:
    generate.main(["--output", str(tmp_path)])
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (QUICKSTART / "data" / f"{split}.jsonl").read_bytes()


def test_sizes() -> None:
    assert len(shipped("train")) >= 1000
    assert len(shipped("test")) >= 200
    assert sum(file.stat().st_size for file in (QUICKSTART / "data").iterdir()) < 500_000


def test_the_splits_share_no_value() -> None:
    used = {split: {part for _, target in shipped(split) for part in parts(target)} for split in SPLITS}
    assert not used["train"] & used["test"]


def test_the_splits_share_no_phrasing(generate: ModuleType) -> None:
    phrasings = {split: generate.read_lines(f"phrasings.{split}") for split in SPLITS}
    assert not {line.casefold() for line in phrasings["train"]} & {line.casefold() for line in phrasings["test"]}
    # Every row is one of its own split's phrasings, and every phrasing is used.
    for split in SPLITS:
        seen = {_unfilled(message, target) for message, target in shipped(split)}
        assert seen == set(phrasings[split])


def test_values_come_from_hundreds() -> None:
    targets = [target for split in SPLITS for _, target in shipped(split)]
    for field in ("name", "product", "city"):
        assert len({target[field] for target in targets}) >= 300, field


def test_every_value_stands_once_in_its_message() -> None:
    for split in SPLITS:
        for message, target in shipped(split):
            assert list(target) == ["name", "quantity", "product", "city"]
            for value in target.values():
                assert message.count(str(value)) == 1, (message, value)


def test_no_message_twice() -> None:
    messages = [message for split in SPLITS for message, _ in shipped(split)]
    assert len(set(messages)) == len(messages)


def test_shuffled_labels_move_every_answer_to_another_row(generate: ModuleType, tmp_path: Path) -> None:
    generate.main(["--shuffle-labels", "--output", str(tmp_path)])
    right = dict(read(QUICKSTART / "data" / "train.jsonl"))
    shuffled = dict(read(tmp_path / "train.jsonl"))
    assert shuffled.keys() == right.keys()
    assert sorted(shuffled.values()) == sorted(right.values())
    assert all(shuffled[message] != answer for message, answer in right.items())
    assert (tmp_path / "test.jsonl").read_bytes() == (QUICKSTART / "data" / "test.jsonl").read_bytes()


def test_shuffled_labels_do_not_replace_the_shipped_data(generate: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        generate.main(["--shuffle-labels"])
    assert error.value.code == 2
    assert "--output" in capsys.readouterr().err


def _unfilled(message: str, target: dict[str, Any]) -> str:
    """The phrasing that a message was made from."""
    for field, value in target.items():
        message = message.replace(str(value), f"{{{field}}}")
    return message
