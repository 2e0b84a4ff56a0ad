"""The benchmark of switching adapters, on a model of one layer."""

from pathlib import Path

import pytest

from benchmarks.switch import measure_all


@pytest.mark.parametrize("switches", [3, 4])
def test_only_switching_in_place_drifts_and_it_does_by_rounding_alone(switches: int, tmp_path: Path) -> None:
    found = list(measure_all(tmp_path, width=64, layers=1, rank=2, switches=switches))
    assert [precision for precision, _ in found] == ["float32"] * 4 + ["bfloat16"] * 4
    for precision, figures in found:
        drift = figures.drift
        if figures.way != "in place":
            assert (drift.differing, drift.max_ulps, drift.max_abs_difference, drift.logits) == (0, 0, 0, 0)
            continue
        # A wrong sign or order would leave an update behind, a hundred times as large.
        assert 0 < drift.max_abs_difference < (1e-7 if precision == "float32" else 1e-3)
        assert drift.differing < 0.2
    assert [figures.moved > 0 for _, figures in found[:4]] == [False, True, True, True]
