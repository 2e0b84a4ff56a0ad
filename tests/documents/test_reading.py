"""What is found in a document, and that a document that is wrong is found out."""

from pathlib import Path

import pytest

from tests.documents import sandbox
from tests.documents.reading import Block, Command, commands, inline_commands, read_blocks
from tests.documents.sandbox import Sandbox, check_options, limited, parse


def block(text: str, language: str = "", file: str | None = None) -> Block:
    return Block("x.md", 10, language, file, tuple(text.splitlines()))


def test_what_follows_a_prompt_is_a_command_and_the_rest_its_output() -> None:
    found = commands(block("$ ftkit plan a.yaml   # count\nftkit: error: a.yaml: no\n  ftkit train b\n$ ftkit schema"))
    assert [(c.where, c.text) for c in found] == [("x.md:10", "ftkit plan a.yaml"), ("x.md:13", "ftkit schema")]
    assert found[0].output == ("ftkit: error: a.yaml: no", "  ftkit train b")
    assert found[0].errors == ["ftkit: error: a.yaml: no"]


def test_without_prompts_programs_begin_commands_which_may_go_on() -> None:
    text = "ftkit train a.yaml \\\n  seed=1\nftkit: error: no command\nmake test ARGS='-x\n  -q'\nloss 1.0"
    assert [c.text for c in commands(block(text))] == ["ftkit train a.yaml seed=1", "make test ARGS='-x -q'"]
    assert [c.text for c in commands(block("unknown --thing\n# a comment", "bash"))] == ["unknown --thing"]
    assert commands(block(text, "jsonl")) == commands(block(text, "", "a.txt")) == []


def test_a_command_is_taken_apart_as_by_a_shell() -> None:
    command = Command("x", "CUDA_VISIBLE_DEVICES=0,1 ftkit train a.yaml method='{type: full}' | head -3")
    assert command.variables == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert command.words == ["ftkit", "train", "a.yaml", "method={type: full}"]
    assert command.for_a_shell
    assert not Command("x", "ftkit init 'data/*.jsonl'").for_a_shell


def test_steps_of_a_workflow_are_commands() -> None:
    steps = "      - uses: x\n      - run: |\n          ftkit plan \\\n            a.yaml\n          echo\n"
    text = f"jobs:\n  a:\n    steps:\n{steps}"
    assert [c.words for c in commands(block(text, "yaml"))] == [["ftkit", "plan", "a.yaml"]]


def test_files_and_inline_commands(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("See `ftkit eval RUN\n--limit 2`.\n\n```json a.json\n{}\n```\n")
    (shown,) = read_blocks(tmp_path / "x.md")
    assert (shown.file, shown.text, shown.line) == ("a.json", "{}\n", 5)
    assert [c.text for c in inline_commands(tmp_path / "x.md")] == ["ftkit eval RUN --limit 2"]


@pytest.mark.parametrize("text", ["ftkit trian a.yaml", "ftkit train a.yaml --resme", "ftkit eval a --limit few"])
def test_a_misspelt_option_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        parse(Command("x.md:1", text))


def test_a_misspelt_option_in_the_text_is_found() -> None:
    check_options(Command("x", "ftkit merge RUN --proof none"))
    for text in ("ftkit mrege RUN", "ftkit merge RUN --prof none"):
        with pytest.raises(AssertionError):
            check_options(Command("x", text))


def test_limits_give_way_to_what_the_document_says() -> None:
    assert "training.max_steps=4" in limited(["train", "a.yaml"])
    assert "training.max_steps=4" not in limited(["train", "a.yaml", "training.max_steps=9"])
    assert limited(["eval", "a", "--limit", "5"]) == ["eval", "a", "--limit", "5"]


@pytest.fixture
def here(tmp_path, capfd, monkeypatch) -> Sandbox:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox, "LAYERS", 2)
    return Sandbox(tmp_path, "x.md", lambda: tuple(capfd.readouterr()))


def test_a_document_that_is_wrong_is_found_out(here: Sandbox) -> None:
    plan = "ftkit plan recipes/lora.yaml"
    wrong = f"{plan} training.lerning_rate=1"
    said = "ftkit: error: command line: training.lerning_rate: unknown key; did you mean learning_rate?"
    here.follow([block(f"$ {plan}\n$ {wrong}\n{said}")])
    for text in (wrong, f"$ {plan}\n{said}", f"$ {wrong}\n{said.replace('unknown', 'wrong')}"):
        with pytest.raises(AssertionError):
            here.follow([block(text)])
    with pytest.raises(AssertionError, match="why perl is not run"):
        here.follow([block("perl -e 1", "bash")])
    here.follow([block("import json", "python")])
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        here.follow([block("import jsno", "python")])
