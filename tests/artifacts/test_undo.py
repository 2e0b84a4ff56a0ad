"""Subtracting an adapter from a merged model, and putting another one in its place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import MergeReport, merge
from ftkit.artifacts.restored import measure
from ftkit.commands.merge import merge as merge_command
from ftkit.errors import CheckFailedError, UserError
from ftkit.models.load import fingerprint, load_weights
from ftkit.recipe.schema import LoraMethod
from ftkit.runs import Target
from tests.artifacts.adapters import Pair, logits, open_base, tensors, write_lora, write_pair, write_second
from tests.tiny_models import tiny_tokenizer


def on(target: Target, directory: Path, weight: float = 1.0) -> WeightedAdapter:
    """An adapter, with the model in `directory` as its base."""
    return WeightedAdapter(replace(target, model=open_base(directory)), weight)


def merge_and_undo(pair: Pair, directory: Path, **keywords: Any) -> MergeReport:
    """Write `merged` and `undone`; the report of the second."""
    merge([WeightedAdapter(pair.target)], directory / "merged", proof="none", **keywords)
    return merge([on(pair.target, directory / "merged", -1.0)], directory / "undone")


def make_exact(pair: Pair) -> None:
    """Give base and adapter few digits, so that sums in float32 do not round."""
    file = pair.base_directory / "model.safetensors"
    # + 0.0: there is no -0, which W + d - d turns into 0.
    state = {name: (tensor * 64).round() / 64 + 0.0 for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    file = pair.adapter / "adapter_model.safetensors"
    state = {name: (tensor * 64).round() / 64 for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    config = json.loads((pair.adapter / "adapter_config.json").read_text())
    (pair.adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    identity = json.loads((pair.adapter / "ftkit.json").read_text())
    identity["base_fingerprint"] = fingerprint(pair.base)
    (pair.adapter / "ftkit.json").write_text(json.dumps(identity))


def test_what_does_not_round_comes_back_bit_for_bit_with_its_fingerprint(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    make_exact(pair)
    report = merge_and_undo(pair, tmp_path)
    assert report.restored is not None
    assert report.restored.exact
    assert report.restored.distance is None
    assert report.fingerprint == report.restored.fingerprint == fingerprint(pair.base)
    assert report.contents.adapters == ()
    assert report.max_abs_logit_difference is not None
    changed = {n for n, t in tensors(tmp_path / "merged").items() if not torch.equal(t, tensors(tmp_path / "base")[n])}
    assert len(changed) == 14


def test_a_file_of_another_tool_comes_back_byte_for_byte(tmp_path: Path) -> None:
    """Its header is not the one that safetensors for Python would write."""
    pair = write_pair(tmp_path)
    file = pair.base_directory / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "made_by": "another tool"})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = dict(reversed(json.loads(content[8 : 8 + length]).items()))
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    weights = pair.adapter / "adapter_model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    (pair.adapter / "ftkit.json").unlink()
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_measured_against_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, dtype=dtype, max_shard_size="40KB")
    report = merge_and_undo(pair, tmp_path)
    restored = report.restored
    assert restored is not None
    assert not restored.exact
    assert restored.distance is not None
    base, undone = tensors(pair.base_directory), tensors(tmp_path / "undone")
    differing = sum(int((base[name] != undone[name]).sum()) for name in base)
    difference = max(float((base[name].double() - undone[name].double()).abs().max()) for name in base)
    assert restored.distance.elements == sum(tensor.numel() for tensor in base.values())
    assert 0 < restored.distance.differing == differing < restored.distance.elements / 2
    assert restored.distance.max_abs_difference == difference > 0
    assert restored.distance.max_ulps >= 1
    assert restored.distance.beyond_rounding == 0
    assert "rounding" in restored.reason
    written = json.loads((tmp_path / "undone" / "merge_report.json").read_text())
    assert written["restored"]["distance"]["differing"] == differing
    assert written["contents"]["bases"][0]["fingerprint"] == fingerprint(pair.base)


def test_steps_between_values_are_counted(tmp_path: Path) -> None:
    places = []
    one, tiny = torch.tensor(1.0), torch.finfo(torch.bfloat16).tiny * torch.finfo(torch.bfloat16).eps
    for name, values in {
        "base": [1.0, -1.0, 0.0, 4.0],
        "between": [1.0, -1.0, 0.0, 4.0],
        "left": [float(one + 3 * 2**-7), -1.0, -tiny, 4.0],
    }.items():
        places.append(tmp_path / name)
        places[-1].mkdir()
        state = {"w": torch.tensor(values, dtype=torch.bfloat16)}
        save_file(state, places[-1] / "model.safetensors", {"format": "pt"})
    distance = measure(*places)
    assert (distance.elements, distance.differing, distance.max_ulps) == (4, 2, 3)
    assert distance.max_abs_difference == 3 * 2**-7
    # 3 steps of 1/128 are more than two roundings; one step from zero is not.
    assert distance.beyond_rounding == 1


def test_a_base_that_was_cast_is_measured_in_the_precision_of_the_result(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    restored = merge_and_undo(pair, tmp_path, dtype=torch.bfloat16).restored
    assert restored is not None
    assert restored.distance is not None
    base, undone = tensors(pair.base_directory), tensors(tmp_path / "undone")
    assert restored.distance.differing == sum(int((base[n].bfloat16() != undone[n]).sum()) for n in base)
    assert restored.distance.beyond_rounding == 0


def test_without_the_base_there_is_the_fingerprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    pair.base_directory.rename(tmp_path / "elsewhere")
    merge_command([f"{pair.adapter}:-1"], base=str(tmp_path / "merged"), output=tmp_path / "undone", proof="none")
    shown = " ".join(capsys.readouterr().out.split())
    assert "restored not bit for bit" in shown
    assert "distance unknown" in shown
    report = json.loads((tmp_path / "undone" / "merge_report.json").read_text())
    assert report["restored"]["distance"] is None
    # Others' weights at that place are not the base's.
    write_pair(tmp_path / "other", seed=5).base_directory.rename(pair.base_directory)
    report = merge([on(pair.target, tmp_path / "merged", -1.0)], tmp_path / "again", proof="none")
    assert report.restored is not None
    assert report.restored.distance is None


def test_an_adapter_that_was_merged_at_another_scale_is_told_from_rounding(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    record = tmp_path / "merged" / "merge_report.json"
    config = pair.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 7}))
    with pytest.raises(UserError, match="does not contain"):
        merge([on(pair.target, tmp_path / "merged", -1.0)], tmp_path / "undone", proof="none")
    # The record is made to say that it was this one.
    report = json.loads(record.read_text())
    report["contents"]["adapters"][0]["fingerprint"] = WeightedAdapter(pair.target).fingerprint
    record.write_text(json.dumps(report))
    with pytest.raises(CheckFailedError, match="values are further off than rounding explains") as caught:
        merge([on(pair.target, tmp_path / "merged", -1.0)], tmp_path / "undone", proof="none")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "undone").exists()


def test_one_pass_puts_another_adapter_in_the_place_of_the_first(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    second = write_second(pair, tmp_path / "second", targets="all-linear")
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    switched = [on(pair.target, tmp_path / "merged", -1.0), on(second, tmp_path / "merged")]
    report = merge(switched, tmp_path / "switched")
    assert [(one.path, one.weight) for one in report.contents.adapters] == [(str(tmp_path / "second"), 1.0)]
    assert report.restored is None
    assert report.max_abs_logit_difference <= 1e-5 * report.max_abs_logit
    merge([WeightedAdapter(second)], tmp_path / "direct", proof="none")
    direct, through = tensors(tmp_path / "direct"), tensors(tmp_path / "switched")
    assert all((direct[name] - through[name]).abs().max() <= 1e-6 for name in direct)
    # Each tensor is rounded once, not once for each adapter.
    apart = merge([on(pair.target, tmp_path / "merged", -1.0)], tmp_path / "apart", proof="none")
    assert apart.restored is not None
    # And what was switched to can be undone in its turn.
    undone = merge([on(second, tmp_path / "switched", -1.0)], tmp_path / "undone", proof="none")
    assert undone.restored is not None
    assert undone.restored.reason == "2 merges rounded the weights before"


def test_parts_of_a_weighted_merge_can_be_taken_off(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    second = write_second(pair, tmp_path / "second")
    merge([WeightedAdapter(pair.target, 0.7), WeightedAdapter(second, 0.3)], tmp_path / "merged", proof="none")
    with pytest.raises(UserError, match=r"at weight 0\.7, less than is subtracted; subtract what .*adapter:-0\.7"):
        merge([on(pair.target, tmp_path / "merged", -1.0)], tmp_path / "less")
    report = merge([on(pair.target, tmp_path / "merged", -0.7)], tmp_path / "less", proof="none")
    assert [one.weight for one in report.contents.adapters] == [0.3]
    assert report.restored is None
    both = [on(pair.target, tmp_path / "merged", -0.7), on(second, tmp_path / "merged", -0.3)]
    restored = merge(both, tmp_path / "undone", proof="none").restored
    assert restored is not None
    assert restored.distance is not None
    assert restored.distance.beyond_rounding == 0


def test_what_a_model_does_not_contain_is_not_subtracted(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    second = write_second(pair, tmp_path / "second")
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    what = r"merged \(sha256:\w+\) does not contain .*/second \(sha256:\w+\): it is .*base \(sha256:\w+\) \+ .*/adapter"
    with pytest.raises(UserError, match=what) as caught:
        merge([on(second, tmp_path / "merged", -1.0)], tmp_path / "undone")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "undone").exists()
    # Adding it is another matter: both were trained on the same base.
    report = merge([on(second, tmp_path / "merged")], tmp_path / "sum", proof="none")
    assert [one.path for one in report.contents.adapters] == [str(pair.adapter), str(tmp_path / "second")]
    other = write_pair(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"other/adapter was trained on .*other/base .* the weights of .*merged"):
        merge([on(other.target, tmp_path / "merged")], tmp_path / "wrong")


def test_a_record_of_other_weights_is_none(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    file = tmp_path / "merged" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="adapter was trained on"):
        merge([on(pair.target, tmp_path / "merged", -1.0)], tmp_path / "undone")


def test_an_adapter_of_the_merged_model_itself_is_merged_and_undone(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    merged = open_base(tmp_path / "merged")
    write_lora(merged, LoraMethod(type="lora", rank=2, alpha=4.0), tmp_path / "later", seed=9)
    later = Target("later", merged, tmp_path / "later", tmp_path / "later", None, merged)
    merge([WeightedAdapter(later)], tmp_path / "both", proof="none")
    report = merge([on(later, tmp_path / "both", -1.0)], tmp_path / "one", proof="none")
    assert [one.path for one in report.contents.adapters] == [str(pair.adapter)]
    both = [on(later, tmp_path / "both", -1.0), on(pair.target, tmp_path / "both", -1.0)]
    restored = merge(both, tmp_path / "none", proof="none").restored
    assert restored is not None
    assert restored.base == str(pair.base_directory)


def test_a_dora_cannot_be_taken_off(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    write_lora(pair.base, LoraMethod(type="lora", rank=2, alpha=4.0, dora=True), tmp_path / "dora")
    dora = replace(pair.target, adapter=tmp_path / "dora")
    merge([WeightedAdapter(dora)], tmp_path / "merged", proof="none")
    merge([WeightedAdapter(pair.target)], tmp_path / "plain", proof="none")
    for place, weight in (("merged", -1.0), ("plain", 1.0)):
        with pytest.raises(UserError, match="is a DoRA: what it adds depends on the weights of the base"):
            merge([on(dora, tmp_path / place, weight)], tmp_path / "undone")


def test_modules_that_trained_in_full_are_switched_and_not_undone(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "mistral")
    targets = []
    for name, seed in (("old", 3), ("new", 4)):
        section = LoraMethod(type="lora", rank=2, alpha=4.0, modules_to_save=("lm_head",))
        write_lora(pair.base, section, tmp_path / name, seed=seed)
        targets.append(Target(name, pair.base, tmp_path / name, tmp_path / name, None, pair.base))
    merge([WeightedAdapter(targets[0])], tmp_path / "merged", proof="none")
    with pytest.raises(UserError, match=r"trained lm_head in full .* what it replaced is gone; use the base"):
        merge([on(targets[0], tmp_path / "merged", -1.0)], tmp_path / "undone")
    merge([on(targets[0], tmp_path / "merged", -1.0), on(targets[1], tmp_path / "merged")], tmp_path / "switched")
    tuned = load_file(tmp_path / "new" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(tensors(tmp_path / "switched")["lm_head.weight"], tuned)


def test_tokenizer_and_template_come_back_with_the_base(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    tiny_tokenizer("{{ 'tuned' }}<|im_end|>").save_pretrained(pair.adapter)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    template = "chat_template.jinja"
    assert "tuned" in (tmp_path / "merged" / template).read_text()
    merge([on(pair.target, tmp_path / "merged", -1.0)], tmp_path / "undone", proof="none")
    assert (tmp_path / "undone" / template).read_text() == (pair.base_directory / template).read_text()
    second = write_second(pair, tmp_path / "second")
    tiny_tokenizer("{{ 'second' }}<|im_end|>").save_pretrained(tmp_path / "second")
    merge([on(pair.target, tmp_path / "merged", -1.0), on(second, tmp_path / "merged")], tmp_path / "s", proof="none")
    assert "second" in (tmp_path / "s" / template).read_text()


def test_the_command_undoes_where_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    merge_command([str(pair.adapter)], output=tmp_path / "merged", proof="none")
    assert "the files are the sum bit for bit" in capsys.readouterr().out
    with pytest.raises(UserError, match="no place of its own; say where with --output"):
        merge_command([f"{pair.adapter}:-1"], base=str(tmp_path / "merged"))
    merge_command([f"{pair.adapter}:-1"], base=str(tmp_path / "merged"), output=tmp_path / "undone")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"adapters {pair.adapter} x -1" in shown
    assert "values differ, by" in shown
    assert "rounding: once when the adapter was merged, once when it was subtracted" in shown
    shutil.rmtree(tmp_path / "merged")
    make_exact(pair)
    base = load_weights(pair.base, dtype=torch.float32)
    base.save_pretrained(pair.base_directory)
    (pair.adapter / "ftkit.json").unlink()
    merge_command([str(pair.adapter)], output=tmp_path / "merged", proof="none")
    merge_command([f"{pair.adapter}:-1"], base=str(tmp_path / "merged"), output=tmp_path / "exact")
    assert "bit for bit (sha256:" in " ".join(capsys.readouterr().out.split())
    undone = load_weights(open_base(tmp_path / "exact"), dtype=torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(logits(undone), logits(base), strict=True))
