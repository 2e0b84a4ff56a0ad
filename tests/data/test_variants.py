"""How drawn rows are asked: shares of reasoning and of solved examples, another phrasing in each epoch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftkit.data.encode import Encoder
from ftkit.data.phrasings import PhrasingSet, PhrasingsSection
from ftkit.data.plan import Plan, make_plan
from ftkit.data.template_choice import chat_template_for
from ftkit.data.variants import choose_variants, job_type, measured_jobs, most_shots
from ftkit.recipe.schema import DataSection, DatasetSection, LoraMethod, ModelSection, Recipe, TrainingSection
from tests.tiny_models import tiny_tokenizer

REASONED = {"prompt": "Think: {q}", "target": "{rationale}\nThe answer is {target}.", "rationale": True}
INVERTED = {"prompt": "Ask for {target}", "target": "{q}", "inverted": True}
PHRASINGS: dict[str, Any] = {"target": "a", "rationale": "why", "phrasings": ["Q: {q}", "{q}?", REASONED, INVERTED]}
ROWS = 4000


def section(**keys: Any) -> DatasetSection:
    return DatasetSection(path="x", templates="test", **keys)


def variants(epoch: int = 0, seed: int = 0, **keys: Any) -> np.ndarray:
    positions = np.arange(ROWS)
    return choose_variants(
        0,
        positions,
        PhrasingSet("test", PhrasingsSection.model_validate(PHRASINGS)),
        section(**keys),
        positions % 2 == 0,
        positions,
        shots=keys.get("shots", 0),
        name="test",
        epoch=epoch,
        seed=seed,
    )


def test_phrasings_are_drawn_evenly_and_anew_in_each_epoch() -> None:
    first, second = variants(epoch=0)["phrasing"], variants(epoch=1)["phrasing"]
    counts = np.bincount(first, minlength=4) / ROWS
    assert counts[[0, 1, 3]] == pytest.approx([1 / 3] * 3, abs=0.03)
    assert counts[2] == 0
    assert (first != second).mean() == pytest.approx(2 / 3, abs=0.03)
    assert (first == variants(epoch=0)["phrasing"]).all()
    assert (first != variants(epoch=0, seed=1)["phrasing"]).any()


@pytest.mark.parametrize(("rationale", "share"), [("never", 0.0), (0.25, 0.25), ("always", 1.0), (1.0, 1.0)])
def test_reasoning_is_asked_for_in_a_share_of_the_rows_that_have_it(rationale: Any, share: float) -> None:
    reasoned = variants(rationale=rationale)["phrasing"] == 2
    assert reasoned[::2].mean() == pytest.approx(share, abs=0.04)
    assert not reasoned[1::2].any()


def test_solved_examples_stand_before_a_share_and_are_other_rows() -> None:
    shots = variants(few_shot=0.25, shots=2)["shots"]
    shown = (shots >= 0).sum(axis=1)
    assert set(shown.tolist()) == {0, 2}
    assert (shown > 0).mean() == pytest.approx(0.25, abs=0.03)
    for row in np.flatnonzero(shown):
        drawn = shots[row][:2].tolist()
        assert row not in drawn
        assert len(set(drawn)) == 2
    assert variants()["shots"].shape == (ROWS, 0)
    assert most_shots([section(few_shot=0.25, shots=2), section(shots=5), section()]) == 2
    assert job_type(0).itemsize == 14


def test_rows_that_are_measured_are_asked_directly_and_always_alike() -> None:
    phrasings = PhrasingSet("test", PhrasingsSection.model_validate(PHRASINGS))
    jobs = measured_jobs(0, np.arange(100), phrasings, name="test", seed=0)
    assert set(jobs["phrasing"].tolist()) == {0, 1}
    assert (jobs == measured_jobs(0, np.arange(100), phrasings, name="test", seed=0)).all()


# -------------------------------------------------------------------------------------------------------- in a plan


def plan(
    directory: Path,
    rows: list[Any],
    data: dict[str, Any] | None = None,
    others: Sequence[DatasetSection] = (),
    **keys: Any,
) -> Plan:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (directory / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    (directory / "mine.yaml").write_text(json.dumps({"one": PHRASINGS}))
    section = DatasetSection.model_validate({"path": "rows.jsonl", "templates": "mine.yaml", **keys})
    recipe = Recipe(
        base_model="tiny",
        data=DataSection(train=(section, *others), **{"val_size": 0.0, **(data or {})}),
        method=LoraMethod(type="lora"),
        training=TrainingSection(num_train_epochs=3, global_batch_size=4),
    )
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, chat_template_for(tokenizer, ModelSection(), directory, {}), max_length=512)
    return make_plan(recipe, encoder, directory=lambda key: directory)


def texts(plan: Plan) -> list[tuple[int, str]]:
    """(row, text) of every draw, in order."""
    tokenizer = tiny_tokenizer()
    examples = [plan.examples[index] for step in plan.steps for index in step]
    return [(example.row, tokenizer.decode(example.example.input_ids.tolist())) for example in examples]


def test_a_row_is_asked_in_several_ways_over_the_epochs(tmp_path: Path) -> None:
    rows = [{"q": f"question {i}", "a": f"answer {i}", "why": f"since {i}"} for i in range(20)]
    drawn = texts(plan(tmp_path, rows))
    assert len(drawn) == 60
    forms = {row: {text for other, text in drawn if other == row} for row, _ in drawn}
    assert len(forms) == 20
    assert max(len(ways) for ways in forms.values()) >= 2
    for row, ways in forms.items():
        answered = f"question {row}?<|im_end|>\n<|im_start|>assistant\nanswer {row}<|im_end|>"
        labelled = f"Q: question {row}<|im_end|>\n<|im_start|>assistant\nanswer {row}<|im_end|>"
        turned = f"Ask for answer {row}<|im_end|>\n<|im_start|>assistant\nquestion {row}<|im_end|>"
        assert all(any(text.endswith(end) for end in (answered, labelled, turned)) for text in ways)
    reasoned = texts(plan(tmp_path, rows, rationale="always"))
    assert all(f"since {row}\nThe answer is answer {row}.<|im_end|>" in text for row, text in reasoned)
    shown = texts(plan(tmp_path, rows, few_shot=1.0, shots=1))
    assert sum(text.count("question ") == 2 for _, text in shown) == 60


def test_reasoning_that_no_row_has_is_not_asked_for_in_silence(tmp_path: Path) -> None:
    rows = [{"q": "1", "a": "x"}, {"q": "2", "a": "y"}]
    missing = "no row of rows has reasoning to ask for: `rationale: 0.5` changes nothing"
    assert missing in plan(tmp_path, rows, rationale=0.5).warnings
    assert missing not in plan(tmp_path, rows).warnings
    rows[1]["why"] = "since"
    assert missing not in plan(tmp_path, rows, rationale=0.5).warnings
    direct = "no phrasing of own asks for the reasoning (rows): `rationale: always` changes nothing"
    assert direct in plan(tmp_path, rows, templates=("{q}",), rationale="always", columns={"target": "a"}).warnings


def test_a_phrasing_may_print_no_column(tmp_path: Path) -> None:
    rows = [{"target": "Why did the ..."}, {"target": "A horse ..."}]
    drawn = texts(plan(tmp_path, rows, templates=("Tell me a joke.",)))
    assert len(drawn) == 6
    assert all("Tell me a joke." in text and rows[row]["target"] in text for row, text in drawn)


def test_a_record_is_the_same_in_other_words(tmp_path: Path) -> None:
    """What is measured must not be trained on in another form; two forms of a record are two rows to train on."""
    records = [{"inputs": {"q": f"question {row}"}, "target": f"answer {row}"} for row in range(40)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (records[3], records[7])))
    measured = DatasetSection(path="test.jsonl", template="Something else: {q}")
    (counts,) = plan(tmp_path, records, {"eval": (measured,)}).counts
    assert counts.overlapping == {"a row of data.eval": [3, 7]}
    (counts,) = plan(tmp_path, records, {"eval": (measured,), "deduplicate": True}).counts
    assert counts.dropped == {"says the same as a row of data.eval (data.deduplicate)": [3, 7]}

    other = DatasetSection(path="rows.jsonl", name="other", template="Something else: {q}")
    both = plan(tmp_path, records, {"val_size": 8, "deduplicate": True}, others=(other,))
    assert [counts.overlapping | counts.dropped for counts in both.counts] == [{}, {}]
    rows, others = (set(both.validation_rows.get(name, ())) for name in ("rows", "other"))
    assert rows == others
    assert rows


def test_bad_rows_are_skipped_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    rows: list[Any] = [{"q": "1", "a": "x"}, "{broken", {"q": "3"}, {"q": "4", "a": "y"}, [5]]
    (counts,) = plan(tmp_path, rows, {"on_bad_row": "skip"}).counts
    assert (counts.rows, counts.rows_used) == (5, 2)
    malformed, missing, no_object = counts.dropped
    assert malformed.startswith("malformed JSON: ")
    assert missing == "there is no column a (data.on_bad_row: skip)"
    assert no_object == "expected an object, found a list (data.on_bad_row: skip)"
    assert list(counts.dropped.values()) == [[1], [2], [4]]


def test_rows_are_chosen_by_their_own_cluster(tmp_path: Path) -> None:
    rows = [{"q": str(i), "a": "x", "cluster": "odd" if i % 2 else "even"} for i in range(10)]
    assert {row for row, _ in texts(plan(tmp_path, rows, clusters=("odd",)))} == {1, 3, 5, 7, 9}
    # A cluster of the library that none of the rows is of.
    (warning,) = [
        text for text in plan(tmp_path, rows, exclude_clusters=("odd", "inference")).warnings if "cluster" in text
    ]
    assert warning == "no row of data.train is of the cluster inference, which the recipe names"
    chosen = plan(tmp_path, rows, exclude_clusters=("odd",))
    assert not [text for text in chosen.warnings if "cluster" in text]
    assert {row for row, _ in texts(chosen)} == {0, 2, 4, 6, 8}
    assert chosen.counts[0].dropped == {"of a cluster that is left out": [1, 3, 5, 7, 9]}
