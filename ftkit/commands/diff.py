"""`ftkit diff`: where two runs part."""

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.console import Console, make_table
from ftkit.errors import CheckFailedError, UserError

if TYPE_CHECKING:
    from ftkit.run_diff import Difference


def diff(run: Path, other: Path, *, tolerance: float = 0.0, ignore: Sequence[str] = (), json: bool = False) -> None:
    """Print in what two runs differ.

    Args:
        tolerance: how far losses of the same step may be apart; above 0 the weights are not compared.
        ignore: parts that are not compared.
        json: print one object instead.

    Raises:
        UserError: one is no run, or a part has no such name.
        CheckFailedError: they differ.
    """
    from ftkit.run_diff import PARTS, differences

    if unknown := [part for part in ignore if part not in PARTS]:
        raise UserError(f"--ignore {unknown[0]}: there is no such part", how=f"choose one of {', '.join(PARTS)}")
    compared = [part for part in PARTS if part not in ignore and not (part == "weights" and tolerance > 0)]
    found = [one for one in differences(run, other, tolerance=tolerance) if one.part in compared]
    parted = [part for part in compared if any(one.part == part for one in found)]
    if json:
        values = {part: [_plain(one) for one in found if one.part == part] for part in compared}
        sys.stdout.write(json_module.dumps(values) + "\n")
    else:
        _print(Console(), found, compared, (str(run), str(other)))
    if parted:
        raise CheckFailedError(f"{run} and {other} part in {', '.join(parted)}")


def _print(console: Console, found: "Sequence[Difference]", compared: Sequence[str], labels: tuple[str, str]) -> None:
    from ftkit.run_diff import has_weights

    table = make_table("", [("part", "left"), ("what", "left"), *((label, "left") for label in labels), ("", "left")])
    for part in compared:
        own = [one for one in found if one.part == part]
        for one in own:
            table.add_row(part, one.what, _shown(one.first), _shown(one.second), one.note)
        if not own:
            nothing = part == "weights" and not has_weights(Path(labels[0]))
            table.add_row(part, "neither run has a result" if nothing else "the same", "", "", "")
    console.table(table)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(difference: "Difference") -> dict[str, Any]:
    values = {"what": difference.what, "first": difference.first, "second": difference.second}
    return values | ({"note": difference.note} if difference.note else {})
