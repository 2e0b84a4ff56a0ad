"""Merging into multimodal checkpoints: what lies beside the weights, other layouts, and proofs of recurrent layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftkit.artifacts import updates as updating
from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import merge
from ftkit.artifacts.proof import MOST_BY_ROUNDING, Comparison, check_logits, nudge
from ftkit.commands.merge import merge as merge_command
from ftkit.errors import CheckFailedError
from ftkit.recipe.schema import LoraMethod
from ftkit.runs import Target
from tests.artifacts.adapters import Pair, open_base, tensors, write_lora
from tests.tiny_models import tiny_model
from tests.tiny_multimodal import multimodal_model, save_multimodal


def write_multimodal(directory: Path, kind: str, **options: Any) -> Pair:
    """Write `directory/base` under the names of the hub and `directory/adapter`."""
    base = open_base(save_multimodal(directory / "base", kind, **options))
    section = LoraMethod(type="lora", rank=4, alpha=6.0)
    write_lora(base, section, directory / "adapter")
    return Pair(base, directory / "adapter", section)


def adapter_only(pair: Pair) -> Target:
    """The adapter without a tokenizer of its own, as other tools write it."""
    return Target(str(pair.adapter), pair.base, pair.adapter, None, None, pair.base)


def test_a_processors_own_template_is_kept_where_no_other_speaks(tmp_path: Path) -> None:
    pair = write_multimodal(tmp_path, "gemma3")
    (pair.base_directory / "chat_template.json").write_text('{"chat_template": "old"}')
    merge([WeightedAdapter(pair.target)], tmp_path / "tuned", proof="none")
    assert not (tmp_path / "tuned" / "chat_template.json").exists()
    (pair.base_directory / "chat_template.jinja").unlink()
    merge([WeightedAdapter(adapter_only(pair))], tmp_path / "plain", proof="none")
    assert json.loads((tmp_path / "plain" / "chat_template.json").read_text()) == {"chat_template": "old"}


def test_the_parts_of_a_configuration_follow_another_precision_and_no_other(tmp_path: Path) -> None:
    pair = write_multimodal(tmp_path, "gemma3", dtype=torch.bfloat16)
    file = pair.base_directory / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["dtype"] = "float32"
    file.write_text(json.dumps(config))
    merge([WeightedAdapter(pair.target)], tmp_path / "kept", proof="none")
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == config
    merge([WeightedAdapter(pair.target)], tmp_path / "cast", dtype=torch.float32, proof="none")
    cast = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert {part["dtype"] for part in (cast, cast["text_config"], cast["vision_config"])} == {"float32"}
    assert {tensor.dtype for tensor in tensors(tmp_path / "cast").values()} == {torch.float32}


@pytest.mark.parametrize("proof", ["full", "modules"])
def test_files_with_the_running_models_own_names_are_merged_too(proof: str, tmp_path: Path) -> None:
    pair = write_multimodal(tmp_path, "gemma3")
    state = {name: parameter.detach().clone() for name, parameter in multimodal_model("gemma3").named_parameters()}
    save_file(state, pair.base_directory / "model.safetensors", {"format": "pt"})
    (pair.adapter / "ftkit.json").unlink()
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof=proof)
    assert report.tensors_changed == 14
    assert tensors(tmp_path / "merged").keys() == state.keys()


# --- rounding in recurrent layers


def compared(relative: float) -> Comparison:
    return Comparison(relative * 50.0, 50.0, 1.0)


def test_rounding_explains_what_it_makes_and_no_more() -> None:
    check_logits(compared(1e-5))
    check_logits(compared(3e-5), compared(2e-5))
    for comparison, rounding in ((3e-5, None), (3e-5, 1e-5), (2 * MOST_BY_ROUNDING, 1.0), (float("nan"), 1.0)):
        with pytest.raises(CheckFailedError, match="allowed are"):
            check_logits(compared(comparison), None if rounding is None else compared(rounding))


def test_a_nudge_is_one_step_of_float32_up_or_down() -> None:
    model, before = tiny_model(), dict(tiny_model().named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    nudge(model, [name])
    moved, own = model.get_parameter(name).detach(), before[name].detach()
    up, down = torch.nextafter(own, torch.tensor(torch.inf)), torch.nextafter(own, torch.tensor(-torch.inf))
    assert bool(((moved == up) | (moved == down)).all())
    assert 0.4 < float((moved == up).float().mean()) < 0.6
    assert all(torch.equal(p, before[other]) for other, p in model.named_parameters() if other != name)


def test_a_recurrent_model_is_held_against_its_own_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_multimodal(tmp_path, "qwen3_5")
    merge_command([str(pair.adapter)], output=tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    off, rounding = report["max_abs_logit_difference"], report["max_abs_rounding_difference"]
    assert off > 1e-5 * report["max_abs_logit"]
    assert off <= 2 * rounding
    assert f"moving each weight by a rounding step makes {rounding:.2e}" in " ".join(capsys.readouterr().out.split())

    # A hundredth too much is far more than rounding.
    call = updating.Update.__call__
    monkeypatch.setattr(updating.Update, "__call__", lambda self, weight: 1.01 * call(self, weight))
    with pytest.raises(CheckFailedError, match="the merged model's logits differ"):
        merge([WeightedAdapter(pair.target)], tmp_path / "wrong")


def test_where_nothing_is_off_rounding_is_not_asked(tmp_path: Path) -> None:
    pair = write_multimodal(tmp_path, "gemma3")
    assert merge([WeightedAdapter(pair.target)], tmp_path / "merged").max_abs_rounding_difference is None
    assert load_file(tmp_path / "merged" / "model.safetensors")
