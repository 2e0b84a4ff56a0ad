import io
import itertools
import json
import math
import re

import pytest
from rich.table import Table

from ftkit.console import Console
from ftkit.figures import MOST_ROWS, WIDTH, curves, evaluation_table, loss_figures


@pytest.fixture
def metrics(tmp_path):
    """Writes lines; NaN is null in the file, as in a run's."""
    path = tmp_path / "metrics.jsonl"

    def write(*lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def steps(values, **more):
    return [{"step": step, "loss": value, **more} for step, value in enumerate(values, start=1)]


def test_the_figures_of_a_run(metrics):
    lines = [{"event": "eval", "step": 0, "eval_loss": 3.0, "eval_loss_a": 3.0}, *steps([2.0, None])]
    found = loss_figures(metrics(*lines, {"step": 2, "loss": 1.5}))
    assert found == {"eval_loss": {0: 3.0}, "eval_loss_a": {0: 3.0}, "loss": {1: 2.0, 2: 1.5}}
    assert math.isnan(loss_figures(metrics(*steps([None])))["loss"][1])


def test_a_curve_falls_as_the_loss_does(metrics):
    (line,) = curves(metrics(*steps([4.0, 3.0, 2.0, 1.0])))
    assert line == "loss  █▆▃▁  4.0000 to 1.0000, lowest 1.0000 at step 4"
    (line,) = curves(metrics(*steps([1.0, 1.0])))
    assert line == "loss  ██  1.0000 to 1.0000, lowest 1.0000 at step 1"


def test_a_long_one_is_drawn_in_means(metrics):
    (line,) = curves(metrics(*steps([10.0 - step / 100 for step in range(1000)])))
    bars = line.split()[1]
    assert len(bars) == WIDTH
    assert bars[0] == "█"
    assert bars[-1] == "▁"
    assert list(bars) == sorted(bars, reverse=True)


def test_of_one_data_set_there_is_one_curve_of_several_one_each(metrics):
    def evaluation(step, **parts):
        return {
            "event": "eval",
            "step": step,
            "eval_loss": 2.0,
            **{f"eval_loss_{name}": v for name, v in parts.items()},
        }

    one = metrics(*steps([2.0, 1.0]), evaluation(0, a=2.0), evaluation(2, a=2.0))
    assert [line.split()[0] for line in curves(one)] == ["loss", "eval_loss"]
    two = metrics(evaluation(0, a=2.0, b=3.0), evaluation(2, a=2.0, b=1.0))
    assert [line.split()[0] for line in curves(two)] == ["eval_loss", "eval_loss_a", "eval_loss_b"]
    assert "3.0000 to 1.0000, lowest 1.0000 at step 2" in curves(two)[2]


def test_what_is_not_finite_is_no_bar(metrics):
    (line,) = curves(metrics(*steps([2.0, None, 1.0])))
    assert line == "loss  █▁  2.0000 to 1.0000, lowest 1.0000 at step 3"
    (line,) = curves(metrics(*steps([None, None])))
    assert line == "loss  never finite"
    assert curves(metrics(*steps([2.0]))) == []


def shown(table: Table | None) -> list[list[str]]:
    """The cells of a table as a pipe gets it, its title first."""
    assert table is not None
    stream = io.StringIO()
    Console(stream=stream).table(table)
    text = stream.getvalue()
    assert "\x1b" not in text
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_the_table_of_evaluations_says_which_is_handed_over():
    found = {"eval_loss": {0: 3.0, 10: 1.0, 20: 1.5}, "eval_loss_a": {0: 3.0, 10: 1.0, 20: 1.5}}
    table = evaluation_table(found, metric="eval_loss", best=10, published=10)
    assert shown(table) == [
        ["evaluations"],
        ["step", "eval_loss"],
        ["0", "3.0000"],
        ["10", "1.0000", "best, published"],
        ["20", "1.5000", "last"],
    ]
    last = evaluation_table(found, metric="eval_loss", best=10, published=20)
    assert shown(last)[3:] == [["10", "1.0000", "best"], ["20", "1.5000", "published, last"]]
    assert evaluation_table({"loss": {1: 2.0}}, metric="eval_loss", best=None, published=1) is None


def test_a_lower_one_without_a_checkpoint_is_told():
    values = {0: 3.0, 5: 0.5, 10: 1.0}
    found = {"eval_loss": {0: 1.0, 5: 2.0, 10: 3.0}, "eval_loss_a": values, "eval_loss_b": {0: 2.0, 10: math.nan}}
    rows = shown(evaluation_table(found, metric="eval_loss_a", best=10, published=10))
    assert rows[1:] == [
        ["step", "eval_loss", "eval_loss_a", "eval_loss_b"],
        ["0", "1.0000", "3.0000", "2.0000"],
        ["5", "2.0000", "0.5000", "-", "lowest, no checkpoint"],
        ["10", "3.0000", "1.0000", "nan", "best, published, last"],
    ]
    rows = shown(evaluation_table(found, metric="eval_loss", best=5, published=5))
    assert rows[2][-1] == "lowest, before training"


@pytest.mark.parametrize("count", [11, 12, 13, 40, 1000])
def test_many_evaluations_are_thinned_out(count):
    found = {"eval_loss": {step: 5.0 - step / 1000 for step in range(count)}}
    rows = shown(evaluation_table(found, metric="eval_loss", best=7, published=7))
    steps = [int(row[0]) for row in rows[2:]]
    assert len(steps) == min(count, MOST_ROWS)
    assert {0, 7, count - 1} <= set(steps)
    assert steps == sorted(set(steps))
    assert rows[0] == (["evaluations"] if count <= MOST_ROWS else [f"evaluations (12 of {count})"])
    # Even but for those that must be there.
    gaps = sorted(after - before for before, after in itertools.pairwise(steps))
    assert gaps[-1] <= 1 + 1.5 * count / 9
