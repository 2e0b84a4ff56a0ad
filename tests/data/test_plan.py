import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ftkit.data.encode import NO_TARGET, Encoder, EncodeResult
from ftkit.data.plan import Plan, make_plan
from ftkit.data.template_choice import chat_template_for
from ftkit.data.truncation import TooLongError
from ftkit.data.types import IGNORE, Document, Example, Text
from ftkit.errors import UserError
from ftkit.recipe.schema import (
    DataSection,
    DatasetSection,
    LoraMethod,
    MixingSection,
    ModelSection,
    Recipe,
    TrainingSection,
)
from tests.tiny_models import tiny_tokenizer


class ByteEncoder:
    """One token a byte after a first one, one example a part of the text; some words say what shall go wrong."""

    def __init__(self, max_length: int = 10_000) -> None:
        self.max_length = max_length
        self.digest = f"{type(self).__name__} {max_length}"
        self.template = SimpleNamespace(expects_thoughts=False)

    def start(self, document: Document, where: str = "") -> EncodeResult:
        assert isinstance(document, Text)
        if document.text.startswith("refuse"):
            raise UserError("the template refuses this", how="mend it", where=where)
        if document.text.startswith("odd"):
            raise UserError(f"the template refuses {document.text}", how="mend it", where=where)
        if document.text.startswith("long"):
            raise TooLongError("4 tokens are more than data.max_length: 3", where=where)
        if document.text.startswith("gone"):
            return EncodeResult([], "longer than max_length without its prompt")
        parts = [self._example(part) for part in document.text.split("|")]
        examples = [example for example in parts if example.num_targets]
        uncut = max(len("<" + part) for part in document.text.split("|"))
        return EncodeResult(examples, NO_TARGET if len(examples) < len(parts) else None, uncut)

    def _example(self, text: str) -> Example:
        ids = np.frombuffer(("<" + text).encode(), np.uint8).astype(np.int32)
        labels = np.full_like(ids, IGNORE) if text.startswith("silent") else ids.copy()
        labels[0] = IGNORE
        return Example(ids[: self.max_length], labels[: self.max_length], truncated=len(ids) > self.max_length)


class UnevenEncoder(ByteEncoder):
    """As `ByteEncoder`, but does not train on each example's second token."""

    def _example(self, text: str) -> Example:
        example = super()._example(text)
        example.labels[1] = IGNORE
        return example


def write(path: Path, texts: Sequence[str]) -> DatasetSection:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DatasetSection(path=path.name, format="text")


def recipe(
    train: Sequence[DatasetSection], *, evaluation: Sequence[DatasetSection] = (), seed: int = 0, **keys: Any
) -> Recipe:
    training = {name: keys.pop(name) for name in list(keys) if name in TrainingSection.model_fields}
    return Recipe(
        base_model="tiny",
        data=DataSection(train=tuple(train), eval=tuple(evaluation), **{"val_size": 0.0, **keys}),
        method=LoraMethod(type="lora"),
        training=TrainingSection(**{"global_batch_size": 4, "num_train_epochs": 2, **training}),
        seed=seed,
    )


def plan_of(base: Path, recipe: Recipe, encoder: ByteEncoder | None = None) -> Plan:
    return make_plan(recipe, cast(Encoder, encoder or ByteEncoder()), directory=lambda key: base)


def texts_of(plan: Plan, steps: Sequence[int] | None = None) -> list[str]:
    chosen = plan.steps if steps is None else [plan.steps[step] for step in steps]
    return [bytes(plan.examples[index].example.input_ids[1:].tolist()).decode() for index in chain(*chosen)]


# ------------------------------------------------------------------------------------------------------- steps


def test_examples_lie_in_the_order_of_the_rows(tmp_path: Path) -> None:
    """Read and encoded in order, however they are drawn: a row's neighbours are in the same piece of the file."""
    a, b = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(600)]), write(tmp_path / "b.jsonl", ["b0", "b1"])
    plan = plan_of(tmp_path, recipe([a, b], num_train_epochs=2))
    found = [plan.examples[index] for index in range(602)]
    assert [(example.dataset, example.row) for example in found] == [*((0, i) for i in range(600)), (1, 0), (1, 1)]


def test_concat_gives_every_row_once_an_epoch(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(7)]), write(tmp_path / "b.jsonl", ["b0", "b1", "b2"])
    plan = plan_of(tmp_path, recipe([a, b], num_train_epochs=3))
    assert [len(step) for step in plan.steps] == [4, 4, 2] * 3
    everything = sorted([f"a{i}" for i in range(7)] + ["b0", "b1", "b2"])
    epochs = [texts_of(plan, range(start, start + 3)) for start in (0, 3, 6)]
    assert all(sorted(texts) == everything for texts in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert plan.epoch_of_step == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0, 2.4, 2.8, 3.0])
    assert plan.targets_per_step == [2 * size for size in [4, 4, 2] * 3]
    assert plan.dataset_names == ["a", "b"]
    # Over the whole run.
    assert [(counts.rows, counts.rows_used, counts.examples, counts.tokens) for counts in plan.counts] == [
        (7, 7, 21, 63),
        (3, 3, 9, 27),
    ]
    assert [counts.target_tokens for counts in plan.counts] == [42, 18]
    assert [counts.share for counts in plan.counts] == [0.7, 0.3]
    assert [counts.epochs for counts in plan.counts] == [3.0, 3.0]
    assert plan.num_tokens == 90
    assert [text[0] for text in epochs[0]] != sorted(text[0] for text in epochs[0])
    assert plan.validation == {}


@pytest.mark.parametrize(("max_steps", "sizes"), [(2, [4, 4]), (3, [4, 4, 2]), (8, [4, 4, 2, 4, 4, 2, 4, 4])])
def test_max_steps_stops_inside_an_epoch_or_repeats_them(tmp_path: Path, max_steps: int, sizes: list[int]) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(10)])
    plan = plan_of(tmp_path, recipe([a], max_steps=max_steps))
    longer = plan_of(tmp_path, recipe([a], num_train_epochs=3))
    assert [len(step) for step in plan.steps] == sizes
    assert list(plan.steps) == longer.steps[:max_steps]
    assert plan.epoch_of_step == longer.epoch_of_step[:max_steps]


def test_weights_decide_the_share_of_a_run(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(50)]).model_copy(update={"weight": 3.0})
    b = write(tmp_path / "b.jsonl", [f"b{i}" for i in range(50)])
    plan = plan_of(tmp_path, recipe([a, b], mixing=MixingSection(strategy="weights", epoch_size=2000)))
    counts = Counter(text[0] for text in texts_of(plan))
    assert sum(counts.values()) == 4000
    # The second epoch goes on where the first one stopped, so that no row comes more often than another.
    times = Counter(text for text in texts_of(plan) if text[0] == "a")
    assert max(times.values()) - min(times.values()) <= 1
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_pieces_of_a_row_are_spread(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["|".join(f"p{i:02}" for i in range(40)), *(f"r{i:02}" for i in range(40))])
    plan = plan_of(tmp_path, recipe([a], num_train_epochs=1))
    assert plan.counts[0].examples == 80
    assert plan.counts[0].rows_used == 41
    assert sorted(texts_of(plan)) == sorted([f"p{i:02}" for i in range(40)] + [f"r{i:02}" for i in range(40)])
    assert 5 <= sum(text[0] == "p" for text in texts_of(plan, range(5))) <= 15


def test_everything_repeats_with_the_seed(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)]).model_copy(update={"max_samples": 60})
    one, same, other = (plan_of(tmp_path, recipe([a], val_size=0.1, seed=seed)) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint
    assert one.validation_rows == same.validation_rows
    assert texts_of(one) == texts_of(same)
    assert one.fingerprint != other.fingerprint
    assert one.validation_rows != other.validation_rows


def test_fingerprint_follows_the_data_and_not_the_length_of_the_run(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(20)])
    short = plan_of(tmp_path, recipe([a], val_size=0.1))
    longer = plan_of(tmp_path, recipe([a], val_size=0.1, num_train_epochs=5))
    assert longer.fingerprint_until(len(short.steps)) == short.fingerprint
    assert longer.fingerprint != short.fingerprint
    assert longer.fingerprint_until(3) != longer.fingerprint_until(4)
    for changed_row in (short.validation_rows["a"][0], short.examples[0].row):
        write(tmp_path / "a.jsonl", [f"text {i}" if i != changed_row else "other" for i in range(20)])
        assert plan_of(tmp_path, recipe([a], val_size=0.1)).fingerprint != short.fingerprint
    # The same ids, of which fewer are trained on.
    b = write(tmp_path / "a.jsonl", ["text"])
    assert plan_of(tmp_path, recipe([b]), UnevenEncoder()).fingerprint != plan_of(tmp_path, recipe([b])).fingerprint


# -------------------------------------------------------------------------------------------------- validation


def test_split_rows_are_never_trained_on(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"Row {i % 60}" for i in range(80)])
    b = write(tmp_path / "b.jsonl", [f"row  {i}" for i in range(50, 110)])
    plan = plan_of(tmp_path, recipe([a, b], val_size=0.2))
    assert set(plan.validation) == {"a", "b"}
    for index, (name, rows) in enumerate(plan.validation_rows.items()):
        assert [row for row, _ in plan.validation_documents[name]] == rows
        assert [example.row for example in plan.validation[name]] == rows
        assert {example.dataset for example in plan.validation[name]} == {index}
    measured = {
        " ".join(document.text.lower().split())
        for rows in plan.validation_documents.values()
        for _, document in rows
        if isinstance(document, Text)
    }
    trained = {" ".join(text.lower().split()) for text in texts_of(plan)}
    assert 15 <= len(measured) <= 28
    assert not measured & trained
    assert len(measured | trained) == 110
    assert [counts.rows_used for counts in plan.validation_counts] == [len(rows) for rows in plan.validation.values()]


DROP_OR_LIST = "data.deduplicate: true drops them, `ftkit preview --dropped` lists them"


def test_eval_data_replaces_the_split(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ["x", "y"]), write(tmp_path / "b.jsonl", ["z", "X "])
    plan = plan_of(tmp_path, recipe([a], evaluation=[b], val_size=0.5))
    assert plan.counts[0].rows_used == 2
    assert plan.validation_rows == {"b": [0, 1]}
    assert {example.dataset for example in plan.validation["b"]} == {0}
    assert f"1 row of a says the same as a row of data.eval (row 0); {DROP_OR_LIST}" in plan.warnings
    deduplicated = plan_of(tmp_path, recipe([a], evaluation=[b], deduplicate=True))
    assert set(texts_of(deduplicated)) == {"y"}
    assert deduplicated.counts[0].dropped == {"says the same as a row of data.eval (data.deduplicate)": [0]}


def test_rows_that_say_the_same_are_listed_or_dropped(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ["x", "y", "X"]), write(tmp_path / "b.jsonl", ["z", " y", "w"])
    plan = plan_of(tmp_path, recipe([a, b], num_train_epochs=1))
    assert len(texts_of(plan)) == 6
    assert [counts.overlapping for counts in plan.counts] == [{"an earlier row": [2]}, {"an earlier row": [1]}]
    for name, row in (("a", 2), ("b", 1)):
        assert f"1 row of {name} says the same as an earlier row (row {row}); {DROP_OR_LIST}" in plan.warnings
    plan = plan_of(tmp_path, recipe([a, b], num_train_epochs=1, deduplicate=True))
    assert sorted(texts_of(plan)) == ["w", "x", "y", "z"]
    reason = "says the same as an earlier row (data.deduplicate)"
    assert [counts.dropped for counts in plan.counts] == [{reason: [2]}, {reason: [1]}]
    assert [counts.overlapping for counts in plan.counts] == [{}, {}]


def test_max_samples_does_not_depend_on_other_data_sets(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(100)]).model_copy(update={"max_samples": 10})
    b = write(tmp_path / "b.jsonl", ["b"] * 5)
    alone, second = plan_of(tmp_path, recipe([a])), plan_of(tmp_path, recipe([b, a]))
    assert alone.counts[0].rows == 100
    assert alone.counts[0].rows_used == 10
    assert {e.row for e in alone.examples} == {e.row for e in second.examples if e.dataset == 1}
    assert {e.row for e in alone.examples} != set(range(10))
    renamed = plan_of(tmp_path, recipe([a.model_copy(update={"name": "c"})]))
    assert {e.row for e in alone.examples} != {e.row for e in renamed.examples}


def test_only_the_first_rows_are_read_where_no_more_are_wanted(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(20)])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("no row\n")

    def plan(first_rows: int | None, **keys: Any) -> Plan:
        encoder = cast(Encoder, ByteEncoder())
        return make_plan(recipe([a], **keys), encoder, directory=lambda key: tmp_path, first_rows=first_rows)

    assert {example.row for example in plan(5).examples} == set(range(5))
    assert plan(20).counts[0].rows == 20
    # What was read before is not taken for the whole.
    for keys in ({}, {"clusters": ("any",)}):
        with pytest.raises(UserError, match="jsonl:21"):
            plan(None if not keys else 5, **keys)


def test_a_split_row_without_targets_stops_nothing(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["one", "two", *(f"silent {i}" for i in range(8))])
    plans = [plan_of(tmp_path, recipe([a], val_size=1, seed=seed)) for seed in range(4)]
    assert {tuple(plan.validation) for plan in plans} == {(), ("a",)}
    for plan in plans:
        assert plan.validation.keys() == plan.validation_rows.keys() == plan.validation_documents.keys()


# ------------------------------------------------------------------------------------------ drops and warnings


def test_examples_without_targets_are_dropped_and_counted(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["one", "silent", "two|silent", "gone", "three"])
    plan = plan_of(tmp_path, recipe([a], num_train_epochs=1))
    assert sorted(texts_of(plan)) == ["one", "three", "two"]
    (counts,) = plan.counts
    assert counts.dropped == {"no token to train on": [1, 2], "longer than max_length without its prompt": [3]}
    assert (counts.rows, counts.rows_used, counts.examples) == (5, 3, 3)


def test_every_data_set_without_a_target_is_named_with_the_reason(tmp_path: Path) -> None:
    sets = [write(tmp_path / f"{name}.jsonl", [name] * 2) for name in ("silent", "gone", "fine")]
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, recipe(sets))
    silent, gone = caught.value.problems
    assert silent.key == ("data", "train", 0, "path")
    assert silent.what == "silent has no token to train on (2 rows: no token to train on)"
    assert gone.key == ("data", "train", 1, "path")
    assert gone.how == "raise data.max_length"
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, recipe([sets[2]], evaluation=[sets[0]]))
    assert caught.value.problems[0].key == ("data", "eval", 0, "path")


def test_rows_that_the_template_refuses_are_reported_once_for_each_reason(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["fine", *["refuse"] * 30])
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, recipe([a]))
    (problem,) = caught.value.problems
    assert problem.where is not None
    assert problem.where.endswith("a.jsonl:2")
    assert problem.what == "the template refuses this (and 29 rows more: 3, 4, 5, 6, 7, ...)"


def test_rows_that_the_template_refuses_drop_out_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["fine", "refuse 1", "good", "refuse 2"])
    b = write(tmp_path / "b.jsonl", ["refuse 3", "measured"])
    plan = plan_of(tmp_path, recipe([a], evaluation=[b], on_bad_row="skip"))
    assert set(texts_of(plan)) == {"fine", "good"}
    reason = "the template refuses this (data.on_bad_row: skip)"
    assert plan.counts[0].dropped == {reason: [1, 3]}
    assert plan.validation_counts[0].dropped == {reason: [0]}
    # Told without the option all the same, and not from what was kept for the other.
    with pytest.raises(UserError, match="the template refuses this"):
        plan_of(tmp_path, recipe([a], evaluation=[b]))


def test_reasons_without_number_are_put_together(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["fine", *(f"odd {number}" for number in range(30))])
    (counts,) = plan_of(tmp_path, recipe([a], on_bad_row="skip")).counts
    assert len(counts.dropped) == 21
    assert len(counts.dropped["something else is wrong (data.on_bad_row: skip)"]) == 10


def test_a_row_that_is_too_long_is_no_bad_row(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["fine", "long"])
    with pytest.raises(UserError, match="tokens are more than"):
        plan_of(tmp_path, recipe([a], on_bad_row="skip"))


def test_bad_rows_at_the_beginning_do_not_hide_the_good_ones(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["fine"])
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 1500 + path.read_text())
    plan = plan_of(tmp_path, recipe([a], on_bad_row="skip"))
    assert texts_of(plan) == ["fine", "fine"]
    ((reason, rows),) = plan.counts[0].dropped.items()
    assert reason.startswith("malformed JSON")
    assert len(rows) == 1500
    path.write_text("{\n" * 3)
    with pytest.raises(UserError, match=r"a.jsonl has no row that can be used \(3: malformed JSON.*correct the JSON"):
        plan_of(tmp_path, recipe([a], on_bad_row="skip"))


def test_training_and_validation_data_are_told_together(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ["a"]), write(tmp_path / "b.jsonl", ["b"])
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{\n")
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, recipe([a], evaluation=[b]))
    assert [Path(problem.where or "").name for problem in caught.value.problems] == ["a.jsonl:1", "b.jsonl:1"]


def test_the_first_twenty_problems_of_a_file_are_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [])
    rows = [{"text": number} for number in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, recipe([a]))
    *first, last = caught.value.problems
    assert [Path(problem.where or "").name for problem in first] == [f"a.jsonl:{line}" for line in range(1, 21)]
    assert last.what == "10 more of 30 problems are not shown"


def test_data_sets_that_cannot_be_read_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, recipe([DatasetSection(path="a.json"), DatasetSection(path="b.json")]))
    assert [problem.key for problem in caught.value.problems] == [
        ("data", "train", 0, "path"),
        ("data", "train", 1, "path"),
    ]


def test_warning_of_rows_that_are_cut(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [str(i).zfill(i) for i in range(1, 201)])
    plan = plan_of(tmp_path, recipe([a]), ByteEncoder(max_length=101))
    assert plan.counts[0].truncated == 100
    assert "100 of 200 rows of a (50%) are longer than data.max_length 101; 199 keeps 99% whole" in plan.warnings
    # A small data set does not hide behind a large one.
    b = write(tmp_path / "b.jsonl", [f"b{i:05}" for i in range(12_000)])
    hidden = plan_of(tmp_path, recipe([b, a]), ByteEncoder(max_length=101))
    assert [warning.partition(" are longer")[0] for warning in hidden.warnings] == ["100 of 200 rows of a (50%)"]
    plan = plan_of(tmp_path, recipe([a]), ByteEncoder(max_length=199))
    assert plan.counts[0].truncated == 2
    assert not [warning for warning in plan.warnings if "max_length" in warning]


def test_warning_of_few_steps_gives_the_batch_for_a_hundred(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(160)])
    (warning,) = plan_of(tmp_path, recipe([a], global_batch_size=16)).warnings
    assert warning == "20 optimizer steps are few; training.global_batch_size: 3 gives at least 100"
    assert len(plan_of(tmp_path, recipe([a], global_batch_size=3)).steps) == 108
    b = write(tmp_path / "b.jsonl", [f"b{i}" for i in range(10)])
    (warning,) = plan_of(tmp_path, recipe([b])).warnings
    assert warning == "6 optimizer steps are few; training.num_train_epochs: 34 gives at least 100"
    assert len(plan_of(tmp_path, recipe([b], num_train_epochs=34)).steps) == 102
    assert plan_of(tmp_path, recipe([b], max_steps=3)).warnings == []


def test_a_split_that_finds_no_rows(tmp_path: Path) -> None:
    b = write(tmp_path / "b.jsonl", ["same", "Same"])
    plan = plan_of(tmp_path, recipe([b], val_size=0.5, max_steps=1))
    assert "too few different rows to split any off; there is no validation" in plan.warnings


def test_a_mixture_that_is_used_up(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(10)]).model_copy(update={"repeat": 2})
    assert len(plan_of(tmp_path, recipe([a], max_steps=6)).steps) == 6
    with pytest.raises(UserError, match="used up after 6 of 7 steps"):
        plan_of(tmp_path, recipe([a], max_steps=7))


def test_a_short_run_encodes_no_more_than_it_needs(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(5000)])
    short, longer = plan_of(tmp_path, recipe([a], max_steps=10)), plan_of(tmp_path, recipe([a], max_steps=400))
    assert len(short.examples) < 1500 < len(longer.examples)
    assert texts_of(short) == texts_of(longer, range(10))
    # Rows that give no example are made up for.
    b = write(tmp_path / "b.jsonl", [f"b{i}" if i % 100 == 0 else "gone" for i in range(5000)])
    plan = plan_of(tmp_path, recipe([b], max_steps=12))
    assert [len(step) for step in plan.steps] == [4] * 12


# ------------------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_hold_the_global_batch(tmp_path: Path, world_size: int, packed: bool) -> None:
    a = write(tmp_path / "a.jsonl", ["x" * (1 + i % 13) + str(i) for i in range(30)])
    plan = plan_of(tmp_path, recipe([a], global_batch_size=8, val_size=5))
    for step, indices in enumerate(plan.steps):
        ranks = [
            plan.micro_batches(step, rank=rank, world_size=world_size, max_tokens=40, packed=packed)
            for rank in range(world_size)
        ]
        assert len({len(micro_batches) for micro_batches in ranks}) == 1
        for micro_batch in chain(*ranks):
            sizes = [example.example.num_tokens for example in micro_batch]
            assert len(sizes) <= 1 or (sum(sizes) if packed else len(sizes) * max(sizes)) <= 40
        found = [example.row for example in chain(*chain(*ranks))]
        assert sorted(found) == sorted(plan.examples[index].row for index in indices)
        targets = sum(example.example.num_targets for example in chain(*chain(*ranks)))
        assert targets == plan.targets_per_step[step]
    ranks = [
        plan.validation_batches("a", rank=rank, world_size=world_size, max_tokens=40, packed=packed)
        for rank in range(world_size)
    ]
    assert sorted(example.row for example in chain(*chain(*ranks))) == plan.validation_rows["a"]


def test_progress_is_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["x", "y", "z"])
    told: list[tuple[str, int, int]] = []
    make_plan(
        recipe([a]),
        cast(Encoder, ByteEncoder()),
        directory=lambda key: tmp_path,
        progress=lambda *call: told.append(call),
    )
    assert told == [("encoding", 3, 3)]


# ------------------------------------------------------------------------------------------------ real encoder


def test_with_the_real_encoder(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(20)
    ]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": "long " * 30}) + '\n{"text": ""}\n')
    alpaca = [{"instruction": "Say it." * 20, "input": "", "output": f"o{i}"} for i in range(10)]
    (tmp_path / "alpaca.json").write_text(json.dumps([*alpaca, {"instruction": "Be mute.", "input": "", "output": ""}]))
    tokenizer = tiny_tokenizer()
    template = chat_template_for(tokenizer, ModelSection(), tmp_path, {})
    encoder = Encoder(tokenizer, template, max_length=64, turns="auto", train_on="assistant")
    sections = [DatasetSection(path=path) for path in ("chats.json", "books.jsonl", "alpaca.json")]
    plan = make_plan(recipe(sections, val_size=4), encoder, directory=lambda key: tmp_path)
    chats_counts, books_counts, alpaca_counts = plan.counts
    assert chats_counts.rows_used + len(plan.validation_rows["chats"]) == 20
    assert (books_counts.rows_used, books_counts.examples, [*chain(*books_counts.dropped.values())]) == (1, 6, [1])
    assert 10 in [*chain(*alpaca_counts.dropped.values())]
    assert alpaca_counts.truncated == alpaca_counts.rows_used
    assert any("are longer than data.max_length 64" in warning for warning in plan.warnings)
    for encoded in plan.examples:
        example = encoded.example
        assert example.num_tokens <= 64
        assert example.num_targets > 0
        assert example.input_ids.dtype == example.labels.dtype == np.int32
        if encoded.dataset == 0:
            targets = tokenizer.decode(example.labels[example.labels != IGNORE])
            assert targets == f"a{encoded.row}<|im_end|>"


def test_data_sets_of_a_held_out_cluster_drop_out(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ["a1", "a2"]), write(tmp_path / "b.jsonl", ["b1", "b2"])
    sets = [a.model_copy(update={"cluster": "one"}), b.model_copy(update={"cluster": "two"})]
    plan = plan_of(tmp_path, recipe(sets, exclude_clusters=("one",)))
    assert set(texts_of(plan)) == {"b1", "b2"}
    assert plan.dataset_names == ["b"]
    assert "not trained on, since all rows are of a cluster that is left out: a" in plan.warnings
    with pytest.raises(UserError, match="leave no row to train on"):
        plan_of(tmp_path, recipe(sets, exclude_clusters=("one", "two")))
    with pytest.raises(UserError, match="there is no cluster tow in data"):
        plan_of(tmp_path, recipe(sets, exclude_clusters=("one", "tow")))
    assert plan_of(tmp_path, recipe(sets, exclude_clusters=("one", "sentiment"))).dataset_names == ["b"]
