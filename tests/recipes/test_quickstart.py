"""The quickstart as a user runs it, on the real model; needs PyPI for the model and about ten minutes a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "recipes" / "quickstart"
TOKENS_TRAINED, TOKENS_GENERATED = 60_000, 20_000
"""What training with its evaluations, and the evaluation at the end, may take."""


def quickstart(directory: Path, models: Path, *overrides: str) -> dict:
    """Run quickstart.sh; returns what `ftkit eval` wrote."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "QUICKSTART_DIR": str(directory),
        "QUICKSTART_MODELS": str(models),
    }
    result = subprocess.run(
        ["bash", HERE / "quickstart.sh", *overrides], env=environment, capture_output=True, text=True, timeout=3600
    )
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "quickstart" / "eval.json").read_text())


def exact_match(report: dict) -> tuple[float, float]:
    """(before, after)"""
    (pair,) = [pair for pair in report["comparisons"] if pair["metric"] == "exact_match"]
    return pair["base"], pair["tuned"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
def test_the_quickstart_teaches_its_task_within_its_budget(tmp_path, models):
    report = quickstart(tmp_path, models)
    before, after = exact_match(report)
    assert before < 0.2
    assert after > 0.8
    log = (tmp_path / "quickstart" / "train.log").read_text()
    ran = re.search(r"ran ([\d,]+) tokens in training and ([\d,]+) in evaluation", log)
    assert sum(int(number.replace(",", "")) for number in ran.groups()) <= TOKENS_TRAINED
    assert report["usage"]["tokens_generated"] <= TOKENS_GENERATED


@pytest.mark.slow
def test_with_shuffled_labels_there_is_nothing_to_learn(tmp_path, models):
    shuffled = tmp_path / "shuffled"
    subprocess.run(
        [sys.executable, HERE / "generate.py", "--shuffle-labels", "--output", shuffled], check=True, timeout=60
    )
    report = quickstart(tmp_path, models, f"data.train.0.path={shuffled / 'train.jsonl'}")
    assert exact_match(report)[1] < 0.2
