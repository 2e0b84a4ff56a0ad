"""What an inspection found, as a table for people, as plain values for machines and as panels of a picture."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ftkit.artifacts.heat_map import Panel, ends_labelled
from ftkit.artifacts.inspection import Change, Inspection
from ftkit.artifacts.similarity import Comparison, ModuleSimilarity
from ftkit.console import make_table, sparkline

BARS_SHOWN = 16
"""Singular values that a row of the table shows as bars, at most."""
SHARES = {"50%": 0.5, "90%": 0.9, "99%": 0.99}
RANKS_SHOWN = (1, 2, 4, 8)
"""i = j of the similarities in the table, beside that of all directions."""
COLUMNS_DRAWN = 32
"""Ranks that a picture has a column for; where there are more, powers of two."""
PANEL_SIDE, MIN_CELL = 160, 3
"""Pixels of a similarity's panel, about, and of the smallest of its cells."""
NOTHING = "-"


# ------------------------------------------------------------------------------------------------- one model


def inspection_tables(inspection: Inspection) -> list[Table]:
    """The layers that an adapter changed, and the matrices that trained in full; either may be missing."""
    low_rank = [change for change in inspection.changes if change.rank is not None]
    in_full = [change for change in inspection.changes if change.rank is None]
    tables = []
    if low_rank:
        tables.append(_low_rank_table(low_rank, with_base=inspection.base is not None))
    if in_full:
        tables.append(_full_table(in_full))
    return tables


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """`model`, `base`, `modules` and `notes`."""
    modules = [_change_json(change) for change in inspection.changes]
    return {"model": inspection.label, "base": inspection.base, "modules": modules, "notes": list(inspection.notes)}


def inspection_panels(inspection: Inspection) -> list[Panel]:
    """One panel: a row for each matrix, a column for each rank k, and the share of |dW|^2 that rank k holds.

    None where there are only vectors.
    """
    if not inspection.changes:
        return []
    ranks = _ranks_drawn(max(len(change.spectrum.values_K) for change in inspection.changes))
    values = [[change.spectrum.share_held(rank) for rank in ranks] for change in inspection.changes]
    names = [change.name for change in inspection.changes]
    # Every second of many numbers that lie closely.
    labels = [str(rank) if len(ranks) < 17 or index % 2 == 0 else "" for index, rank in enumerate(ranks)]
    return [Panel(inspection.label, values, names, labels, cell=(22 if len(ranks) < 17 else 14, 14))]


def _low_rank_table(changes: Sequence[Change], *, with_base: bool) -> Table:
    columns = [("module", "left"), ("rank", "right"), ("largest", "right"), ("singular values", "left")]
    columns += [("effective rank", "right"), ("90%", "right")]
    with_weight = [("|dW|/|W|", "right"), ("amplification", "right"), ("by chance", "right")]
    columns += with_weight if with_base else [("|dW|", "right")]
    table = make_table("updates dW of the weights W", columns)
    for change in changes:
        spectrum = change.spectrum
        sizes = [change.relative_norm, change.amplification, change.chance] if with_base else [spectrum.norm]
        values = spectrum.values_K.tolist()
        table.add_row(
            change.name,
            str(change.rank),
            _number(values[0] if values else 0.0),
            sparkline(_thinned(values)),
            f"{spectrum.effective_rank:.1f}",
            str(spectrum.rank_holding(SHARES["90%"])),
            *map(_number, sizes),
        )
    return table


def _full_table(changes: Sequence[Change]) -> Table:
    columns = [("matrix", "left"), ("shape", "right"), ("|dW|/|W|", "right"), ("effective rank", "right")]
    columns += [(f"rank of {share}", "right") for share in SHARES]
    table = make_table("differences dW to the base's matrices W", columns)
    for change in changes:
        ranks = [str(change.spectrum.rank_holding(share)) for share in SHARES.values()]
        shape = f"{change.shape[0]:,} x {change.shape[1]:,}"
        effective = f"{change.spectrum.effective_rank:.1f}"
        table.add_row(change.name, shape, _number(change.relative_norm), effective, *ranks)
    return table


def _change_json(change: Change) -> dict[str, Any]:
    spectrum = change.spectrum
    return {
        "name": change.name,
        "shape": list(change.shape),
        "rank": change.rank,
        "norm": spectrum.norm,
        "relative_norm": change.relative_norm,
        "amplification": change.amplification,
        "amplification_by_chance": change.chance,
        "effective_rank": spectrum.effective_rank,
        "rank_holding": {name: spectrum.rank_holding(share) for name, share in SHARES.items()},
        "singular_values": spectrum.values_K.tolist(),
    }


def _ranks_drawn(most: int) -> list[int]:
    if most <= COLUMNS_DRAWN:
        return list(range(1, max(most, 1) + 1))
    powers = [2**exponent for exponent in range(most.bit_length()) if 2**exponent < most]
    return [*powers, most]


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `BARS_SHOWN` of the values, evenly spaced, the first and the last among them."""
    last, shown = len(values) - 1, BARS_SHOWN - 1
    return list(values) if last <= shown else [values[round(index * last / shown)] for index in range(BARS_SHOWN)]


# ------------------------------------------------------------------------------------------------ two adapters


def comparison_table(comparison: Comparison) -> Table:
    """A row for each layer: the similarity of the first few directions, of all, and what chance would give."""
    smallest = min((min(module.phi.shape) for module in comparison.modules), default=0)
    shown = [rank for rank in RANKS_SHOWN if rank < smallest]
    columns = [("module", "left"), ("ranks", "right"), *((f"phi({rank},{rank})", "right") for rank in shown)]
    columns += [("phi of all", "right"), ("by chance", "right")]
    table = make_table(f"shared directions of {comparison.labels[0]} (i) and {comparison.labels[1]} (j)", columns)
    for module in comparison.modules:
        ranks = " x ".join(map(str, module.phi.shape))
        if not module.phi.numel():
            table.add_row(module.name, ranks, *[NOTHING] * (len(shown) + 2))
            continue
        values = [float(module.phi[rank - 1, rank - 1]) for rank in shown] + [float(module.phi[-1, -1]), module.chance]
        table.add_row(module.name, ranks, *(f"{value:.3f}" for value in values))
    return table


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """`adapters`, `modules` and `notes`."""
    modules = [_similarity_json(module) for module in comparison.modules]
    return {"adapters": list(comparison.labels), "modules": modules, "notes": list(comparison.notes)}


def comparison_panels(comparison: Comparison) -> list[Panel]:
    """A panel for each layer in which both have directions: phi(i, j), as figure 3 of the LoRA paper."""
    panels = []
    for module in comparison.modules:
        if module.phi.numel():
            i, j = module.phi.shape
            # About as high as wide, as the paper's, also where the ranks are far apart.
            cell = max(MIN_CELL, PANEL_SIDE // j), max(MIN_CELL, PANEL_SIDE // i)
            panels.append(Panel(module.name, module.phi.tolist(), ends_labelled(i), ends_labelled(j), cell))
    return panels


def _similarity_json(module: ModuleSimilarity) -> dict[str, Any]:
    chance = module.chance if module.phi.numel() else None
    return {"name": module.name, "width": module.width, "similarity": module.phi.tolist(), "chance": chance}


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"
