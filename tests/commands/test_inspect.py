"""`ftkit inspect`, from the command line: runs, adapters, models, what is refused, and what is written where."""

import json
import math
import re
import shutil
import socket
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ftkit.cli import run as ftkit
from ftkit.commands.train import train
from ftkit.recipe.schema import LoraMethod
from tests.artifacts.adapters import Pair, tensors, write_lora, write_pair
from tests.tiny_models import save_tiny
from tests.tiny_runs import write_recipe

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs on one base: LoRA of ranks 4 and 2 with one seed, of rank 4 with another, and a full one."""
    directory = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(directory, max_steps=2, eval_steps=2)
    train(recipe, [f"output_dir={directory / 'r4'}"])
    train(recipe, [f"output_dir={directory / 'r2'}", "method.rank=2"])
    train(recipe, [f"output_dir={directory / 'seed1'}", "seed=1"])
    train(write_recipe(directory, method="full", max_steps=2, eval_steps=2), [f"output_dir={directory / 'full'}"])
    return directory


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """An adapter of no run, and its base."""
    return write_pair(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `ftkit inspect ARGUMENTS` prints."""
    capsys.readouterr()
    assert ftkit(["inspect", *map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The object of `--json`, which is all that is printed."""
    content: dict[str, Any] = json.loads(shown(capsys, *arguments, "--json"))
    return content


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The only line of a command that the user got wrong."""
    capsys.readouterr()
    assert ftkit(["inspect", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line.removeprefix("ftkit: error: ")


# --- one adapter


def test_a_run_has_a_row_for_each_layer(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, runs / "r4").splitlines()
    assert lines[0] == "updates dW of the weights W"
    assert re.split(r"  +", lines[1].strip()) == [
        *(
            "module",
            "rank",
            "largest",
            "singular values",
            "effective rank",
            "90%",
            "|dW|/|W|",
            "amplification",
            "by chance",
        ),
    ]
    assert len(lines) == 2 + 14 + 1
    assert lines[2].startswith("model.layers.0.mlp.down_proj ")


def test_the_json_holds_what_the_files_say(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = found(capsys, runs / "r4")
    assert (content["model"], content["base"]) == (str(runs / "r4"), str(runs / "base-llama"))
    assert len(content["modules"]) == 14
    (module,) = [module for module in content["modules"] if module["name"] == QUERY]
    state = load_file(runs / "r4" / "adapter" / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{QUERY}.lora_{part}.weight"].double().numpy() for part in "AB")
    values = np.linalg.svd(2 * b @ a, compute_uv=False)[:4]
    np.testing.assert_allclose(module["singular_values"], values, rtol=1e-6)
    weight = tensors(runs / "base-llama")[f"{QUERY}.weight"].double()
    shares = values / values.sum()
    expected = {
        "shape": [32, 32],
        "rank": 4,
        "norm": pytest.approx(np.linalg.norm(values)),
        "relative_norm": pytest.approx(np.linalg.norm(values) / float(weight.norm())),
        "effective_rank": pytest.approx(math.exp(-(shares * np.log(shares)).sum())),
    }
    assert {key: module[key] for key in expected} == expected
    assert list(module["rank_holding"]) == ["50%", "90%", "99%"]
    assert module["amplification"] > 0
    assert module["amplification_by_chance"] == pytest.approx(module["relative_norm"] * 32 / 4)
    assert content["notes"] == []


@pytest.mark.parametrize("place", ["adapter", "checkpoints/step-00000002", "checkpoints/step-00000002/adapter"])
def test_an_adapter_is_found_wherever_it_lies(place: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = found(capsys, runs / "r4"), found(capsys, runs / "r4" / place)
    assert part["modules"] == whole["modules"]


def test_chosen_modules_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        m["name"] for m in found(capsys, runs / "r4", "--modules", "q_proj", "--modules", "1.mlp.up_proj")["modules"]
    ]
    assert names == [QUERY, "model.layers.1.mlp.up_proj", QUERY.replace("0", "1")]
    assert "did you mean q_proj?" in refused(capsys, runs / "r4", "--modules", "q_porj")


def test_a_base_that_is_gone_costs_what_needs_it(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    with_base = found(capsys, pair.adapter)
    moved = pair.base_directory.rename(pair.base_directory.with_name("moved"))
    text, content = shown(capsys, pair.adapter), found(capsys, pair.adapter)
    assert "amplification  " not in text
    assert "note: without the base there is no |dW|/|W| and no amplification (no such model: " in text
    assert content["base"] is None
    for before, after in zip(with_base["modules"], content["modules"], strict=True):
        assert after["singular_values"] == pytest.approx(before["singular_values"])
        assert (after["relative_norm"], after["amplification"]) == (None, None)
    assert found(capsys, pair.adapter, "--base", moved)["modules"] == with_base["modules"]


def test_another_base_is_refused_with_both_identities(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny(tmp_path / "other", seed=3)
    line = refused(capsys, pair.adapter, "--base", other)
    trained_on, here = re.findall(r"sha256:[0-9a-f]{64}", line)
    assert trained_on != here
    assert str(pair.adapter) in line
    assert str(other) in line


def test_weights_that_have_changed_since_are_no_base(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody named this base: what the adapter's files say by themselves is shown, and why there is no more."""
    save_tiny(pair.base_directory, seed=3)
    content = found(capsys, pair.adapter)
    assert content["base"] is None
    assert re.search(r"was trained on .*sha256.*, and the weights of .*sha256.* are others", content["notes"][0])


def test_a_dora_needs_its_base(tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("q_proj",), dora=True)
    write_lora(pair.base, section, tmp_path / "dora")
    (module, _) = found(capsys, tmp_path / "dora")["modules"]
    assert (module["rank"], len(module["singular_values"])) == (2, 32)
    shutil.rmtree(pair.base_directory)
    line = refused(capsys, tmp_path / "dora")
    assert line.endswith("depends on the weights of its base, which is not at hand; name it with --base")


# --- full training


def test_a_full_run_and_its_base(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, runs / "full").splitlines()
    assert lines[0] == "differences dW to the base's matrices W"
    columns = ["matrix", "shape", "|dW|/|W|", "effective rank", "rank of 50%", "rank of 90%", "rank of 99%"]
    assert re.split(r"  +", lines[1].strip()) == columns
    assert re.match(r"note: 5 vectors \(norms, biases\) moved by \d+\.\d\d% of their norm at most", lines[-1])
    content = found(capsys, runs / "full", "--modules", "q_proj")
    name = f"{QUERY}.weight"
    difference = (tensors(runs / "full" / "model")[name].double() - tensors(runs / "base-llama")[name].double()).numpy()
    values = np.linalg.svd(difference, compute_uv=False)
    held = np.cumsum(values**2) / (values**2).sum()
    (module, _) = content["modules"]
    assert (module["name"], module["rank"], module["amplification"]) == (QUERY, None, None)
    ranks = {f"{share}%": int(np.searchsorted(held, share / 100)) + 1 for share in (50, 90, 99)}
    assert module["rank_holding"] == ranks
    assert found(capsys, runs / "full", "--base", runs / "base-llama", "--modules", "q_proj") == content


def test_a_merged_model_has_the_spectrum_of_its_adapter(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to what rounding to float32 adds."""
    assert ftkit(["merge", str(runs / "r4"), "--proof", "none"]) == 0
    adapter, merged = found(capsys, runs / "r4"), found(capsys, runs / "r4" / "merged")
    spectra = {module["name"]: module["singular_values"] for module in merged["modules"]}
    for module in adapter["modules"]:
        assert spectra[module["name"]][:4] == pytest.approx(module["singular_values"], rel=1e-4)
    assert set(spectra) == {module["name"] for module in adapter["modules"]} | {"model.embed_tokens"}


def test_a_model_needs_a_base(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "full" / "model", tmp_path / "model")
    line = refused(capsys, tmp_path / "model")
    assert line == f"{tmp_path / 'model'} does not say what it was trained from; name that with --base"
    assert len(found(capsys, tmp_path / "model", "--base", runs / "base-llama")["modules"]) == 15
    other = save_tiny(tmp_path / "gpt2", "gpt2")
    assert "have no weights of one name and shape" in refused(capsys, tmp_path / "model", "--base", other)


def test_a_full_run_on_another_base_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny(tmp_path / "other", seed=3)
    line = refused(capsys, runs / "full", "--base", other)
    assert len(set(re.findall(r"sha256:[0-9a-f]{64}", line))) == 2


# --- two adapters


def test_two_runs_share_directions(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, runs / "r4", runs / "seed1").splitlines()
    assert lines[0] == f"shared directions of {runs / 'r4'} (i) and {runs / 'seed1'} (j)"
    assert re.split(r"  +", lines[1].strip()) == ["module", "ranks", "phi(1,1)", "phi(2,2)", "phi of all", "by chance"]
    assert len(lines) == 2 + 14 + 1
    content = found(capsys, runs / "r4", runs / "r2", "--modules", "q_proj")
    assert content["adapters"] == [str(runs / "r4"), str(runs / "r2")]
    (module, _) = content["modules"]
    states = [load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("r4", "r2")]
    vectors = [
        np.linalg.svd(state[f"base_model.model.{QUERY}.lora_A.weight"].double().numpy(), full_matrices=False)[2]
        for state in states
    ]
    for i in range(4):
        for j in range(2):
            overlap = np.linalg.norm(vectors[0][: i + 1] @ vectors[1][: j + 1].T) ** 2 / min(i + 1, j + 1)
            assert module["similarity"][i][j] == pytest.approx(overlap)
    assert (module["width"], module["chance"]) == (32, 4 / 32)


def test_one_seed_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their A began with the same rows, which is why they are alike; B began at zero."""
    same = "note: both runs have seed 42: their A began with the same random rows, and share directions for that\n"
    assert same in shown(capsys, runs / "r4", runs / "r2")
    assert "seed" not in shown(capsys, runs / "r4", runs / "r2", "--left").split("\n", 1)[1]
    assert "note" not in shown(capsys, runs / "r4", runs / "seed1")
    phi = [found(capsys, runs / "r4", runs / name)["modules"][0]["similarity"][-1][-1] for name in ("r2", "seed1")]
    assert phi[0] > 0.9 > phi[1]


# --- what is refused


def test_bottleneck_adapters_have_no_spectrum(tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, method="adapter", max_steps=1, eval_steps=1)
    train(recipe, [f"output_dir={tmp_path / 'bottleneck'}"])
    line = f"{tmp_path / 'bottleneck'} holds bottleneck adapters: they have a non-linearity, and change no weight; "
    line += "ftkit inspects LoRA and fully trained models"
    assert refused(capsys, tmp_path / "bottleneck") == line
    assert refused(capsys, runs / "r4", tmp_path / "bottleneck") == line


def test_adapters_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert f"{tmp_path} is an adapter of the kind IA3; " in refused(capsys, tmp_path)


def test_options_that_do_not_go_together(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r4, full, picture = runs / "r4", runs / "full", tmp_path / "x.png"
    refusals = {
        (r4, "--left"): "--left is about the comparison of two adapters; name both, or leave it out",
        (r4, r4, "--base", "b"): "two adapters are compared without their base; leave --base out",
        (r4, full): f"{full} has no adapter; two LoRA adapters are compared; inspect a model by itself",
        (r4, "--output", picture): f"{picture}: pictures are SVG files, which every browser shows; --output NAME.svg",
    }
    for arguments, line in refusals.items():
        assert refused(capsys, *arguments) == line
    (tmp_path / "x.svg").mkdir()
    assert "is a directory; name a file: --output NAME.svg" in refused(capsys, r4, "--output", tmp_path / "x.svg")
    assert "no such run or directory" in refused(capsys, runs / "r44")
    assert "no such run or directory" in refused(capsys, r4, runs / "r44")


# --- the picture


def labels(path: Path) -> list[str | None]:
    return [element.text for element in ElementTree.fromstring(path.read_text()).iter() if element.tag.endswith("text")]


def test_a_picture_of_one_model_and_of_two(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "one.svg"
    assert shown(capsys, runs / "r4", "--output", picture).endswith(f"written to {picture}\n")
    assert {QUERY, "rows: W; columns: k", "4"} <= set(labels(picture))
    two = tmp_path / "two.svg"
    shown(capsys, runs / "r4", runs / "seed1", "--modules", "q_proj", "--output", two)
    columns = f"rows: the first i of {runs / 'r4'}; columns: the first j of {runs / 'seed1'}"
    assert {QUERY, columns, "phi(i, j) of the right singular vectors of A"} <= set(labels(two))
    full = tmp_path / "full.svg"
    shown(capsys, runs / "full", "--output", full)
    assert {"model.embed_tokens", "31"} <= set(labels(full))


def test_a_picture_is_never_written_over_unasked(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "mine.svg"
    picture.write_text("mine")
    line = f"{picture} exists already; choose another --output, or --overwrite moves it aside"
    with monkeypatch.context() as patched:
        # Said before anything is computed.
        patched.setattr(torch.linalg, "svd", None)
        assert refused(capsys, runs / "r4", "--output", picture) == line
        assert refused(capsys, runs / "r4", runs / "r2", "--output", picture) == line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.svg"]
    assert picture.read_text() == "mine"
    shown(capsys, runs / "r4", "--output", picture, "--overwrite")
    assert (tmp_path / "mine.svg.old-1").read_text() == "mine"
    assert QUERY in labels(picture)


def test_json_and_a_picture_together(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys, runs / "r4", "--output", tmp_path / "x.svg") == found(capsys, runs / "r4")
    assert (tmp_path / "x.svg").is_file()


def test_an_adapter_that_has_not_trained(tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B is zero: nothing changed, which is told in figures and not in a picture of nothing."""
    train(write_recipe(tmp_path, max_steps=1, eval_steps=1, learning_rate=1e-30), [f"output_dir={tmp_path / 'new'}"])
    for module in found(capsys, tmp_path / "new", "--output", tmp_path / "x.svg")["modules"]:
        assert module["relative_norm"] < 1e-20
    state_file = tmp_path / "new" / "adapter" / "adapter_model.safetensors"
    state = {name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in load_file(state_file).items()}
    save_file(state, state_file, metadata={"format": "pt"})
    content = found(capsys, tmp_path / "new")
    for module in content["modules"]:
        assert (module["singular_values"], module["norm"], module["effective_rank"]) == ([], 0, 0)
        assert (module["relative_norm"], module["amplification"]) == (0, None)
        assert module["amplification_by_chance"] is None
        assert module["rank_holding"] == {"50%": 0, "90%": 0, "99%": 0}
    assert " 0.0 " in shown(capsys, tmp_path / "new")
    picture = tmp_path / "two.svg"
    text = shown(capsys, tmp_path / "new", runs / "r4", "--left", "--output", picture)
    assert text.endswith("note: there is nothing to draw\n")
    assert not picture.exists()


def test_vectors_alone(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have no spectrum, no row and no picture."""
    picture = tmp_path / "norms.svg"
    lines = shown(capsys, runs / "full", "--modules", "input_layernorm", "--output", picture).splitlines()
    assert re.match(r"note: 2 vectors \(norms, biases\) moved by .*%", lines[0])
    assert lines[1:] == ["note: there is nothing to draw"]
    assert not picture.exists()


# --- no network


def test_local_files_need_no_network(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    for arguments in (["r4"], ["full"], ["r4", "r2"]):
        shown(capsys, *(runs / name for name in arguments))
