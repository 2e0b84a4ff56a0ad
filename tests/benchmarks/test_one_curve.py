import sys

import pytest

from benchmarks import one_curve
from benchmarks.one_curve import Variant, table, variants
from tests.tiny_runs import write_recipe


@pytest.mark.slow
def test_a_recipe_has_one_curve(tmp_path, monkeypatch, capfd):
    recipe = write_recipe(tmp_path)
    monkeypatch.setattr(sys, "argv", ["one_curve.py", str(recipe), "training.max_steps=4", "training.eval_steps=4"])
    assert one_curve.main() == 0
    head, *steps, off_by, summary = capfd.readouterr().out.splitlines()
    assert head.split()[:5] == ["step", "1x512", "packed", "1x128", "packed"]
    assert [len(line.split()) for line in (*steps, off_by.replace("off by", "off_by"))] == [9] * 5
    assert steps[0].split()[1] != steps[-1].split()[1]
    assert summary.startswith("largest difference ")


@pytest.mark.parametrize(("last", "code"), [(0.50009, 0), (0.5002, 1), (0.4998, 1)])
def test_a_curve_that_is_off_fails(tmp_path, monkeypatch, capsys, last, code):
    """Another loss at the last step of the last variant."""
    odd = variants(128)[-1]
    monkeypatch.setattr(one_curve, "curve", lambda recipe, overrides, v: [1.0, last if v == odd else 0.5])
    monkeypatch.setattr(sys, "argv", ["one_curve.py", str(write_recipe(tmp_path))])
    assert one_curve.main() == code
    assert capsys.readouterr().out.count("\n") == 5


def test_runs_of_unequal_length_are_no_table():
    with pytest.raises(ValueError, match="shorter"):
        table({Variant(8, "off", 1): [1.0, 0.5], Variant(8, "off", 2): [1.0]})


def test_every_way_to_split_is_there_once():
    ways = variants(128)
    assert len(set(ways)) == 8
    assert {way.max_tokens for way in ways} == {128, 512}
    assert {way.packing for way in ways} == {"required", "off"}
    assert {way.processes for way in ways} == {1, 2}
