"""Every command in README.md and docs/*.md, run in a sandbox.

The commands of one document run one after another in one directory, as its reader would type them. What cannot run here
is named, with the reason, in documents/needs.py.
"""

import re
from pathlib import Path

import pytest
import yaml

from ftkit.data.phrasings import read_phrasings
from ftkit.evaluation.schema import SuiteSection
from ftkit.recipe.load import load_recipe
from tests.documents.needs import DOCUMENTS as NEEDS
from tests.documents.needs import EVERYWHERE
from tests.documents.reading import DOCUMENTS, ROOT, Block, commands, inline_commands, read_blocks
from tests.documents.sandbox import Sandbox, check_options, parse

BLOCKS = {name: read_blocks(path) for name, path in DOCUMENTS.items()}
WITH_COMMANDS = [name for name, blocks in BLOCKS.items() if any(commands(b) or b.language == "python" for b in blocks)]
YAML = [block for blocks in BLOCKS.values() for block in blocks if block.language == "yaml" and block.file is None]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_every_command_runs(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The processes of --num-processes.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Sandbox(tmp_path, name, lambda: tuple(capfd.readouterr())).follow(BLOCKS[name])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_option_exists(name: str) -> None:
    """Of commands that are not run, too."""
    found = [command for block in BLOCKS[name] for command in commands(block)]
    for command in found:
        if command.words[0] == "ftkit":
            parse(command)
    for command in inline_commands(DOCUMENTS[name]):
        check_options(command)


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.where)
def test_every_piece_of_yaml_is_one(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "block.yaml"
    values = yaml.safe_load(block.text)
    assert isinstance(values, dict), block.where
    if "tasks" in values:
        assert SuiteSection.model_validate(values).tasks
    elif "jobs" in values:
        assert commands(block), f"{block.where}: a workflow without a command of ours"
    elif all(isinstance(value, dict) and "phrasings" in value for value in values.values()):
        file.write_text(block.text)
        assert read_phrasings(file)
    else:
        whole = {"base_model": "org/model", "data": {}, "method": {"type": "lora"}} | values
        whole["data"] = {"train": [{"path": "rows.jsonl"}]} | (whole["data"] or {})
        file.write_text(yaml.safe_dump(whole))
        load_recipe(file)


def test_the_readme_lists_every_document() -> None:
    table = DOCUMENTS["README.md"].read_text(encoding="utf-8").split("\n## Documentation\n")[1].split("\n## ")[0]
    listed = re.findall(r"\]\((docs/[\w.]+)\)", table)
    assert sorted(listed) == sorted(f"docs/{name}" for name in DOCUMENTS if name != "README.md")


def test_what_is_not_run_is_still_there() -> None:
    """An exemption that no command needs any more would hide the next one."""
    assert set(NEEDS) <= set(DOCUMENTS)
    texts = {name: [c.text for block in blocks for c in commands(block)] for name, blocks in BLOCKS.items()}
    for name, needs in NEEDS.items():
        snippets = [block.lines[0] for block in BLOCKS[name] if block.language == "python"]
        for start in (*needs.not_run, *filter(None, needs.before)):
            assert any(text.startswith(start) for text in (*texts[name], *snippets)), f"{name}: {start}"
    for start in EVERYWHERE:
        assert any(text.startswith(start) for found in texts.values() for text in found), start
