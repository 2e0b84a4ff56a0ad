"""How figures are shown: thinned out, rounded, left out."""

import torch
from rich.console import Console
from rich.table import Table

from ftkit.artifacts.inspection import Change, Inspection
from ftkit.artifacts.inspection_report import comparison_panels, comparison_table, inspection_panels, inspection_tables
from ftkit.artifacts.similarity import Comparison, ModuleSimilarity
from ftkit.console import BARS
from ftkit.methods.spectrum import Spectrum


def change(values: list[float], *, name: str = "q_proj", rank: int | None = 4, **figures: float | None) -> Change:
    sizes = {"relative_norm": None, "amplification": None, **figures}
    return Change(name, (8, 16), rank, Spectrum(torch.tensor(values, dtype=torch.float64)), **sizes)


def inspection(*changes: Change, base: str | None = "base") -> Inspection:
    return Inspection("run", base, changes, ())


def rows(table: Table) -> list[list[str]]:
    """The cells of a table, as it is printed in a pipe."""
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(table)
    # No cell is empty, and none holds two spaces in a row but between columns.
    return [line.split() for line in capture.get().splitlines()[2:]]


def test_what_an_adapter_changed_and_what_trained_in_full_are_two_tables() -> None:
    low = change([4.0, 2.0], relative_norm=0.01234, amplification=21.52)
    full = change([3.0, 1.0], name="lm_head", rank=None, relative_norm=0.5)
    one, other = inspection_tables(inspection(low, full))
    assert rows(one) == [["q_proj", "4", "4", f"{BARS[7]}{BARS[4]}", "1.9", "2", "0.0123", "21.5", "0.0698"]]
    assert rows(other) == [["lm_head", "8", "x", "16", "0.5", "1.8", "1", "1", "2"]]
    assert [rows(table)[0][0] for table in inspection_tables(inspection(low))] == ["q_proj"]
    assert [rows(table)[0][0] for table in inspection_tables(inspection(full))] == ["lm_head"]


def test_without_a_base_the_norm_stands_alone() -> None:
    (table,) = inspection_tables(inspection(change([3.0, 4.0]), base=None))
    assert [column.header for column in table.columns][-1] == "|dW|"
    assert rows(table)[0][-1] == "5"


def test_at_most_16_bars_from_the_first_value_to_the_last() -> None:
    (table,) = inspection_tables(inspection(change([8.0] * 30 + [4.0] * 33 + [1.0])))
    bars = rows(table)[0][3]
    assert len(bars) == 16
    assert bars == BARS[-1] * 8 + BARS[4] * 7 + BARS[1]


def test_a_picture_has_a_column_for_each_rank_or_for_powers_of_two() -> None:
    (panel,) = inspection_panels(inspection(change([2.0, 1.0]), change([])))
    assert (panel.row_labels, panel.column_labels) == (["q_proj", "q_proj"], ["1", "2"])
    assert panel.values == [[0.8, 1.0], [0.0, 0.0]]
    (panel,) = inspection_panels(inspection(change([1.0] * 100)))
    assert panel.column_labels == ["1", "2", "4", "8", "16", "32", "64", "100"]
    assert [round(value, 9) for value in panel.values[0]] == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1]
    (panel,) = inspection_panels(inspection(change([1.0] * 64)))
    assert panel.column_labels == ["1", "2", "4", "8", "16", "32", "64"]
    (panel,) = inspection_panels(inspection(change([1.0] * 32)))
    assert [label for label in panel.column_labels if label] == [str(rank) for rank in range(1, 32, 2)]


def test_similarities_of_a_layer_that_does_nothing_are_left_out() -> None:
    phi = torch.arange(32, dtype=torch.float64).reshape(4, 8) / 32
    modules = ModuleSimilarity("q_proj", 64, phi), ModuleSimilarity("k_proj", 64, phi[:, :0])
    comparison = Comparison(("a", "b"), modules[:1], ())
    assert rows(comparison_table(comparison)) == [["q_proj", "4", "x", "8", "0.000", "0.281", "0.969", "0.125"]]
    comparison = Comparison(("a", "b"), modules, ())
    assert rows(comparison_table(comparison))[1] == ["k_proj", "4", "x", "0", "-", "-"]
    (panel,) = comparison_panels(comparison)
    assert (panel.title, panel.cell, panel.values) == ("q_proj", (20, 40), phi.tolist())
