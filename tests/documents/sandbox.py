"""A directory in which the names that documents use exist, with tiny models in the place of those of the hub.

An existing path wins over a hub id, so `HuggingFaceTB/SmolLM2-135M-Instruct` is a directory here. Recipes, launch files
and benchmarks are the project's own.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer

from ftkit.cli import app, run
from tests.documents.needs import DOCUMENTS, EVERYWHERE, LIMITS, PLACES, PROGRAMS, Needs
from tests.documents.reading import ROOT, Block, Command, commands
from tests.tiny_models import byte_fallback_tokenizer, save_tiny, tiny_model
from tests.tiny_runs import cli_environment, write_rows

LAYERS = 16
"""Documents inspect layer 14 of SmolLM2."""
MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llama", "HuggingFaceTB/SmolLM2-135M": "llama"}
MODELS |= dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Base", "Qwen/Qwen2.5-7B-Instruct"), "qwen3")
"""Hub id -> architecture of `tests/tiny_models.py`; the recipes' and those that documents name."""
GGUF = ("SmolLM2-135M-Instruct.Q4_1.gguf", "runs/models/SmolLM2-135M-Instruct.Q4_1.gguf")
"""What the quickstart fetches. Directories here: llama.cpp's converter knows no tokenizer of our tiny files."""
ROWS = ("my.jsonl", "data/mine.jsonl", "yahma/alpaca-cleaned/train.jsonl", "mhenrichsen/alpaca_2k_test/train.jsonl")
"""Data in alpaca's form."""


def not_run(command: Command, document: str) -> str | None:
    """Why a command is not run here; None if it is."""
    reasons = DOCUMENTS.get(document, Needs()).not_run | EVERYWHERE
    why = next((why for start, why in reasons.items() if command.text.startswith(start)), None)
    return why or PROGRAMS.get(command.words[0])


class Sandbox:
    """The directory, and what runs in it; it must be the working directory."""

    def __init__(self, directory: Path, document: str, read_output: Callable[[], tuple[str, str]]) -> None:
        """Make the names that exist for every document, and the files of this one.

        Args:
            read_output: returns what was written to standard output and standard error since it was called last.
        """
        self.directory = directory
        self.needs = DOCUMENTS.get(document, Needs())
        self.document = document
        self.read_output = read_output
        for name in ("recipes", "configs", "benchmarks"):
            shutil.copytree(ROOT / name, directory / name)
        for name, architecture in MODELS.items():
            if architecture == "llama":
                save_llama(directory / name)
            else:
                save_tiny(directory / name, architecture)
        for name in GGUF:
            save_llama(directory / name)
        for name in ROWS:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            # More than any recipe holds back.
            write_rows(directory / name, 520 if "/" in name else 120)
        for name in {Path(name).parts[0] for name in (*MODELS, *ROWS) if "/" in name and name[0] != "d"}:
            for place in PLACES:
                (directory / place / name).symlink_to(directory / name)
        for name, text in self.needs.files.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        """A file of the document."""
        (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_text(text, encoding="utf-8")

    def follow(self, blocks: Sequence[Block]) -> None:
        """Do what the document says, from top to bottom: write its files, run its commands and its Python."""
        self.prepare("")
        for block in blocks:
            if block.file is not None:
                self.write(block.file, block.text)
            elif block.language == "python":
                self.python(block)
            elif block.language != "yaml":
                for command in commands(block):
                    if not_run(command, self.document) is None:
                        self.prepare(command.text)
                        self.run(command)

    def prepare(self, text: str) -> None:
        """Run what has to come before the command `text`."""
        for start, before in self.needs.before.items():
            if start == text or (start and text.startswith(start)):
                for setup in before:
                    self.run(Command(f"{self.document}, before {start!r}", setup))

    def run(self, command: Command) -> None:
        """Run a command; it must end as the document says it does."""
        program, *arguments = command.words
        if program == "ftkit" and not command.for_a_shell and not command.variables:
            code = run(limited(arguments))
            out, err = self.read_output()
        else:
            code, out, err = self.process(self.shell(command, program, arguments), command.variables)
        said = f"{command.where}: {command.text}\nended with {code}\n{out[-3000:]}\n{err[-3000:]}"
        if not command.errors:
            assert code == 0, said
            return
        assert code not in (0, 1), said
        found = [words(line) for line in err.splitlines() if line.startswith("ftkit: error: ")]
        assert found == [words(line) for line in command.errors], said

    def shell(self, command: Command, program: str, arguments: Sequence[str]) -> list[str]:
        """What to start for a command that is not ftkit's alone."""
        if program == "ftkit":
            if not command.for_a_shell:
                return [sys.executable, "-m", "ftkit", *limited(arguments)]
            python = shlex.join([sys.executable, "-m", "ftkit"])
            return ["bash", "-c", f'ftkit() {{ {python} "$@"; }}\n{command.text}']
        if program == "make":
            # What it would do: that there is such a target, and which variables it reads.
            return ["make", "-C", str(ROOT), "--dry-run", *arguments]
        if program == "cp":
            return ["cp", *arguments]
        assert program == "python", f"{command.where}: say in tests/documents/needs.py why {program} is not run"
        return [sys.executable, *arguments]

    def python(self, block: Block) -> None:
        """Run a Python snippet."""
        if block.lines[0] not in self.needs.not_run:
            code, _, err = self.process([sys.executable, "-c", block.text])
            assert code == 0, f"{block.where}: {err[-3000:]}"

    def process(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Exit code, output and complaints of a process."""
        environment = cli_environment() | (variables or {})
        done = subprocess.run(
            arguments, cwd=self.directory, env=environment, text=True, capture_output=True, timeout=300
        )
        return done.returncode, done.stdout, done.stderr


def save_llama(directory: Path) -> None:
    """A tiny model in the place of SmolLM2: as many layers as documents name, and a tokenizer that llama.cpp knows."""
    tokenizer = byte_fallback_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    tiny_model("llama", num_hidden_layers=LAYERS, vocab_size=len(tokenizer), **ids).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def limited(arguments: Sequence[str]) -> list[str]:
    """The arguments of ftkit with what makes them quick, wherever the document does not say it itself."""
    verb, said = arguments[0], [re.split(r"[= ]", argument)[0] for argument in arguments]
    more = [limit for limit in LIMITS.get(verb, ()) if limit.split("=")[0] not in said]
    return [verb, *arguments[1:], *more]


def parse(command: Command) -> None:
    """Let the command line take the command apart, without running it: verb, options, and their values' types."""
    _, verb, *arguments = command.words
    group = typer.main.get_command(app)
    assert verb in group.commands, f"{command.where}: there is no verb {verb}"
    try:
        group.commands[verb].make_context(verb, [*arguments], resilient_parsing=False)
    except typer.TyperException as error:
        raise AssertionError(f"{command.where}: {command.text}: {error.format_message()}") from None


def check_options(command: Command) -> None:
    """That a command of the running text, which may have placeholders, names a verb and options of its own."""
    verbs = typer.main.get_command(app).commands
    verb, *rest = command.words[1:]
    if verb.startswith("-") or verb.isupper():
        return
    assert verb in verbs, f"{command.where}: there is no verb {verb}"
    known = {name for parameter in verbs[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
    for option in (word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)):
        assert option in known | {"--help"}, f"{command.where}: {verb} has no option {option}"


def words(message: str) -> list[str]:
    """What of an error is the same on every machine: neither numbers nor paths, nor what the document leaves out."""
    return [word for word in re.sub(r"[;:,()]", " ", message).split() if not re.search(r"[\d/~]|\.\.\.", word)]
