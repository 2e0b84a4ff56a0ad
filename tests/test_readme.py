"""README.md against the command line: its verbs, and the options of each."""

import re
from pathlib import Path

import typer

from ftkit.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMON = {"--offline", "--trust-remote-code", "--overwrite"}
"""Described once for all verbs, above the first."""


def options() -> dict[str, set[str]]:
    """Verb -> its options, as the command line takes them."""
    group = typer.main.get_command(app)
    return {
        verb: {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
        for verb, command in group.commands.items()
    }


def sections() -> tuple[str, dict[str, str]]:
    """What stands above the first verb, and verb -> its section."""
    text = README.split("\n## The verbs\n")[1].split("\n## ")[0]
    intro, *parts = re.split(r"\n### `ftkit (\w+)", text)
    return intro, dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_verb_has_a_section() -> None:
    assert set(sections()[1]) == set(options())


def test_the_tables_list_every_option_and_no_other() -> None:
    intro, texts = sections()
    assert set(re.findall(r"`(--[\w-]+)`", intro)) == COMMON
    for verb, known in options().items():
        listed = re.findall(r"^\| `(--[\w-]+)", texts[verb], flags=re.MULTILINE)
        assert sorted(listed) == sorted(known - COMMON), verb


def test_common_options_belong_to_the_verbs_that_are_said_to_have_them() -> None:
    without = {"diff": COMMON, "schema": COMMON, "doctor": {"--trust-remote-code"}}
    for verb, known in options().items():
        assert (known & COMMON) >= COMMON - {"--overwrite"} - without.get(verb, set()), verb
        assert ("--overwrite" in known) == (verb in ("init", "train", "merge", "export", "inspect")), verb


def test_options_in_the_text_exist() -> None:
    """Those of the examples and of commands in the text."""
    commands = [line for line in README.splitlines() if re.match(r"^(\$ )?ftkit |.*`ftkit ", line)]
    mentioned = {option for line in commands for option in re.findall(r"--[a-z][\w-]+", line)}
    assert {"--format", "--suite", "--help", "--dry-run"} <= mentioned
    assert mentioned <= set().union(*options().values()) | {"--help"}
