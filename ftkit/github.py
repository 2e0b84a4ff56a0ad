"""What GitHub Actions reads of a job: annotations beside the lines of a commit, and Markdown for the job's summary.

https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ftkit.errors import Problem

_PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+)(?=:|$)")
"""The `file:line` that a problem's place begins with."""
_MESSAGE = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_PROPERTY = _MESSAGE | str.maketrans({":": "%3A", ",": "%2C"})
"""What stands for characters that have a meaning in a workflow command."""
_CELL = str.maketrans({"|": "\\|", "\r": " ", "\n": " ", "<": "&lt;"})


def in_actions() -> bool:
    """Whether this is a job of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotations(problems: Iterable[Problem]) -> list[str]:
    """A workflow command for each problem that shows it at its line; none outside of GitHub Actions."""
    return [_annotation(problem) for problem in problems] if in_actions() else []


def add_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Append a table to the summary of the job that this runs in, where it is one of GitHub Actions'."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not in_actions() or not path:
        return
    lines = [f"**{title.translate(_CELL)}**", ""] if title else []
    lines += [_row(headers), _row(["-"] * len(headers)), *map(_row, rows), "", ""]
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n".join(lines))
    except OSError:
        # What a job shows of itself is no reason for it to fail.
        return


def _annotation(problem: Problem) -> str:
    place = _PLACE.match(problem.where or "")
    properties = "title=ftkit"
    if place is not None and Path(place["file"]).is_file():
        properties = f"file={_in_workspace(place['file']).translate(_PROPERTY)},line={place['line']},{properties}"
    elif problem.where is not None and Path(problem.where.partition(": ")[0]).is_file():
        file = _in_workspace(problem.where.partition(": ")[0])
        properties = f"file={file.translate(_PROPERTY)},{properties}"
    return f"::error {properties}::{str(problem).translate(_MESSAGE)}"


def _in_workspace(file: str) -> str:
    """The path from the root of the repository, which is how GitHub knows files; elsewhere the whole one."""
    path, root = Path(file).resolve(), os.environ.get("GITHUB_WORKSPACE")
    if root and path.is_relative_to(Path(root).resolve()):
        return path.relative_to(Path(root).resolve()).as_posix()
    return str(path)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.translate(_CELL) for cell in cells)} |"
