"""What a smoke run found, as a table and as one line of JSON."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from ftkit.console import make_table
from ftkit.errors import FtkitError


@dataclass
class Check:
    """One thing that was tried."""

    name: str
    outcome: str = "passed"
    """passed | failed | refused (as it should be) | none (the recipe has no such thing)"""
    detail: str = ""
    seconds: float = 0.0


@dataclass
class SmokeReport:
    """The checks so far, in order, and figures for the JSON line."""

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def check(self, name: str) -> Iterator[Check]:
        """Time what is tried inside; an error there is the check's outcome, and goes on."""
        check, started = Check(name), time.perf_counter()
        self.checks.append(check)
        try:
            yield check
        except BaseException as error:
            check.outcome, check.detail = "failed", _in_a_line(error)
            raise
        finally:
            check.seconds = round(time.perf_counter() - started, 2)

    def table(self) -> Table:
        """A line for each check."""
        table = make_table("smoke", [("check", "left"), ("outcome", "left"), ("seconds", "right"), ("", "left")])
        for check in self.checks:
            table.add_row(check.name, check.outcome, f"{check.seconds:.1f}", check.detail)
        return table

    def line(self, error: BaseException | None = None) -> str:
        """One JSON object; of a failed run with the error and the exit code that tells its kind."""
        status: dict[str, Any] = {"status": "passed"}
        if error is not None:
            code = error.exit_code if isinstance(error, FtkitError) else None
            status = {"status": "failed", "exit_code": code, "error": _in_a_line(error)}
        status["seconds"] = round(time.perf_counter() - self._started, 1)
        return json.dumps(
            status | self.figures | {"checks": [vars(check) for check in self.checks]}, ensure_ascii=False
        )


def _in_a_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, FtkitError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
