import io

import pytest

from ftkit.console import Console, human_bytes, human_count, human_seconds, make_table


def test_the_log_gets_what_the_terminal_shows_every_line_with_its_rank(tmp_path):
    stream = io.StringIO()
    console = Console(stream=stream)
    (tmp_path / "train.log").write_text("of the run before\n")
    console.line("before")
    console.open_log(tmp_path / "train.log", rank=1)
    # At once: a run that is killed while its weights load has these lines in its log.
    assert (tmp_path / "train.log").read_text() == "of the run before\n[rank 1] before\n"
    console.line("two\nlines [not markup]")
    table = make_table("title", [("a", "left"), ("b", "right")])
    table.add_row("x", "1")
    console.table(table)
    console.debug("log only")
    console.close_log()
    console.line("after")
    first, *lines = (tmp_path / "train.log").read_text().splitlines()
    assert first == "of the run before"
    assert lines[:3] == ["[rank 1] before", "[rank 1] two", "[rank 1] lines [not markup]"]
    assert lines[-1] == "[rank 1] log only"
    assert all(line.startswith("[rank 1] ") for line in lines)
    assert "log only" not in stream.getvalue()
    assert stream.getvalue().splitlines()[0] == "before"
    assert stream.getvalue().splitlines()[-1] == "after"


def test_what_is_in_the_data_does_not_steer_the_terminal():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.line("a\x1b[31mb\rc")
    console.styled([("d\x07\ne", "bold"), ("\x9bf\x7f", "")])
    assert stream.getvalue() == "a␛[31mb␍c\nd␇\ne�f␡\n"


def test_a_row_of_a_table_in_a_pipe_is_one_line():
    stream = io.StringIO()
    table = make_table("title", [("x" * 90, "left"), ("y" * 90, "right")])
    table.add_row("a", "b")
    Console(stream=stream).table(table)
    title, header, row = stream.getvalue().splitlines()
    assert title.strip() == "title"
    assert header.split() == ["x" * 90, "y" * 90]
    assert row.split() == ["a", "b"]


def test_a_quiet_console_still_logs(tmp_path):
    stream = io.StringIO()
    console = Console(quiet=True, stream=stream)
    console.debug("first")
    console.open_log(tmp_path / "train.log", rank=0)
    console.warning("mind")
    assert stream.getvalue() == ""
    assert (tmp_path / "train.log").read_text() == "[rank 0] first\n[rank 0] warning: mind\n"


def test_without_a_log_the_terminal_is_all(tmp_path):
    stream = io.StringIO()
    console = Console(stream=stream)
    console.line("one")
    console.close_log()
    console.close_log()
    console.line("two")
    assert stream.getvalue() == "one\ntwo\n"


def test_progress_says_nothing_without_a_terminal():
    stream = io.StringIO()
    with Console(stream=stream).progress("work", total=2) as bar:
        bar.update(1, "half")
        bar.show("more", 2, 2)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (human_bytes(512), "512 B"),
        (human_bytes(1536), "1.5 KiB"),
        (human_bytes(5 * 2**40), "5.0 TiB"),
        (human_count(134515008), "134,515,008"),
        (human_seconds(42.4), "42s"),
        (human_seconds(600), "10m"),
        (human_seconds(3725), "1h 02m"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected
