import json
import math

import pytest

from ftkit.figures import WIDTH, curves, loss_figures


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
