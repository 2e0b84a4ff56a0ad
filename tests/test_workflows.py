"""Workflows of GitHub Actions, our own and the users' example, and docs/ci.md: every ftkit command in them runs."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftkit.cli import run
from tests.tiny_models import save_tiny
from tests.tiny_runs import write_recipe, write_rows

ROOT = Path(__file__).parent.parent
OURS, EXAMPLE, DOCS = ROOT / ".github/workflows/ci.yml", ROOT / "configs/github_smoke.yml", ROOT / "docs/ci.md"


def workflow(path: Path) -> dict[str, Any]:
    """The workflow, with `on`, which YAML 1.1 takes for true, under its own name."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["on"] = values.pop(True)
    assert set(values) >= {"name", "on", "permissions", "jobs"}
    return values


def only_job(path: Path) -> dict[str, Any]:
    (job,) = workflow(path)["jobs"].values()
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    assert job["timeout-minutes"] <= 90
    return job


def commands(text: str) -> list[str]:
    """Lines that run ftkit, as a shell reads them: without prompt and comment."""
    lines = (line.strip().removeprefix("$ ") for line in text.splitlines())
    return [line for line in lines if line.startswith("ftkit ")]


def test_our_own_runs_what_ci_runs() -> None:
    job = only_job(OURS)
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert (ROOT / ".ci" / "run").is_file()
    # The Makefile reads it from the environment.
    assert "TORCH_INDEX ?=" in (ROOT / "Makefile").read_text()
    assert job["env"]["TORCH_INDEX"] == "https://download.pytorch.org/whl/cpu"
    assert workflow(OURS)["permissions"] == {"contents": "read"}


def test_the_example_needs_no_secret_and_keeps_what_it_fetches() -> None:
    text, job = EXAMPLE.read_text(encoding="utf-8"), only_job(EXAMPLE)
    assert "secrets." not in text
    installs = next(step["run"] for step in job["steps"] if step.get("name") == "Install").splitlines()
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in installs
    assert any(step["with"].get("cache") == "pip" for step in job["steps"] if "setup-python" in step.get("uses", ""))
    cache = next(step["with"] for step in job["steps"] if "actions/cache" in step.get("uses", ""))
    assert job["env"]["HF_HOME"].endswith(cache["path"])
    recipes = job["strategy"]["matrix"]["recipe"]
    assert len(recipes) >= 2
    assert all((ROOT / recipe).is_file() for recipe in recipes)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A repository with recipes of its own, entered; overrides that give ours a base and data without a hub."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    save_tiny(tmp_path / "tiny")
    rows = write_rows(tmp_path / "mine.jsonl")
    return [f"base_model={tmp_path / 'tiny'}", f"data.train.0.path={rows}"]


def test_every_command_of_the_example_runs(repository: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    job = only_job(EXAMPLE)
    found = [line for step in job["steps"] for line in commands(step.get("run", ""))]
    assert found == ["ftkit train ${{ matrix.recipe }} --smoke"]
    for recipe in job["strategy"]["matrix"]["recipe"]:
        for line in found:
            arguments = shlex.split(line.replace("${{ matrix.recipe }}", recipe))[1:]
            assert run([*arguments, *repository]) == 0, capsys.readouterr()
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "passed"


def test_every_command_of_the_docs_runs(repository: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(ftkit train [^`]*)`", DOCS.read_text(encoding="utf-8"))
    found = list(dict.fromkeys([*(line for block in blocks for line in commands(block)), *inline]))
    assert len(found) >= 3
    for line in found:
        arguments = shlex.split(re.sub(r"\bRECIPE\b", "recipe.yaml", line).replace("DIR", "tiny"))[1:]
        # What a command names itself stays: only the base and the data of our recipes are on the hub.
        own = {argument.partition("=")[0] for argument in arguments if "=" in argument}
        extra = [override for override in repository if override.partition("=")[0] not in own]
        code = 2 if "q_porj" in line else 0
        assert run([*arguments, *extra]) == code, (line, capsys.readouterr())
        output = capsys.readouterr()
        assert json.loads(output.out.splitlines()[-1])["status"] == ("passed" if code == 0 else "failed")
