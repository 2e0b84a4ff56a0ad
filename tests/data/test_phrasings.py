"""The library of phrasings: every one renders, and no two of a data set are alike."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ftkit.data.phrasings import LIBRARY, PhrasingSet, PhrasingsSection, find_phrasings, library, phrase, read_phrasings
from ftkit.data.problems import RowError
from ftkit.data.task_records import parse_template
from ftkit.data.task_rows import SkippedRow, read_record, without_letters
from ftkit.data.types import TaskRecord
from ftkit.errors import UserError
from tests.data.library_rows import ROWS

NAMES = sorted(library())
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "mixtures.md"


def record_of(phrasings: PhrasingSet, row: dict[str, Any], **labels: str) -> TaskRecord:
    return read_record(phrasings, row, {}, labels)


# ------------------------------------------------------------------------------------------------------ the library


def test_size() -> None:
    clusters = {phrasings.section.cluster for phrasings in library().values()}
    counts = [len(phrasings.phrasings) for phrasings in library().values()]
    assert len(counts) >= 25
    assert len(clusters) >= 10
    assert min(counts) >= 5
    assert sum(count >= 10 for count in counts) >= 8
    assert {path.stem for path in LIBRARY.glob("*.yaml")} == clusters


@pytest.mark.parametrize("name", NAMES)
def test_every_phrasing_renders_a_row_of_the_hubs_shape(name: str) -> None:
    phrasings = library()[name]
    assert ROWS.keys() == library().keys()
    record = record_of(phrasings, ROWS[name])
    kinds = set()
    for index, phrasing in enumerate(phrasings.phrasings):
        prompt, target = phrasings.phrase(record, index)
        assert prompt == prompt.strip()
        assert target
        assert not re.search(r"\{\w", prompt + target), "a field was left open"
        kinds.add((phrasing.rationale, phrasing.inverted))
        if phrasing.rationale:
            assert record.rationale is not None
            assert target == f"{record.rationale}\nThe answer is {record.target}."
        elif not phrasing.inverted and target not in (record.target, record.fields.get("sentence")):
            # A letter; or, of translations, the other direction.
            assert re.fullmatch(r"\([A-Z]\)", target) or name.startswith(("wmt", "opus"))
        if re.fullmatch(r"\([A-Z]\)", target):
            assert f"{target} {record.target}" in prompt, "the letter is explained"
    assert (False, False) in kinds
    if record.rationale is not None:
        assert len(phrasings.reasoned) >= 2
    if record.options:
        shown = [" ".join(p for _, p in phrasing.prompt if p) for phrasing in phrasings.phrasings]
        texts = [phrasings.phrase(record, index)[0] for index in phrasings.direct]
        assert any("options" in s or "lettered" in s or "choices" in s for s in shown) or any(
            all(option in text for option in record.options) for text in texts
        )


@pytest.mark.parametrize("name", NAMES)
def test_no_two_phrasings_of_a_data_set_are_alike(name: str) -> None:
    sections = library()[name].section.phrasings
    prompts = [section if isinstance(section, str) else section.prompt for section in sections]
    words = [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts]
    for one, other in itertools.combinations(words, 2):
        assert len(one & other) / len(one | other) < 0.7


@pytest.mark.parametrize("name", NAMES)
def test_entries_say_where_their_names_are_from(name: str) -> None:
    section = library()[name].section
    assert section.path
    assert section.names_from


# ------------------------------------------------------------------------------------------------------ reading rows


def phrasings_of(**keys: Any) -> PhrasingSet:
    return PhrasingSet("test", PhrasingsSection(**{"phrasings": ("{text}?",), **keys}))


def test_class_numbers_booleans_and_texts_are_labels() -> None:
    phrasings = phrasings_of(target="label", labels=("no", "yes"))
    for value, expected in ((0, "no"), (1, "yes"), ("1", "yes"), (False, "no"), (True, "yes"), ("Yes", "yes")):
        assert record_of(phrasings, {"text": "t", "label": value}).target == expected
    assert record_of(phrasings, {"text": "t", "label": "duplicate"}, duplicate="yes").target == "yes"
    for value in (2, -1, "maybe"):
        with pytest.raises(RowError, match="is none of no, yes"):
            record_of(phrasings, {"text": "t", "label": value})
    with pytest.raises(RowError, match="there is no column label"):
        record_of(phrasings, {"text": "t"})


def test_keys_and_numbers_of_options() -> None:
    lettered = phrasings_of(target="answer", options="choices.text", target_keys="choices.label")
    row = {"text": "t", "choices": {"text": ["4", "3", "2"], "label": ["1", "2", "3"]}}
    # The key comes first, though an option has the same text.
    assert record_of(lettered, {**row, "answer": "2"}).target == "3"
    numbered = phrasings_of(target="answer", options=("{a}", "{b}"), target_index=1)
    record = record_of(numbered, {"text": "t", "a": "x", "b": "y", "answer": 2})
    assert (record.target, record.options) == ("y", ("x", "y"))
    with pytest.raises(RowError, match="is none of the 2 options"):
        record_of(numbered, {"text": "t", "a": "x", "b": "y", "answer": 3})


def test_what_is_no_text_is_not_printed() -> None:
    """Nor what Python says of it."""
    with pytest.raises(RowError) as caught:
        record_of(phrasings_of(), {"text": {"de": "Hund", "en": "dog"}, "target": "x"})
    assert caught.value.what.startswith("text must be text, a number or a list of them to be printed, found {'de'")
    assert caught.value.how == "name a part of it: {text.de}, {text.en}"
    for value in (b"\xff", [b"\xff"]):
        with pytest.raises(RowError, match="must be text, a number or a list of them to be printed, found"):
            record_of(phrasings_of(), {"text": value, "target": "x"})
    with pytest.raises(RowError, match="target must be text or a number"):
        record_of(phrasings_of(), {"text": "t", "target": b"\xff"})
    assert record_of(phrasings_of(), {"text": ["a", 1, None], "target": "x"}).fields == {"text": ["a", 1, None]}


def test_a_task_record_is_read_by_its_own_names() -> None:
    phrasings = phrasings_of(target="answerKey", options="choices", target_keys=("A", "B"), rationale="why")
    inputs = {"text": "t", "options": ["(A) x", "(B) y"]}
    record = record_of(phrasings, {"inputs": inputs, "target": "(B)", "rationale": "so", "references": ["y", "Y"]})
    assert record == TaskRecord({"text": "t"}, "y", ("y", "Y"), ("x", "y"), "so")


def test_reasoning_and_answer_in_one_column() -> None:
    phrasings = phrasings_of(target="answer", target_after="####", rationale="answer", rationale_before="####")
    record = record_of(phrasings, {"text": "t", "answer": "2 + 2 = 4\n#### 4"})
    assert (record.rationale, record.target) == ("2 + 2 = 4", "4")
    assert record_of(phrasings, {"text": "t", "answer": "4"}).rationale is None


def test_what_is_no_part_of_the_reasoning_is_taken_out() -> None:
    row = ROWS["gsm8k"]
    assert (
        record_of(library()["gsm8k"], row).rationale == "He packs 6 * 4 = 24 candles.\nOf these 24 - 9 = 15 are left."
    )
    for last_line in ("Answer: B", "The correct answer is (B).", "Ans. B", "B is correct.", "Hence option B"):
        row = ROWS["aqua_rat"] | {"rationale": f"Half of 36 is 18.\n{last_line}"}
        assert record_of(library()["aqua_rat"], row).rationale == "Half of 36 is 18."
    for last_line in ("The answer is 18", "So train B is faster", "5 options: 2^5"):
        row = ROWS["aqua_rat"] | {"rationale": f"Half of 36 is 18.\n{last_line}"}
        assert record_of(library()["aqua_rat"], row).rationale == f"Half of 36 is 18.\n{last_line}"


def test_sorted_options_do_not_tell_the_answer_by_their_place() -> None:
    phrasings = phrasings_of(target="right", options=("{wrong}", "{right}"), sort_options=True)
    assert record_of(phrasings, {"text": "t", "wrong": "b", "right": "a"}).options == ("a", "b")
    assert record_of(phrasings, {"text": "t", "wrong": "a", "right": "b"}).options == ("a", "b")


def test_rows_without_an_answer_are_skipped() -> None:
    with pytest.raises(SkippedRow, match=r"no answer \(label is -1\)"):
        record_of(phrasings_of(target="label", labels=("a", "b"), skip=(-1,)), {"text": "t", "label": -1})


def test_other_names_of_columns() -> None:
    record = read_record(phrasings_of(target="y"), {"body": "t", "z": {"y": "a"}}, {"text": "body", "y": "z.y"}, {})
    assert (record.fields, record.target) == ({"text": "t"}, "a")


def test_letters_are_taken_off_only_where_every_option_has_its_own() -> None:
    assert without_letters(["A) 1", "B) 2"]) == without_letters(["(A) 1", "(B) 2"]) == ("1", "2")
    assert without_letters(["A) 1", "C) 2"]) == ("A) 1", "C) 2")
    assert without_letters(["A", "B"]) == ("A", "B")


# ---------------------------------------------------------------------------------------------------------- phrasing


def test_solved_examples_come_first_in_the_same_words() -> None:
    phrasings = phrasings_of(phrasings=("Q: {text}\nA:",))
    shot, record = TaskRecord({"text": "1+1"}, "2"), TaskRecord({"text": "2+2"}, "4", ("4", "four"))
    conversation = phrase(record, phrasings, 0, [shot])
    assert conversation.messages[0].content == "Q: 1+1\nA:\n\n2\n\n\nQ: 2+2\nA:"
    assert conversation.messages[1].content == "4"
    assert conversation.references == ("4", "four")


def test_only_examples_that_the_phrasing_can_be_filled_with_are_shown() -> None:
    reasoned = {"prompt": "{text}, why?", "target": "{rationale}\nThe answer is {target}.", "rationale": True}
    phrasings = PhrasingSet("test", PhrasingsSection.model_validate({"phrasings": ["{text}?", reasoned]}))
    record = TaskRecord({"text": "a"}, "x", rationale="so")
    shots = [TaskRecord({"text": "b"}, "y", rationale="as"), TaskRecord({"text": "c"}, "z")]
    assert phrase(record, phrasings, 0, shots).messages[0].content == "b?\n\ny\n\n\nc?\n\nz\n\n\na?"
    assert phrase(record, phrasings, 1, shots).messages[0].content == ("b, why?\n\nas\nThe answer is y.\n\n\na, why?")


# ----------------------------------------------------------------------------------------------------------- finding


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    entry = {"target": "y", "phrasings": ["{x}?", {"prompt": "Write {y}", "target": "{x}", "inverted": True}]}
    (tmp_path / "mine.yaml").write_text(json.dumps({"one": entry}))
    key = ("data", "train", 0, "templates")
    assert find_phrasings("mine.yaml", base=tmp_path, key=key).name == "one"
    (tmp_path / "mine.yaml").write_text(json.dumps({"one": entry, "two": entry}))
    assert find_phrasings("mine.yaml:two", base=tmp_path, key=key).direct == (0,)
    for name, message in (
        ("mine.yaml", "has 2 data sets"),
        ("mine.yaml:three", "none called three"),
        ("sst", "the library has no phrasings sst; did you mean sst2"),
    ):
        with pytest.raises(UserError, match=message):
            find_phrasings(name, base=tmp_path, key=key)
    assert len(find_phrasings(("{a}", "{a}?"), base=tmp_path, key=key).plain) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"phrasings": []}, "at least 1 item"),
        ({"phrasings": ["{x"]}, "expected '}'"),
        ({"phrasings": ["{x}"], "lables": ["a", "b"]}, "Extra inputs are not permitted"),
        ({"phrasings": ["{x}"], "labels": ["a", "b"], "target_index": 0}, "exclude each other"),
        ({"phrasings": ["{x}"], "target_index": 0}, "target_index needs options"),
        ({"phrasings": [{"prompt": "{x}", "inverted": True}]}, "must ask for the answer alone"),
        ({"phrasings": ["{x}", {"prompt": "{x}", "rationale": True}]}, "no {rationale}"),
        ({"phrasings": ["{x}"], "rationale_without": "("}, "no regular expression: missing )"),
        ({"phrasings": ["{x}"], "sort_options": True}, "sort_options needs options"),
        ({"phrasings": ["{x}"], "options": "x", "target_index": 0, "sort_options": True}, "sort_options needs options"),
    ],
)
def test_wrong_files(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"one": entry}))
    with pytest.raises(UserError) as caught:
        read_phrasings(tmp_path / "mine.yaml")
    assert message in str(caught.value.problems[0])
    assert caught.value.problems[0].where is not None


def test_braces_hold_names_only() -> None:
    pieces = parse_template("{a.b} {{x}}")
    assert [field for _, field in pieces if field is not None] == ["a.b"]
    assert "".join(literal for literal, _ in pieces) == " {x}"
    with pytest.raises(ValueError, match="is no field name"):
        parse_template("{a!r}")


def test_the_documentation_lists_the_library() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (\S+)", text, flags=re.MULTILINE)
    assert {name: (cluster, path) for name, cluster, path in listed} == {
        name: (phrasings.section.cluster, phrasings.section.path) for name, phrasings in library().items()
    }


def columns_table() -> str:
    """What rows of the library's data sets need, as a table of docs/mixtures.md."""
    lines = ["| name | columns | the answer |", "|-|-|-|"]
    for name, phrasings in sorted(library().items()):
        section = phrasings.section
        columns = ", ".join(f"`{column}`" for column in phrasings.needed_columns)
        meaning = f"`{section.target}`"
        if section.labels is not None:
            meanings = [f"{number} {label}" for number, label in enumerate(section.labels[:8])]
            meaning += f": {', '.join(meanings)}{', ...' if len(section.labels) > 8 else ''}"
        elif section.target_index is not None:
            meaning += f": the number of the option, from {section.target_index}"
        elif isinstance(section.target_keys, str):
            meaning += f": one of `{section.target_keys}`"
        elif section.target_keys is not None:
            meaning += f": one of {', '.join(section.target_keys)}"
        lines.append(f"| `{name}` | {columns} | {meaning} |")
    return "\n".join(lines) + "\n"


def test_the_documentation_says_what_rows_of_the_library_need() -> None:
    assert columns_table() in DOCUMENTATION.read_text(encoding="utf-8"), columns_table()


@pytest.mark.parametrize("name", NAMES)
def test_no_more_columns_are_needed_than_are_said(name: str) -> None:
    phrasings = library()[name]
    row = {column.partition(".")[0]: ROWS[name][column.partition(".")[0]] for column in phrasings.needed_columns}
    assert read_record(phrasings, row, {}, {}) == read_record(phrasings, ROWS[name], {}, {})
