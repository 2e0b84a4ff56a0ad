"""Whole runs with the forms of bottleneck adapters: they say where they are, learn, and go on in the same bits."""

import json

import pytest

from ftkit.commands.plan import plan
from ftkit.commands.train import train
from tests.tiny_models import save_tiny
from tests.tiny_runs import losses, result_hash, write_recipe

HOULSBY = "2 x after attention (self_attn.o_proj), 2 x after feed-forward (mlp)"
FORMS = {
    "houlsby": (["method.dropout=0.1"], HOULSBY),
    "pfeiffer": (["method.placement=[feed_forward]", "method.non_linearity=relu"], "2 x after feed-forward (mlp)"),
    "parallel": (
        ["method.bottleneck=null", "method.reduction_factor=4", "method.insertion=parallel", "method.dropout=0.1"],
        "2 x beside attention (self_attn), 2 x beside feed-forward (mlp)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_says_its_places_learns_and_goes_on_in_the_same_bits(form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (keys, places), run = FORMS[form], tmp_path / "runs" / "recipe-1"
    recipe = write_recipe(tmp_path, method="adapter", max_steps=12, eval_steps=6, global_batch_size=8)
    plan(recipe, keys)
    assert f"places     {places}\n" in capsys.readouterr().out
    train(recipe, keys)
    assert f"places     {places}\n" in capsys.readouterr().out
    values, before = losses(run), result_hash(run)
    assert sum(values[-3:]) < 0.95 * sum(values[:3])
    train(recipe, keys, checkpoint=run / "checkpoints" / "step-00000006")
    assert losses(run) == values
    assert result_hash(run) == before


def test_dropout_is_drawn_from_the_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, method="adapter", max_steps=3)
    for keys in (["method.dropout=0.5"], ["method.dropout=0.5"], []):
        train(recipe, keys)
    first, again, without = (losses(tmp_path / "runs" / f"recipe-{number}") for number in (1, 2, 3))
    assert first == again != without


@pytest.mark.parametrize("insertion", ["sequential", "parallel"])
def test_a_model_without_a_feed_forward_module(insertion, tmp_path, monkeypatch, capsys):
    """OPT, checkpointed and not."""
    monkeypatch.chdir(tmp_path)
    opt = {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
    save_tiny(tmp_path / "base-llama", **opt)
    recipe = write_recipe(tmp_path, method="adapter", max_steps=12, global_batch_size=8)
    train(recipe, [f"method.insertion={insertion}"])
    where = "2 x after feed-forward (fc2)" if insertion == "sequential" else "2 x beside feed-forward (fc1 to fc2)"
    assert where in capsys.readouterr().out
    train(recipe, [f"method.insertion={insertion}", "training.gradient_checkpointing=true"])
    plain, checkpointed = (losses(tmp_path / "runs" / f"recipe-{number}") for number in (1, 2))
    assert plain == checkpointed
    assert sum(plain[-3:]) < 0.95 * sum(plain[:3])


def test_machines_are_told_the_places(tmp_path, capsys):
    plan(write_recipe(tmp_path, method="adapter"), [], json=True)
    assert json.loads(capsys.readouterr().out)["places"] == HOULSBY.split(", ")
    plan(write_recipe(tmp_path), [])
    assert "places" not in capsys.readouterr().out
