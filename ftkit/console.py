"""What the terminal and train.log show: lines, tables, progress.

Everything a verb says goes to standard output through one `Console`; errors are printed by the command line, on
standard error. The same text goes to a run's train.log, every line prefixed with its rank; what was said before the
run had a directory is kept until the log opens, and comes first in it.
"""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ftkit.github import add_table

WIDTH_WITHOUT_TERMINAL = 1000
"""Columns in pipes and logs: tables are as wide as they need, and a program that reads them finds a row in one line."""
BARS = "▁▂▃▄▅▆▇█"
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters -> what stands for them: those in a data set must not steer the user's terminal."""


class Console:
    """The terminal of the main process, and the run's log of every process."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
        self._rich = RichConsole(file=stream, quiet=quiet, width=width, highlight=False, soft_wrap=True)
        self._log_stream = _LogStream()
        log_stream = cast(TextIO, self._log_stream)
        self._log = RichConsole(file=log_stream, width=WIDTH_WITHOUT_TERMINAL, highlight=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        """Whether a person is looking: progress bars only then."""
        return self._rich.is_terminal and not self._rich.quiet

    def line(self, text: str = "", *, style: str = "") -> None:
        """Print one line of plain text; square brackets are not markup, and control characters are made visible."""
        self._print(Text(text.translate(_PICTURES), style=style))

    @property
    def has_colors(self) -> bool:
        """Whether styles can be seen."""
        return self._rich.color_system is not None and not self._rich.no_color

    def styled(self, parts: Iterable[tuple[str, str]]) -> None:
        """Print (text, style) pairs one after another, line breaks inside them included."""
        self._print(Text.assemble(*((text.translate(_PICTURES), style) for text, style in parts)))

    def heading(self, text: str) -> None:
        """Print a line that opens a section."""
        self.line(text, style="bold")

    def warning(self, text: str) -> None:
        """Print what the user should know but what does not stop the run."""
        self.line(f"warning: {text}", style="yellow")

    def table(self, table: Table) -> None:
        """Print a rich table; in a job of GitHub's it goes to the job's summary too."""
        self._print(table)
        if not self._rich.quiet:
            cells = ([_plain(cell) for cell in column.cells] for column in table.columns)
            headers = [_plain(column.header) for column in table.columns]
            add_table(_plain(table.title or ""), headers, list(zip(*cells, strict=True)))

    def debug(self, text: str) -> None:
        """Write a line to train.log only."""
        self._log.print(Text(text))

    def open_log(self, path: Path, *, rank: int) -> None:
        """Append to `path` what was printed so far, and from here on everything; every line gets the rank's prefix."""
        self._log_stream.open(path, prefix=f"[rank {rank}] ")

    def close_log(self) -> None:
        """Stop writing to train.log; nothing is kept any more."""
        self._log_stream.close()

    @contextmanager
    def progress(self, description: str, *, total: int, completed: int = 0) -> Iterator["ProgressBar"]:
        """A bar at a terminal, nothing elsewhere; `lines` printed meanwhile appear above it."""
        if not self.is_terminal:
            yield ProgressBar(None, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Remaining(),
        )
        with _Bars(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task(description, total=total, completed=completed, status="", remaining="")
            yield ProgressBar(bar, int(task))

    def _print(self, renderable: Text | Table) -> None:
        self._rich.print(renderable)
        self._log.print(renderable)


def _plain(cell: object) -> str:
    """What a table's cell shows, without its style."""
    return cell.plain if isinstance(cell, Text) else str(cell)


class _Remaining(TimeRemainingColumn):
    """What the task says of the time that it needs yet; else rich's guess."""

    def render(self, task: Task) -> Text:
        said = task.fields["remaining"]
        return Text(said) if said else super().render(task)


class _Bars(Progress):
    """Bars, and lines of text below them: their words, and what is drawn."""

    drawn: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in (*(task.fields["status"] for task in self.tasks), *self.drawn):
            if line:
                yield Text(line, no_wrap=True, overflow="ellipsis")


class ProgressBar:
    """A handle on a running bar; does nothing where no terminal is."""

    def __init__(self, bar: _Bars | None, task: int | None) -> None:
        self._bar, self._task = bar, task

    def update(self, completed: int, status: str | None = None, *, remaining: str | None = None) -> None:
        """Show `completed` of the total, and a few words below it; what is None stays as it was."""
        if self._bar is not None and self._task is not None:
            words = {name: text for name, text in (("status", status), ("remaining", remaining)) if text is not None}
            self._bar.update(self._task, completed=completed, **words)  # type: ignore[arg-type]

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines below the bar."""
        if self._bar is not None:
            self._bar.drawn = lines

    def show(self, description: str, completed: int, total: int) -> None:
        """Show another task, and how far it is; cheap enough to be called for every row."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=description, completed=completed, total=total)  # type: ignore[arg-type]


class _LogStream(io.TextIOBase):
    """A file whose every line starts with a prefix; what is written before it is opened waits for it."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self._prefix = ""
        self._at_line_start = True

    def open(self, path: Path, *, prefix: str) -> None:
        assert self._file is None, "a console writes one log"
        self._file, self._prefix = path.open("a", encoding="utf-8"), prefix
        for text in self._waiting:
            self.write(text)
        self._waiting.clear()
        self.flush()

    def write(self, text: str) -> int:
        if self.closed:
            return len(text)
        if self._file is None:
            self._waiting.append(text)
            return len(text)
        for piece in text.splitlines(keepends=True):
            self._file.write(self._prefix + piece if self._at_line_start else piece)
            self._at_line_start = piece.endswith("\n")
        return len(text)

    def flush(self) -> None:
        # rich flushes after each print, so that a killed run keeps its log.
        if self._file is not None and not self.closed:
            self._file.flush()

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        super().close()
        self._waiting.clear()
        if self._file is not None:
            self._file.close()


def make_table(title: str, columns: list[tuple[str, str]]) -> Table:
    """A table with (header, "left" | "right") columns in the one style that ftkit uses."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header, justify in columns:
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def sparkline(heights: Sequence[float]) -> str:
    """A bar for each number, from 0 to the largest of them; nothing for 0."""
    top = max(heights, default=0.0)
    return "".join(BARS[min(len(BARS) - 1, int(height / top * len(BARS)))] if height else " " for height in heights)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_count(count: int) -> str:
    """134515008 -> "134,515,008"."""
    return f"{count:,}"


def human_share(share: float) -> str:
    """0.035 -> "3.50%", 0.000108 -> "0.0108%"."""
    return f"{100 * share:.2f}%" if share >= 0.01 or share == 0 else f"{100 * share:.3g}%"


def human_seconds(seconds: float) -> str:
    """3725 -> "1h 02m"."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    minutes, _ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m"
