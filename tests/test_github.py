"""What GitHub Actions is told: annotations, and tables of the job's summary."""

import pytest

from ftkit.cli import run
from ftkit.console import Console, make_table
from ftkit.errors import Problem
from ftkit.github import annotations


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A repository with a recipe, in a job of GitHub Actions."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "my,recipe.yaml").write_text("base_model: a\nmethod: {type: lora}\nlerning_rate: 1\n")
    monkeypatch.chdir(tmp_path / "recipes")
    return tmp_path


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (
            Problem("50% gone,\ntwice", "mend it", "my,recipe.yaml:12: training.lr"),
            "::error file=recipes/my%2Crecipe.yaml,line=12,title=ftkit"
            "::my,recipe.yaml:12: training.lr: 50%25 gone, twice; mend it",
        ),
        (Problem("bad row", where="my,recipe.yaml:3"), "::error file=recipes/my%2Crecipe.yaml,line=3,title=ftkit::"),
        (Problem("is empty", where="my,recipe.yaml"), "::error file=recipes/my%2Crecipe.yaml,title=ftkit::"),
        (Problem("wrong", where="my,recipe.yaml: row 7"), "::error file=recipes/my%2Crecipe.yaml,title=ftkit::"),
        (Problem("wrong", where="command line: method.rank"), "::error title=ftkit::command line: method.rank: wrong"),
        (Problem("wrong", where="org/data row 7"), "::error title=ftkit::org/data row 7: wrong"),
        (Problem("no place"), "::error title=ftkit::no place"),
        (Problem("x", where="/etc/hostname:2"), "::error file=/etc/hostname,line=2,title=ftkit::"),
    ],
)
def test_a_problem_is_shown_at_its_line(problem, line, job):
    (found,) = annotations([problem])
    assert found.startswith(line)
    assert "\n" not in found


def test_every_verb_annotates_what_it_fails_with(job, capsys, monkeypatch):
    arguments = ["plan", "my,recipe.yaml"]
    assert run(arguments) == 2
    output = capsys.readouterr()
    # On stdout a caller may expect JSON alone.
    assert output.out == ""
    errors = [line.removeprefix("ftkit: error: ") for line in output.err.splitlines()[:2]]
    lines = output.err.splitlines()[2:]
    assert [line.split("::")[-1] for line in lines] == errors
    assert lines[-1].startswith("::error file=recipes/my%2Crecipe.yaml,line=3,title=ftkit::my,recipe.yaml:3: lerning_")
    monkeypatch.setenv("GITHUB_ACTIONS", "false")
    assert run(arguments) == 2
    plain = capsys.readouterr()
    assert plain.out == ""
    assert plain.err.splitlines() == output.err.splitlines()[:2]


def test_tables_go_to_the_summary(job, capsys, monkeypatch):
    table = make_table("mix|ture", [("data set", "left"), ("rows", "right")])
    table.add_row("a|b\n<c>", "1,000")
    Console().table(table)
    Console(quiet=True).table(table)
    Console().table(make_table("", [("x", "left")]))
    expected = "**mix\\|ture**\n\n| data set | rows |\n| - | - |\n| a\\|b &lt;c> | 1,000 |\n\n| x |\n| - |\n\n"
    assert (job / "summary.md").read_text() == expected
    # A summary that cannot be written to is no reason to fail.
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(job / "missing" / "summary.md"))
    Console().table(table)
    monkeypatch.delenv("GITHUB_ACTIONS")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(job / "summary.md"))
    Console().table(table)
    assert (job / "summary.md").read_text() == expected
