import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ftkit.data.sources import dataset_name, dataset_names, read_rows
from ftkit.errors import FtkitError, NetworkError, UserError
from ftkit.recipe.schema import DatasetSection

KEY = ("data", "train", 0)


def read(base: Path, path: str, **keys: Any) -> list[tuple[int, dict[str, Any], str]]:
    rows = read_rows(DatasetSection(path=path, **keys), base=base, key=KEY)
    return [(row.index, row.fields, row.where) for row in rows]


def problems(base: Path, path: str, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(base, path, **keys)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, so that places in messages are relative."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------- json


def test_json_list_gives_the_line_of_every_record(here: Path) -> None:
    (here / "a.json").write_text('[\n  {"text": "x\\ny"},\n\n  {\n   "text": "}]"\n  }, {"text": ""}\n]\n')
    assert read(here, "a.json") == [
        (0, {"text": "x\ny"}, "a.json:2"),
        (1, {"text": "}]"}, "a.json:4"),
        (2, {"text": ""}, "a.json:6"),
    ]


def test_json_object_around_one_list(here: Path) -> None:
    (here / "a.json").write_text('{"version": "1", "tags": ["x"],\n "data": [\n{"text": "a"}]\n}')
    assert read(here, "a.json") == [(0, {"text": "a"}, "a.json:3")]


def test_super_natural_instructions_rows_carry_their_definition(here: Path) -> None:
    for definition in ("Do it.", ["Do it."]):
        content = {
            "Definition": definition,
            "Positive Examples": [{"input": "p"}],
            "Instances": [{"input": "i", "output": ["o"]}],
        }
        (here / "a.json").write_text(json.dumps(content))
        assert read(here, "a.json") == [(0, {"Definition": "Do it.", "input": "i", "output": ["o"]}, "a.json:1")]


def test_json_lines_under_the_wrong_suffix(here: Path) -> None:
    (here / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [where for _, _, where in read(here, "a.json")] == ["a.json:1", "a.json:2"]


def test_byte_order_mark_and_line_separators_are_no_trouble(here: Path) -> None:
    (here / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n{"text": "c"}')
    (here / "a.json").write_bytes(b'\xef\xbb\xbf[{"text": "a"}]')
    assert read(here, "a.jsonl") == [(0, {"text": "a\u2028b"}, "a.jsonl:1"), (1, {"text": "c"}, "a.jsonl:3")]
    assert read(here, "a.json") == [(0, {"text": "a"}, "a.json:1")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"a": 1},\n {"a": }]', "a.json:2: malformed JSON: Expecting value (column 8)"),
        (b'[{"a": 1}\n{"a": 2}]', "a.json:2: malformed JSON: expected ',' (column 1)"),
        (b'[{"a": 1}] x', "a.json:1: malformed JSON: text after the end of the JSON value"),
        (b'[{"a": 1},\n 7,\n"x"]', "a.json:2: expected an object, found a number"),
        (b'{"a": [{}], "b": [{}]}', "a.json: an object that should hold one list of records holds several (a, b)"),
        (b'{"a": 1}', "a.json: an object that should hold one list of records holds none"),
        (b"7", "a.json:1: malformed JSON: expected a list or an object"),
        (b"", "a.json: no records"),
        (b" \n", "a.json: no records"),
        (b"[]", "a.json: no records"),
        (b'[{"a": "x"},\n{"a": "\xe9"}]', "a.json:2: not UTF-8 (byte 0xe9)"),
        (b"[" * 100_000, "a.json: malformed JSON: nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_json_file(here: Path, content: bytes, expected: str) -> None:
    (here / "a.json").write_bytes(content)
    assert expected in problems(here, "a.json")


def test_every_problem_of_a_jsonl_file_at_once(here: Path) -> None:
    (here / "a.jsonl").write_bytes(b'{"text": "a"}\n[1]\n{"text": \n{"text": "\xff"}\nnull\n')
    lines = problems(here, "a.jsonl").splitlines()
    assert sorted(line.split(": ")[0] for line in lines) == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[\n{"text": "a"}\n]\n', "a.jsonl: a JSON list, not an object a line; call it .json"),
        (b'[{"text": "a"},\n{"text": "b"}]\n', "a.jsonl: a JSON list, not an object a line; call it .json"),
        ('{"text": "a"}\n{"text": "\u00fc"}\n'.encode("utf-16"), "a.jsonl: UTF-16, not UTF-8; save it as UTF-8: iconv"),
        # At the end of its own line, not at the beginning of the next.
        (b'{"text": "a"\n', "a.jsonl:1: malformed JSON: Expecting ',' delimiter (column 13)"),
    ],
)
def test_what_is_wrong_with_a_jsonl_file_is_said_once(here: Path, content: bytes, expected: str) -> None:
    (here / "a.jsonl").write_bytes(content)
    (line,) = problems(here, "a.jsonl").splitlines()
    assert line.startswith(expected)


def test_only_the_first_twenty_problems_are_shown(here: Path) -> None:
    (here / "a.jsonl").write_text("x\n" * 50)
    lines = problems(here, "a.jsonl").splitlines()
    assert len(lines) == 21
    assert lines[-1] == "a.jsonl: 30 more of 50 problems are not shown"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told_by_name(here: Path, name: str, encoding: str) -> None:
    text = "text\na\n" if name == "a.csv" else '[{"text": "\u00fc"}]'
    (here / name).write_bytes(text.encode(encoding))
    assert problems(here, name) == f"{name}: UTF-16, not UTF-8; save it as UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW"


def test_a_line_without_end_does_not_end_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftkit.data.readers.MAX_LINE", 100)
    long = json.dumps({"text": "x" * 300})
    (here / "a.jsonl").write_text(f'{long}\n{{"text": "a"}}\n{long}\n{long}\n{{"text": \n')
    lines = problems(here, "a.jsonl").splitlines()
    assert [line.split(": ")[0] for line in lines] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]
    assert "longer than" in lines[0]
    assert "malformed" in lines[3]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_there_twice(here: Path, name: str) -> None:
    rows = ['{"text": "a", "text": "b"}', '{"text": "\\"text\\"", "b": "text"}', '{"t": {"x": 1, "x": 2}, "x": 3}']
    joined = "\n".join(rows) if name == "a.jsonl" else "[" + ",\n".join(rows) + "]"
    (here / name).write_text(joined)
    lines = problems(here, name).splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        f"{name}:1: the key text stands there twice",
        f"{name}:3: the key x stands there twice",
    ]


# ------------------------------------------------------------------------------------------------ csv, parquet


def test_bytes_that_are_not_utf_8_are_told_record_by_record(here: Path) -> None:
    (here / "a.csv").write_bytes(b"text,n\na,1\n\xff,2\nb\xfe,3\n\xc3\xbc,4\n")
    lines = problems(here, "a.csv").splitlines()
    assert lines == [
        "a.csv:3: not UTF-8 (byte 0xff); save the file as UTF-8",
        "a.csv:4: not UTF-8 (byte 0xfe); save the file as UTF-8",
    ]
    (here / "a.csv").write_bytes(b"te\xff,n\na,1\n")
    assert problems(here, "a.csv") == "a.csv:1: not UTF-8 (byte 0xff); save the file as UTF-8"


def test_csv(here: Path) -> None:
    (here / "a.csv").write_text('\ufeffprompt,completion\n"a,\n""b""",c\n\nd,e\n', encoding="utf-8")
    assert read(here, "a.csv") == [
        (0, {"prompt": 'a,\n"b"', "completion": "c"}, "a.csv:2"),
        (1, {"prompt": "d", "completion": "e"}, "a.csv:5"),
    ]
    (here / "a.tsv").write_text("prompt\tcompletion\na,b\tc\n")
    assert read(here, "a.tsv") == [(0, {"prompt": "a,b", "completion": "c"}, "a.tsv:2")]
    (here / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(here, "long.csv")[0][1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n1,2,3\n4\n", "a.csv:3: 3 values for 2 columns"),
        ("a,b\n1,2\n1,2,3\n4\n", "a.csv:4: 1 values for 2 columns"),
        ('a,b\n1,"2\n3,4\n', "a.csv:2: malformed CSV: unexpected end of data"),
        ("a,a\n1,2\n", "a.csv:1: an empty or a repeated column name"),
        ("a,b\n", "a.csv: no records"),
        ("", "a.csv: no records"),
    ],
)
def test_what_is_wrong_with_a_csv_file(here: Path, content: str, expected: str) -> None:
    (here / "a.csv").write_text(content)
    assert expected in problems(here, "a.csv")


def test_parquet_without_the_nulls_that_arrow_puts_into_structs(here: Path) -> None:
    rows = [
        {"calls": [{"arguments": {"city": "Bern"}}], "note": None},
        {"calls": [{"arguments": {"count": 2}}], "note": "n"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "a.parquet")
    assert read(here, "a.parquet") == [(0, rows[0], "a.parquet: row 0"), (1, rows[1], "a.parquet: row 1")]
    (here / "b.parquet").write_text("no")
    assert "b.parquet: not a parquet file" in problems(here, "b.parquet")


def test_values_that_json_has_not(here: Path) -> None:
    """Dates and decimals are their text; NaN and infinities, which stand in for a missing number, are null."""
    row = {"day": date(2020, 1, 31), "at": datetime(2020, 1, 31, 12), "price": Decimal("1.50"), "score": float("nan")}
    rows = [{**row, "call": {"arguments": {"day": date(2020, 2, 1)}}, "picture": b"\xff"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "a.parquet")
    plain = {"day": "2020-01-31", "at": "2020-01-31T12:00:00", "price": "1.50", "score": None}
    plain |= {"call": {"arguments": {"day": "2020-02-01"}}, "picture": b"\xff"}
    assert read(here, "a.parquet") == [(0, plain, "a.parquet: row 0")]
    lines = '{"a": NaN, "b": [1e999, -Infinity, 1.5, 2]}'
    (here / "a.jsonl").write_text(lines)
    (here / "a.json").write_text(f"[{lines}]")
    for name in ("a.jsonl", "a.json"):
        assert read(here, name) == [(0, {"a": None, "b": [None, None, 1.5, 2]}, f"{name}:1")]


# ---------------------------------------------------------------------------------------------- paths and names


def test_glob_and_directory_read_sorted_files(here: Path) -> None:
    (here / "d" / "sub").mkdir(parents=True)
    for name in ("d/b.jsonl", "d/a.jsonl", "d/.hidden.jsonl", "d/sub/c.jsonl"):
        (here / name).write_text(json.dumps({"text": name}))
    (here / "d" / "README.md").write_text("no data")
    assert [row["text"] for _, row, _ in read(here, "d")] == ["d/a.jsonl", "d/b.jsonl"]
    assert [(index, where) for index, _, where in read(here, "d/*.jsonl")] == [(0, "d/a.jsonl:1"), (1, "d/b.jsonl:1")]
    assert len(read(here, "d/**/*.jsonl")) == 3
    assert len(read(here / "d", str(here / "d/*.jsonl"))) == 2
    assert "files of this kind are not read" in problems(here, "d/*")
    assert "no file matches d/*.csv" in problems(here, "d/*.csv")
    (here / "empty").mkdir()
    assert "empty holds no data files" in problems(here, "empty")


def test_a_file_named_like_a_pattern_is_a_file(here: Path) -> None:
    (here / "a[1].jsonl").write_text('{"text": "x"}')
    assert len(read(here, "a[1].jsonl")) == 1


@pytest.mark.parametrize("path", ["alpca.json", "./alpca", "/alpca", "a/b/c", "data/", "~/nothing", "a\\b"])
def test_a_missing_file_is_not_looked_up_on_the_hub(here: Path, path: str) -> None:
    (here / "alpaca.json").write_text("[]")
    message = problems(here, path)
    # Where it was looked for, whatever the path is relative to.
    assert message.startswith(f"no such file: {(here / Path(path).expanduser()).absolute()}")
    assert path != "alpca.json" or "did you mean alpaca.json?" in message


def test_local_data_has_no_revision(here: Path) -> None:
    (here / "a.jsonl").write_text('{"text": "x"}')
    assert "a.jsonl is local" in problems(here, "a.jsonl", revision="main")


def test_problem_names_the_recipe_key(here: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(here, "missing.json")
    assert caught.value.problems[0].key == (*KEY, "path")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/alpaca_en.json", "alpaca_en"),
        ("data/sst2.train.jsonl", "sst2.train"),
        ("HuggingFaceTB/smol-v1.5", "smol-v1.5"),
        ("hf://org/name", "name"),
        ("data/tasks/", "tasks"),
        ("data/chats/*.jsonl", "chats"),
        ("data/part-*.jsonl", "part"),
        ("*", "data"),
    ],
)
def test_default_names(path: str, name: str) -> None:
    assert dataset_name(DatasetSection(path=path)) == name


def test_names_are_unique() -> None:
    sections = [DatasetSection(path="a/x.json"), DatasetSection(path="b/x.json"), DatasetSection(path="c", name="x-2")]
    assert dataset_names(sections) == ["x", "x-2", "x-2-2"]


# ---------------------------------------------------------------------------------------------------- the hub


def hub(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[Any, ...]]:
    calls = []

    def load_dataset(path: str, name: str | None, split: str, revision: str | None) -> Any:
        calls.append((path, name, split, revision))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


def test_hub_data_set(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, [{"text": "a"}, {"text": "b"}])
    expected = [(0, {"text": "a"}, "org/name row 0"), (1, {"text": "b"}, "org/name row 1")]
    assert read(here, "org/name", subset="sub", split="test", revision="v1") == expected
    assert read(here, "hf://org/name") == expected
    assert calls == [("org/name", "sub", "test", "v1"), ("org/name", None, "train", None)]


def test_an_existing_path_wins_over_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, [{"text": "hub"}])
    (here / "org" / "name").mkdir(parents=True)
    (here / "org" / "name" / "a.jsonl").write_text('{"text": "local"}')
    assert read(here, "org/name")[0][1] == {"text": "local"}
    assert not calls
    assert read(here, "hf://org/name")[0][1] == {"text": "hub"}


def hub_errors() -> list[tuple[Exception, int, str]]:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    chained = RuntimeError("while loading")
    chained.__cause__ = TimeoutError("slow")
    return [
        (DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."), 2, "org/name is gated"),
        (DatasetNotFoundError("Revision 'v9' doesn't exist for dataset"), 2, "org/name has no revision v9"),
        (
            DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
            2,
            "/org/name, and no data set org/name",
        ),
        (ConnectionError("Couldn't reach 'org/name' on the Hub"), 7, "the hub cannot be reached for org/name"),
        (OfflineModeIsEnabled("offline"), 7, "the hub cannot be reached for org/name"),
        (chained, 7, "the hub cannot be reached"),
        (ValueError("BuilderConfig 'x' not found.\nAvailable: ['a', 'b']"), 2, "cannot load org/name (split train)"),
    ]


def test_hub_errors_are_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, exit_code, expected in hub_errors():
        hub(monkeypatch, error)
        with pytest.raises(FtkitError) as caught:
            read(here, "org/name", revision="v9")
        assert caught.value.exit_code == exit_code
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, NetworkError) == (exit_code == 7)


def test_an_empty_hub_data_set_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [])
    assert "org/name has no rows" in problems(here, "org/name")
