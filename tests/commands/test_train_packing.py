"""What a run does where documents cannot share a row."""

import pytest

from ftkit.cli import run as ftkit
from ftkit.commands.train import train
from tests.tiny_runs import losses, write_recipe


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5"])
def test_models_that_leak_train_on_padded_batches(tmp_path, monkeypatch, architecture):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, architecture=architecture, max_steps=3)
    # A global batch at once, and each document alone: they are longer.
    for max_tokens in (256, 8):
        train(recipe, [f"training.max_tokens_per_device={max_tokens}"])
    at_once, alone = (losses(tmp_path / "runs" / f"recipe-{n}") for n in (1, 2))
    # float32: the order of additions differs, and the steps carry the difference on.
    assert at_once == pytest.approx(alone, abs=1e-4)
    log = (tmp_path / "runs" / "recipe-1" / "train.log").read_text()
    assert "packing    padded: packed documents are not kept apart (" in log
    assert "position_ids: a document's gradient reaches another one" in log


@pytest.mark.parametrize(
    ("architecture", "attention", "how"),
    [
        ("lfm2", "auto", "; packing: auto"),
        # Its mask is not told where documents begin; ftkit's attention is.
        ("opt", "sdpa", "; attn_implementation: auto, or packing: auto"),
    ],
)
def test_packing_that_is_required_and_cannot_be_had_is_one_line(
    tmp_path, monkeypatch, capsys, architecture, attention, how
):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, architecture=architecture)
    assert ftkit(["train", str(recipe), "data.packing=required", f"model.attn_implementation={attention}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ftkit: error: command line: data.packing: packing is required but ")
    assert error.endswith(f"{how}\n")
    assert error.count("\n") == 1


def test_packing_that_is_required_and_proven_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, architecture="opt")
    train(recipe, ["data.packing=required"])
    assert "packing    packed, kept apart by document bounds" in (tmp_path / "runs/recipe-1/train.log").read_text()
