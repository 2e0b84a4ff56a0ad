"""`ftkit plan`: what it says of a run's memory, operations and time, and whether it fits."""

import json

import pytest

from ftkit.cli import run as ftkit
from ftkit.commands.plan import plan, read_bytes
from ftkit.commands.train import train
from ftkit.errors import UserError
from ftkit.recipe.load import load_recipe
from tests.tiny_runs import write_recipe

PROMISED = {"parameters", "trainable_parameters", "memory_bytes", "optimizer_steps", "tokens", "seconds", "disk_bytes"}
"""Keys that programs may count on; `fits` besides."""


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("ftkit.calibration.SECONDS", 0.0)


def planned(capsys, recipe, *overrides, **keys):
    capsys.readouterr()
    plan(recipe, list(overrides), json=True, **keys)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_programs_read(tmp_path, capsys):
    found = planned(capsys, write_recipe(tmp_path))
    assert set(found) >= PROMISED | {"fits"}
    memory = found["memory_bytes"]
    assert set(memory) == {"weights", "gradients", "optimizer", "activations", "logits", "allocator", "total"}
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert memory["activations"] > 0
    assert found["fits"] is True
    assert found["fits_with"] == []
    assert found["seconds"] > 0
    by_kind = {kind["name"]: kind for kind in found["kinds"]}
    assert sum(kind["parameters"] for kind in by_kind.values()) == found["parameters"]
    assert sum(kind["trainable"] for kind in by_kind.values()) == found["trainable_parameters"]
    assert by_kind["embeddings"]["trainable"] == by_kind["norms"]["trainable"] == 0
    # LoRA of rank 4 on four attention and three feed-forward layers of two blocks, width 32 and 64, half the key heads.
    assert by_kind["attention"]["trainable"] == 2 * 4 * (64 + 48 + 48 + 64)
    assert by_kind["feed-forward"]["trainable"] == 2 * 4 * 3 * 96


def test_operations_grow_with_the_run(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    short, long = (planned(capsys, recipe, f"training.max_steps={n}", "data.val_size=0") for n in (5, 10))
    assert long["flops"] / short["flops"] == pytest.approx(long["tokens"] / short["tokens"], rel=0.05)
    measured = planned(capsys, recipe, "training.max_steps=5", "training.eval_steps=1")
    assert measured["flops"] > 1.2 * short["flops"]


def test_it_says_what_would_fit(tmp_path, monkeypatch, capsys):
    recipe, kept = write_recipe(tmp_path, method="full", max_steps=2), "training.gradient_checkpointing=false"
    needed = planned(capsys, recipe, kept)["memory_bytes"]["total"]
    monkeypatch.setattr("ftkit.fit.free_memory", lambda device, processes: needed - 1)
    found = planned(capsys, recipe, kept)
    assert (found["fits"], found["available_bytes"]) == (False, needed - 1)
    assert found["fits_with"][:2] == ["training.max_tokens_per_device=auto", "training.gradient_checkpointing=auto"]
    for change in found["fits_with"][:2]:
        assert planned(capsys, recipe, kept, change)["fits"] is True
    plan(recipe, [kept])
    shown = " ".join(capsys.readouterr().out.split())
    assert " of this machine may be filled; it would with training.max_tokens_per_device=auto, or with " in shown


def test_another_machine(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    found = planned(capsys, recipe, "model.dtype=auto", memory="24GB")
    # A GPU of today: half precision for what is frozen.
    here = planned(capsys, recipe)
    assert found["memory_bytes"]["weights"] < here["memory_bytes"]["weights"]
    assert found["available_bytes"] == pytest.approx(0.95 * 24 * 10**9, abs=1)
    assert found["seconds"] is None
    assert planned(capsys, recipe, memory="0.4MiB", model_only=True)["fits"] is False
    assert "of such a GPU may be filled" in " ".join(_shown(capsys, recipe).split())


def _shown(capsys, recipe) -> str:
    plan(recipe, [], memory="24GB")
    return capsys.readouterr().out


def test_several_devices(tmp_path, capsys):
    recipe = write_recipe(tmp_path, method="full")
    alone = planned(capsys, recipe, "training.parallel=fsdp")["memory_bytes"]
    shared = planned(capsys, recipe, "training.parallel=fsdp", num_processes=2)["memory_bytes"]
    assert shared["optimizer"] * 2 == alone["optimizer"]


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("24", 24 * 2**30), ("1.5gb", 1_500_000_000)]
)
def test_sizes(text, size):
    assert read_bytes(text) == size


def test_what_is_no_size(tmp_path, capsys):
    with pytest.raises(UserError, match="is no size"):
        read_bytes("much")
    assert ftkit(["plan", str(write_recipe(tmp_path)), "--memory", "0GB"]) == 2
    assert "--memory: '0GB' is no size; write it like 24GB" in capsys.readouterr().err


def test_models_whose_step_cannot_be_traced_are_told(tmp_path, monkeypatch, capsys):
    """They train, and the plan says what it does not know."""
    recipe = write_recipe(tmp_path)

    def fails(*_, **__):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("ftkit.estimate.trace_step", fails)
    found = planned(capsys, recipe)
    assert (found["flops"], found["seconds"], found["memory_bytes"]["activations"]) == (None, None, 0)
    assert found["notes"][-1].startswith("activations are not in the memory: the step of llama cannot be traced")
    train(recipe, [])
    assert load_recipe(recipe).recipe.training.max_tokens_per_device == 256


def test_time_follows_the_operations(tmp_path, monkeypatch, capsys):
    """The measured speed, put in: a run of twice the operations takes twice the time."""
    monkeypatch.setattr("ftkit.calibration._measure", lambda *_: (1e9, 0.0))
    found = planned(capsys, write_recipe(tmp_path))
    assert found["seconds"] == found["flops"] / 1e9
