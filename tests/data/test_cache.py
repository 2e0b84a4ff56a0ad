"""Prepared data: written once, whole or not at all, and found again by nothing but what it was made from."""

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ftkit.data import cache, corpus, encoding, processes
from ftkit.data.cache import FINISHED, digest_of, prepared
from ftkit.data.encode import Encoder
from ftkit.data.plan import Plan, make_plan
from ftkit.data.template_choice import chat_template_for
from ftkit.errors import StorageError
from ftkit.recipe.schema import DataSection, DatasetSection, LoraMethod, ModelSection, Recipe, TrainingSection
from tests.tiny_models import CHATML, tiny_tokenizer


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def test_an_entry_is_written_once(root: Path) -> None:
    calls: list[Path] = []

    def write(directory: Path) -> None:
        calls.append(directory)
        (directory / "x").write_text("1")

    first, second = prepared("key", write), prepared("key", write)
    assert first == second == root / "key"
    assert len(calls) == 1
    assert (first / "x").read_text() == "1"


def test_what_fails_or_is_killed_leaves_no_entry(root: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "x").write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        prepared("key", fail)
    assert [path.name for path in root.iterdir()] == [".key.lock"]
    # As a kill in the middle of a copy would leave it.
    for directory in (root / "key", root / ".key-abandoned"):
        directory.mkdir()
        (directory / "x").write_text("half")

    def write(directory: Path) -> None:
        (directory / "x").write_text("whole")

    entry = prepared("key", write)
    assert (entry / "x").read_text() == "whole"
    assert (entry / FINISHED).is_file()
    assert sorted(path.name for path in root.iterdir()) == [".key.lock", "key"]


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="FTKIT_CACHE"):
        prepared("key", lambda directory: None)


def _write_slowly(log: str) -> None:
    def write(directory: Path) -> None:
        with Path(log).open("a") as file:
            file.write("written\n")
        time.sleep(0.3)
        (directory / "x").write_text("1")

    assert (prepared("key", write) / "x").read_text() == "1"


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    processes = [context.Process(target=_write_slowly, args=(str(log),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "written\n"


# ------------------------------------------------------------------------------------------------- what it depends on


def write_rows(directory: Path, answers: list[str]) -> None:
    rows = [{"instruction": f"q{i}", "output": answer} for i, answer in enumerate(answers)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def plan(
    directory: Path, *, chat_template: str = CHATML, max_length: int = 64, tokens: tuple[str, ...] = (), **data: Any
) -> Plan:
    tokenizer = tiny_tokenizer(chat_template)
    tokenizer.add_tokens(list(tokens))
    template = chat_template_for(tokenizer, ModelSection(), directory, {})
    encoder = Encoder(
        tokenizer, template, max_length=max_length, turns="auto", train_on=data.get("train_on", "assistant")
    )
    section = DatasetSection(path="rows.jsonl", columns=data.pop("columns", {}))
    recipe = Recipe(
        base_model="tiny",
        data=DataSection(train=(section,), **{"val_size": 0.0, **data}),
        method=LoraMethod(type="lora"),
        training=TrainingSection(num_train_epochs=1),
    )
    return make_plan(recipe, encoder, directory=lambda key: directory)


def test_every_input_counts(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries() -> int:
        return len(list(root.glob("[!.]*")))

    write_rows(tmp_path, ["a", "b"])
    first = plan(tmp_path)
    assert entries() == 2
    again = plan(tmp_path)
    assert entries() == 2
    assert again.fingerprint == first.fingerprint
    # Data bytes: another answer of the same length, in a file of the same size and time.
    stat = (tmp_path / "rows.jsonl").stat()
    write_rows(tmp_path, ["a", "c"])
    os.utime(tmp_path / "rows.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert plan(tmp_path).fingerprint != first.fingerprint
    assert entries() == 4
    plan(tmp_path, chat_template="{# another #}" + CHATML)
    assert entries() == 5
    plan(tmp_path, tokens=("ab",))
    assert entries() == 6
    plan(tmp_path, max_length=32)
    assert entries() == 7
    plan(tmp_path, train_on="all")
    assert entries() == 8
    plan(tmp_path, on_bad_row="skip")
    assert entries() == 10
    monkeypatch.setattr(cache, "code_version", lambda: "new")
    monkeypatch.setattr("ftkit.data.corpus.code_version", lambda: "new")
    monkeypatch.setattr(encoding, "code_version", lambda: "new")
    plan(tmp_path)
    assert entries() == 12


def test_the_code_version_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.code_version.__wrapped__()
    assert cache.code_version.__wrapped__() == before
    copy = tmp_path / "data"
    copy.mkdir()
    for path in Path(cache.__file__).parent.glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cache, "__file__", str(copy / "cache.py"))
    unchanged = cache.code_version.__wrapped__()
    (copy / "encode.py").write_text((copy / "encode.py").read_text() + "\n")
    assert cache.code_version.__wrapped__() != unchanged


def test_several_processes_encode_what_one_does(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, [f"answer {i}" for i in range(1500)])
    one = plan(tmp_path)
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "other"))
    for module in (corpus, encoding):
        monkeypatch.setattr(module, "MIN_PARALLEL", 0)
    monkeypatch.setattr(processes, "cores", lambda: 2)
    two = plan(tmp_path)
    assert two.fingerprint == one.fingerprint
    assert two.counts == one.counts


def test_digests_tell_values_apart() -> None:
    values: list[tuple[Any, ...]] = [("a", "b"), ("ab", ""), (["a", "b"],), (1,), ("1",), (True,), (None,)]
    assert len({digest_of(*value) for value in values}) == len(values)
