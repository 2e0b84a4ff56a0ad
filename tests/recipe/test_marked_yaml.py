"""The YAML reader: a table of traps, marks, caps, and one line for everything that is wrong."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from ftkit.errors import StorageError, UserError
from ftkit.recipe.marked_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml
from ftkit.recipe.scalars import is_text, parse_scalar

SCALARS: dict[str, Any] = {
    # Numbers that YAML 1.1 readers take for text.
    "1e-4": 1e-4,
    "1e5": 1e5,
    "1E+3": 1e3,
    "2.": 2.0,
    ".5": 0.5,
    "-1.5e-3": -1.5e-3,
    "12": 12,
    "-7": -7,
    "+3": 3,
    "0": 0,
    "0x1F": 31,
    "0o17": 15,
    "0.0": 0.0,
    "-.inf": -math.inf,
    # Text that YAML 1.1 readers take for something else.
    "on": "on",
    "off": "off",
    "yes": "yes",
    "no": "no",
    "No": "No",
    "y": "y",
    "2024-01-01": "2024-01-01",
    "12:30:45": "12:30:45",
    "1_000": "1_000",
    "0b11": "0b11",
    "1.2.3": "1.2.3",
    "e5": "e5",
    "=": "=",
    "9" * 5000: "9" * 5000,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "'010'": "010",
    '"1e-4"': "1e-4",
    "hf://org/name": "hf://org/name",
    "runs/{name}-{n}": "runs/{name}-{n}",
}

BROKEN = {
    "octal": ("a: 010", "1: 010 has a leading zero; write 10 for the number, or '010' for text"),
    "negative octal": ("a: -007", "1: -007 has a leading zero"),
    "duplicate": ("a: 1\nb: 2\na: 3", "3: a is given twice, first in line 1; keep one of them"),
    "duplicate inside": ("a:\n  b: 1\n  b: 1", "3: b is given twice, first in line 2"),
    "duplicate quoted": ("a: 1\n'a': 2", "2: a is given twice"),
    "tab": ("a:\n\tb: 1", "2: a tab where YAML allows only spaces; indent with spaces"),
    "number as key": ("a: 1\n1: x", "2: a key is text, not 1; put it in quotes"),
    "bool as key": ("true: x", "1: a key is text, not true"),
    "null as key": ("~: x", "1: a key is text, not ~"),
    "list as key": ("? [a]\n: b", "1: a key is text, not a list or mapping"),
    "alias as key": ("a: &x 1\n*x : 2", "2: a key is text, not an alias"),
    "anchored key": ("&x a: 1", "1: a key has neither tag nor anchor"),
    "python tag": ("a: !!python/object/apply:os.system [id]", "1: the tag !!python/object/apply:os.system is not read"),
    "text tag": ("a: !!str 5", "1: the tag !!str is not read"),
    "tag on a mapping": ("a: !x {b: 1}", "1: the tag !x is not read"),
    "two documents": ("a: 1\n---\nb: 2", "2: a second document starts here"),
    "undefined alias": ("a: *x", "1: there is no anchor &x before this alias"),
    "endless alias": ("a: &x [1, *x]", "1: *x lies inside &x itself"),
    "merge of a scalar": ("<<: 1", "1: << takes a mapping"),
    "control character": ("a: 1\nb: \x07", "2: the character U+0007 is not allowed"),
    "open bracket": ("a: [1, 2", "1: a bracket or brace is not closed"),
    "open quote": ("a: 'x", "1: a quote is not closed"),
    "second colon": ("a: b: c", "1: a colon where no key can stand"),
    "indentation": ("a:\n  b: 1\n c: 2", "3: the line does not fit the lines above it"),
    "no colon": ("abc\nd: 1", "2: a colon where no key can stand"),
    "reserved character": ("a: @x", "1: text cannot start with this character"),
    "escape": ('a: "\\q"', "1: not valid YAML: found unknown escape character"),
    "deep": ("a: " + "[" * 50, f"1: values are nested more than {MAX_DEPTH} deep"),
    "very deep": ("- " * 60_000 + "x", "1: values are nested more than"),
    "very deep in flow": ("{a: " * 40_000, "1: values are nested more than"),
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=[text[:20] or "empty" for text in SCALARS])
def test_scalars(text: str, value: Any) -> None:
    read, _ = parse_yaml(f"key: {text}\n", "x.yaml")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml("key: .nan", "x.yaml")[0]["key"])


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert time.monotonic() - started < 5
    assert str(caught.value).startswith(f"{path}:{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "---\n# nothing\n...\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="the file is empty"):
        read_yaml(path)


def test_every_key_path_is_marked() -> None:
    text = "a:\n  b: 1\n  c:\n  - x\n  -\n    d: {e: 2,\n      f: 3}\n"
    value, marks = parse_yaml(text, "r.yaml")
    assert value == {"a": {"b": 1, "c": ["x", {"d": {"e": 2, "f": 3}}]}}
    assert marks == {
        (): "r.yaml:1",
        ("a",): "r.yaml:1",
        ("a", "b"): "r.yaml:2",
        ("a", "c"): "r.yaml:3",
        ("a", "c", 0): "r.yaml:4",
        ("a", "c", 1): "r.yaml:6",
        ("a", "c", 1, "d"): "r.yaml:6",
        ("a", "c", 1, "d", "e"): "r.yaml:6",
        ("a", "c", 1, "d", "f"): "r.yaml:7",
    }


def test_aliases_are_copies_marked_where_they_were_written() -> None:
    value, marks = parse_yaml("a: &x\n  p: [1]\nb: *x\nc: *x\n", "r.yaml")
    assert value["a"] == value["b"] == value["c"] == {"p": [1]}
    value["b"]["p"].append(2)
    assert value["a"] == value["c"] == {"p": [1]}
    assert (marks[("b",)], marks[("b", "p")]) == ("r.yaml:3", "r.yaml:2")


def test_merge_keys_never_win_over_a_mapping_of_its_own() -> None:
    text = "one: &one {a: 1, b: 1}\ntwo: &two {b: 2, c: 2}\nx: {c: 3, <<: [*one, *two]}\ny:\n  <<: *one\n  a: 5\n"
    value, marks = parse_yaml(text, "r.yaml")
    assert value["x"] == {"a": 1, "b": 1, "c": 3}
    assert value["y"] == {"a": 5, "b": 1}
    assert marks[("y", "a")] == "r.yaml:6"
    assert marks[("y", "b")] == "r.yaml:1"


def test_a_billion_laughs_are_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    started = time.monotonic()
    with pytest.raises(UserError, match="more than 100,000 values, aliases expanded"):
        parse_yaml("\n".join(lines), "x.yaml")
    assert time.monotonic() - started < 5


def test_aliases_cannot_get_round_the_depth() -> None:
    lines = ["a0: &a0 [[[[x]]]]"] + [f"a{n}: &a{n} [[[[*a{n - 1}]]]]" for n in range(1, 10)]
    with pytest.raises(UserError, match="nested more than"):
        parse_yaml("\n".join(lines), "x.yaml")


def test_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: \xc3\xa9\r\n")
    value, marks = read_yaml(path)
    assert value == {"a": 1, "b": "é"}
    assert marks[("b",)] == f"{path}:2"
    for content in (b"a: 1\nb: \xe9\n", "a: 1\n".encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not UTF-8; save the file as UTF-8"):
            read_yaml(path)
    path.write_bytes(b"# " + b"x" * MAX_BYTES)
    with pytest.raises(UserError, match="is larger than 256 KiB"):
        read_yaml(path)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml: no such file; check the path"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="is a directory, not a YAML file"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="is not a file name"):
        read_yaml(tmp_path / "a\0b")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["1e-4", "010", "off", "12", "", "x", "0x1F", "a b", ".5", "null", "9" * 80])
def test_is_text_agrees_with_the_reader(text: str) -> None:
    try:
        reads_as_text = parse_scalar(text) == text
    except UserError:
        reads_as_text = False
    assert is_text(text) is reads_as_text
