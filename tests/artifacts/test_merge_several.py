"""Several adapters, each with a weight."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ftkit.artifacts import updates as updating
from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import merge
from ftkit.artifacts.updates import applied, load_adapter, sum_updates
from ftkit.commands.merge import merge as merge_command
from ftkit.errors import CheckFailedError, UserError
from ftkit.models.load import load_weights
from ftkit.recipe.schema import LoraMethod
from tests.artifacts.adapters import IDS, logits, tensors, updates, write_pair, write_second

SECOND = LoraMethod(type="lora", rank=2, alpha=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_tensor_is_the_sum_rounded_once(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, architecture, dtype=dtype)
    transposed = architecture == "gpt2"
    second = write_second(pair, tmp_path / "second", targets=("c_attn",) if transposed else ("q_proj", "o_proj"))
    report = merge([WeightedAdapter(pair.target, 0.7), WeightedAdapter(second, -0.3)], tmp_path / "merged")
    before, after = tensors(pair.base_directory), tensors(tmp_path / "merged")
    one = updates(pair.adapter, pair.section, transposed=transposed)
    two = updates(tmp_path / "second", SECOND, transposed=transposed)
    assert len(two) == (2 if transposed else 4)
    for name, weight in before.items():
        expected = weight
        if name in one:
            total = one[name] * 0.7 + two[name] * -0.3 if name in two else one[name] * 0.7
            expected = (weight.float() + total).to(dtype)
        assert torch.equal(after[name], expected), name
    assert report.tensors_changed == len(one)
    assert report.max_abs_logit_difference <= 1e-5 * report.max_abs_logit
    told = [(entry["path"], entry["weight"]) for entry in report.adapters]
    assert told == [(str(pair.adapter), 0.7), (str(tmp_path / "second"), -0.3)]
    assert report.adapters[0]["fingerprint"] != report.adapters[1]["fingerprint"]
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["adapters"] == list(report.adapters)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
def test_the_merged_model_computes_what_pefts_weighted_sum_computes(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    second = write_second(pair, tmp_path / "second", targets="all-linear")
    merge([WeightedAdapter(pair.target, 0.7), WeightedAdapter(second, 0.3)], tmp_path / "merged")
    model = PeftModel.from_pretrained(load_weights(pair.base, dtype=torch.float32), pair.adapter, adapter_name="a")
    model.load_adapter(tmp_path / "second", adapter_name="b")
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    merged = load_weights(replace(pair.base, path=tmp_path / "merged"), dtype=torch.float32)
    for ours, theirs in zip(logits(merged), logits(model), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_at_run_time_nothing_is_folded_and_nothing_stays(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    model = load_weights(pair.base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model, IDS)
    with applied(model, [load_adapter(WeightedAdapter(pair.target), pair.base)]):
        adapted = logits(model, IDS)
    for ours, theirs in zip(adapted, logits(pair.adapted()), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert all(torch.equal(one, two) for one, two in zip(logits(model, IDS), plain, strict=True))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_not_applied_shows_in_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folded model would agree on the wrong sum; run time has its own."""
    pair = write_pair(tmp_path)

    def without_weights(self: updating.Update, weight: torch.Tensor) -> torch.Tensor:
        return sum(part.delta(weight) for part in self.parts)

    monkeypatch.setattr(updating.Update, "__call__", without_weights)
    with pytest.raises(CheckFailedError, match="logits differ from the adapted model's by"):
        merge([WeightedAdapter(pair.target, 0.7)], tmp_path / "merged")


def test_an_update_that_depends_on_the_weight_sees_the_base(tmp_path: Path) -> None:
    """Not what earlier adapters made of it."""
    pair = write_pair(tmp_path)
    loaded = load_adapter(WeightedAdapter(pair.target, 2.0), pair.base)
    name, weight = "model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32)
    dependent = replace(loaded, deltas={name: lambda w: w + 1})
    first = loaded.deltas[name](weight) * 2
    assert torch.equal(sum_updates([loaded, dependent])[name](weight), first + weight * 4)


def test_adapters_of_two_bases_are_refused_with_both(tmp_path: Path) -> None:
    pair, other = write_pair(tmp_path), write_pair(tmp_path / "other", seed=5)
    both = [WeightedAdapter(pair.target), WeightedAdapter(other.target)]
    with pytest.raises(UserError, match=r"belongs to .*/base \(sha256:\w+\), and .* to .*/other/base \(sha256:\w+\)"):
        merge(both, tmp_path / "merged")
    # A copy of the base elsewhere is the same base.
    same = write_pair(tmp_path / "same")
    merge([WeightedAdapter(pair.target), WeightedAdapter(same.target)], tmp_path / "merged")
    # A base given for both is checked against each.
    with pytest.raises(UserError, match=r"other/adapter was trained on"):
        merge([both[0], WeightedAdapter(replace(other.target, model=pair.base))], tmp_path / "twice")


def test_the_tokenizer_is_the_first_adapters(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    second = write_second(pair, tmp_path / "second")
    (tmp_path / "second" / "chat_template.jinja").write_text("{{ 'second' }}")
    merge([WeightedAdapter(second, 0.5), WeightedAdapter(pair.target, 0.5)], tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ 'second' }}"


def test_the_command_tells_adapters_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path)
    write_second(pair, tmp_path / "second")
    texts = [f"{pair.adapter}:0.7", f"{tmp_path / 'second'}:-0.3"]
    with pytest.raises(UserError, match="several adapters have no run in common to write to; say where with --output"):
        merge_command(texts)
    merge_command(texts, output=tmp_path / "merged")
    assert f"adapters   {pair.adapter} x 0.7, {tmp_path / 'second'} x -0.3" in capsys.readouterr().out
    with pytest.raises(UserError, match="an adapter at weight 0 changes nothing"):
        merge_command([f"{pair.adapter}:0"])


def test_an_adapter_whose_file_is_another_has_another_fingerprint(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    before = WeightedAdapter(pair.target).fingerprint
    file = pair.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert WeightedAdapter(pair.target).fingerprint != before
