"""`ftkit preview`: what is shown is what is trained on."""

import json
from pathlib import Path

import pytest

from ftkit.cli import run
from ftkit.console import Console
from ftkit.data.types import IGNORE
from ftkit.recipe.load import load_recipe
from ftkit.training.prepare import prepare
from tests.tiny_runs import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_recipe(tmp_path, rows=12)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[3] = json.dumps({"instruction": "Be mute.", "input": "", "output": ""})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return path


def show(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run(["preview", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_holds_every_example_that_is_trained_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in show(capsys, recipe, "--json").splitlines()]
    prepared = prepare(load_recipe(recipe), Console(quiet=True), offline=True, trust_remote_code=False)
    plan = prepared.plan
    trained = [plan.examples[index] for step in plan.steps for index in step]
    assert {line["row"] for line in lines} == {example.row for example in trained}
    by_row = {example.row: example.example for example in trained}
    for line in lines:
        example = by_row[line["row"]]
        assert line["dataset"] == "rows"
        assert line["input_ids"] == example.input_ids.tolist()
        assert line["labels"] == example.labels.tolist()
        assert line["text"] == prepared.tokenizer.decode(line["input_ids"])
        assert line["text"].startswith("<|im_start|>user\nSay ")
        answer = prepared.tokenizer.decode([label for label in line["labels"] if label != IGNORE])
        assert answer.endswith("<|im_end|>")
    # In the order of training, each once.
    assert [line["row"] for line in lines] == list(dict.fromkeys(example.row for example in trained))


def test_without_colours_trained_tokens_stand_in_brackets(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = show(capsys, recipe, "--limit", "1")
    assert shown.count("⟦") == shown.count("⟧") == 1
    start, end = shown.index("⟦"), shown.index("⟧")
    assert shown[:start].endswith("<|im_start|>assistant\n")
    assert shown[start + 1 : end].endswith("<|im_end|>")
    assert "tokens" in shown
    assert "trained on" in shown
    assert "▁" in shown or "█" in shown


def test_a_row_of_choice(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line)["row"] for line in show(capsys, recipe, "--json").splitlines()]
    place = recipe.parent / f"rows.jsonl:{rows[2] + 1}"
    assert f"rows row {rows[2]} ({place}): " in show(capsys, recipe, "--dataset", "rows", "--row", str(rows[2]))
    for arguments, message in (
        (["--row", "3"], "the run has no example of row 3; it was left out: no assistant turn to train on"),
        (["--row", "3", "--json"], "the run has no example of row 3; it was left out: no assistant turn"),
        (["--row", "99"], "the run has no example of row 99; choose another --row, or raise training.max_steps"),
        (["--dataset", "row"], "the run has no data set row; choose one of rows"),
    ):
        assert run(["preview", str(recipe), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_dropped_rows_with_reasons(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("data.val_size=0", "training.max_steps=null", "training.num_train_epochs=1")
    shown = show(capsys, recipe, *overrides, "--dropped")
    place = f"{recipe.parent}/rows.jsonl:4"
    assert shown == f"rows row 3 ({place}): no assistant turn to train on\n1 row left out\n"
    line = json.loads(show(capsys, recipe, *overrides, "--dropped", "--json"))
    assert line == {
        "dataset": "rows",
        "part": "train",
        "row": 3,
        "where": place,
        "reason": "no assistant turn to train on",
        "dropped": True,
    }


def test_dropped_names_unreadable_rows_and_rows_that_say_the_same(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = recipe.parent / "rows.jsonl"
    rows = data.read_text().splitlines()
    data.write_text("\n".join([*rows, "{broken", rows[0]]) + "\n")
    shown = show(capsys, recipe, "data.on_bad_row=skip", "data.val_size=0", "--dropped").splitlines()
    assert len(shown) == 3 + 1
    assert shown[0].startswith(f"rows row 12 ({data}:13): malformed JSON: ")
    assert shown[0].endswith("(data.on_bad_row: skip)")
    assert shown[1] == f"rows row 3 ({data}:4): no assistant turn to train on"
    assert shown[2] == f"rows row 13 ({data}:14): says the same as an earlier row; trained on all the same"
    assert shown[3] == "2 rows left out"


def test_validation_rows_are_shown_where_they_are_asked_for(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = recipe.parent / "measured.jsonl"
    measured.write_text(json.dumps({"instruction": "Say zu.", "input": "", "output": "zu"}) + "\n")
    overrides = ("data.val_size=0", f"data.eval=[{{path: {measured}}}]")
    assert "Say zu." not in show(capsys, recipe, *overrides)
    shown = show(capsys, recipe, *overrides, "--dataset", "measured")
    assert f"measured row 0 ({measured}:1, validation): " in shown
    assert "Say zu.<|im_end|>\n<|im_start|>assistant\n⟦zu<|im_end|>⟧" in shown
    (line,) = show(capsys, recipe, *overrides, "--dataset", "measured", "--json").splitlines()
    assert json.loads(line)["part"] == "validation"
    # Of rows that are split off too.
    rows = {json.loads(line)["row"] for line in show(capsys, recipe, "data.val_size=4", "--json").splitlines()}
    (split_off, *_) = set(range(12)) - rows - {3}
    assert f"rows.jsonl:{split_off + 1}, validation)" in show(
        capsys, recipe, "data.val_size=4", "--row", str(split_off)
    )


def test_no_weights_are_needed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = recipe.parent / "base-llama"
    weights = next(base.glob("*.safetensors"))
    weights.write_bytes(b"")
    show(capsys, recipe)


def test_a_column_that_seems_to_be_misspelt_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = recipe.parent / "rows.jsonl"
    told = "warning: column inpt of rows is not read; if it is input, say so: `columns: {input: inpt}`"
    assert told not in show(capsys, recipe)
    rows.write_text(rows.read_text().replace('"input"', '"inpt"'))
    assert told in show(capsys, recipe)
