"""What stands in a Markdown file: fenced blocks, the commands in them, and the commands in running text."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
"""Name of the file -> its path: the documents whose commands are run."""

SHELLS = ("", "bash", "sh", "shell", "console")
"""Languages of blocks that hold commands, if anything does."""
PROGRAMS = ("ftkit", "python", "python3", "make", "pip", "hf", "source", "cd", "cp", "export", "bash", "git", "docker")
PROGRAMS += ("torchrun", "accelerate", "sbatch", "srun", "vllm", "llama-server", "llama-cli", "ollama", "curl")
PROGRAMS += ("tensorboard", "wandb")
"""What a command begins with, in a block that has neither `$ ` nor a shell's name: others may be output."""
_OPERATORS = re.compile(r"""^(?:[^'"|<>;&$*`]|'[^']*'|"[^"$`]*")*[|<>;&$*`]""")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str
    line: int
    """Of its first line, in the document."""
    language: str
    file: str | None
    """The name after the language: what the block shows is a file, by which later commands find it."""
    lines: tuple[str, ...]

    @property
    def where(self) -> str:
        """As one can click it."""
        return f"{self.document}:{self.line}"

    @property
    def text(self) -> str:
        """The whole content."""
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Command:
    """A command as a document has it."""

    where: str
    text: str
    """On one line, without prompt and comment."""
    output: tuple[str, ...] = ()
    """What the document says it prints."""

    @property
    def for_a_shell(self) -> bool:
        """Whether it has pipes, redirections, patterns or the like outside quotes."""
        return _OPERATORS.match(self.text) is not None

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that it begins with."""
        pairs = (word.partition("=") for word in shlex.split(self.text))
        return {name: value for name, _, value in takewhile(lambda pair: pair[0].isupper() and pair[1], pairs)}

    @property
    def words(self) -> list[str]:
        """As the shell takes it apart, up to a pipe or redirection."""
        words = shlex.split(self.text)[len(self.variables) :]
        return [*takewhile(lambda word: word not in ("|", ">", ">>", "<", "&&", ";", "&"), words)]

    @property
    def errors(self) -> list[str]:
        """The errors among the output."""
        return [line for line in self.output if line.startswith("ftkit: error: ")]


def read_blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, in its order."""
    blocks, opened, lines = [], None, path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        language, _, file = lines[opened - 1][3:].strip().partition(" ")
        blocks.append(Block(path.name, opened + 1, language, file or None, tuple(lines[opened : number - 1])))
        opened = None
    assert opened is None, f"{path.name}:{opened}: a block without an end"
    return blocks


def commands(block: Block) -> list[Command]:
    """The commands of a block: lines after `$ ` where there are such, else those that begin with a program."""
    if block.language == "yaml":
        return [*_workflow_commands(block)]
    if block.language not in SHELLS or block.file is not None:
        return []
    prompted = any(line.startswith("$ ") for line in block.lines)
    found: list[Command] = []
    lines = iter(enumerate(block.lines, start=block.line))
    for number, line in lines:
        text = line.removeprefix("$ ") if prompted else line
        first = re.sub(r"^([A-Z_]+=\S* )*", "", line).split(" ")[0]
        # A block that says it is a shell's holds nothing else; what it calls is run, or has its reason in needs.py.
        begins = first in PROGRAMS or (block.language in ("bash", "sh", "shell") and first not in ("", "#"))
        begins = line.startswith("$ ") if prompted else begins
        if not begins:
            if found and prompted:
                found[-1] = Command(found[-1].where, found[-1].text, (*found[-1].output, line))
            continue
        text = _without_comment(text)
        while text.endswith("\\") or _is_open(text):
            text = text.removesuffix("\\").rstrip() + " " + next(lines)[1].strip()
        found.append(Command(f"{block.document}:{number}", text))
    return found


def inline_commands(path: Path) -> Iterator[Command]:
    """Commands in the running text, `ftkit ...` between backticks; not run, for most have placeholders."""
    text = re.sub(r"^```.*?^```$", lambda block: re.sub(r".", "", block[0]), path.read_text("utf-8"), flags=re.M | re.S)
    for match in re.finditer(r"`(ftkit [^`]+)`", text):
        number = text[: match.start()].count("\n") + 1
        yield Command(f"{path.name}:{number}", " ".join(match[1].replace("\\|", "|").split()))


def _workflow_commands(block: Block) -> Iterator[Command]:
    """The steps of a GitHub workflow."""
    values = yaml.safe_load(block.text)
    for job in values.get("jobs", {}).values() if isinstance(values, dict) else ():
        for step in job.get("steps", ()):
            for line in _joined(step.get("run", "").splitlines()):
                if line.split(" ")[0] in PROGRAMS:
                    yield Command(block.where, _without_comment(line))


def _joined(lines: Sequence[str]) -> list[str]:
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def _is_open(text: str) -> bool:
    """Whether a quoted argument goes on in the next line."""
    try:
        shlex.split(text)
    except ValueError:
        return True
    return False


def _without_comment(text: str) -> str:
    """A comment begins with a # that follows white space and stands outside quotes."""
    return re.sub(r"""^((?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*?)\s+#.*$""", r"\1", text).strip()
