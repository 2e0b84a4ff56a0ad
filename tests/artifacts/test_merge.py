import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftkit.artifacts import merge as merging
from ftkit.artifacts.adapters import WeightedAdapter, parse_adapter
from ftkit.artifacts.layout import Layout
from ftkit.artifacts.merge import merge
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods import adapter as bottleneck
from ftkit.methods import lora
from ftkit.methods.files import BaseIdentity
from ftkit.models.load import BaseModel, fingerprint, load_weights
from ftkit.recipe.schema import AdapterMethod
from tests.artifacts.adapters import IDS, logits, open_base, tensors, updates, whole_model, write_pair
from tests.tiny_models import CONFIGS

# --- what is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_tensor_is_the_cast_sum_or_untouched(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, architecture, dtype=dtype)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    before, after = tensors(pair.base_directory), tensors(tmp_path / "merged")
    added = updates(pair.adapter, pair.section, transposed=architecture == "gpt2")
    assert len(added) == report.tensors_changed == (8 if architecture == "gpt2" else 14)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        expected = (weight.float() + added[name]).to(dtype) if name in added else weight
        assert after[name].dtype == dtype
        assert torch.equal(after[name], expected), name
        assert torch.equal(after[name], weight) == (name not in added), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_merged_directory_computes_what_peft_computes(architecture: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, architecture)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.float32
    merged, adapted = logits(model), logits(pair.adapted())
    with_peft = logits(PeftModel.from_pretrained(load_weights(pair.base, dtype=torch.float32), pair.adapter))
    base = logits(load_weights(pair.base, dtype=torch.float32))
    for row in range(len(IDS)):
        bound = 1e-5 * adapted[row].abs().max()
        assert (merged[row] - adapted[row]).abs().max() <= bound
        assert (merged[row] - with_peft[row]).abs().max() <= bound
        assert (merged[row] - base[row]).abs().max() > 1000 * bound
    assert report.max_abs_logit_difference <= 1e-5 * report.max_abs_logit
    assert report.top1_agreement == 1.0


def test_shards_keep_their_names_and_index(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, max_shard_size="40KB", dtype=torch.bfloat16)
    one = write_pair(tmp_path / "one", dtype=torch.bfloat16)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    merge([WeightedAdapter(one.target)], tmp_path / "one" / "merged")
    files = sorted(path.name for path in pair.base_directory.glob("*.safetensors*"))
    assert len(files) > 2
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors*")) == files
    index = "model.safetensors.index.json"
    before, after = (json.loads((where / index).read_text()) for where in (pair.base_directory, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    sharded, single = tensors(tmp_path / "merged"), tensors(tmp_path / "one" / "merged")
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


def test_another_precision_on_request(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.cast.dtype == "bfloat16"


def test_files_that_leave_the_models_prefix_out(tmp_path: Path) -> None:
    """As openai-community/gpt2 does."""
    pair = write_pair(tmp_path, "gpt2")
    file = pair.base_directory / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    (pair.adapter / "ftkit.json").unlink()
    base = open_base(pair.base_directory)
    merge([WeightedAdapter(replace(pair.target, model=base))], tmp_path / "merged")
    assert "h.0.attn.c_attn.weight" in tensors(tmp_path / "merged")


def test_tied_embeddings_stay_tied_and_untouched(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "llama")
    merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert "lm_head.weight" not in tensors(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- the directory


def test_tokenizer_template_and_generation_config_come_from_the_adapter(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(pair.adapter)
    tokenizer.chat_template += "{# tuned #}"
    tokenizer.save_pretrained(pair.adapter)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == tokenizer.chat_template
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config == {"bos_token_id": 256, "eos_token_id": [258], "pad_token_id": 259}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_files_have_the_permissions_that_the_umask_says(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in [tmp_path / "plain", *(tmp_path / "merged").iterdir()]}
    assert len(modes) == 1


def test_an_adapter_of_another_tool_brings_neither(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    for path in list(pair.adapter.iterdir()):
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink()
    base_config = pair.base_directory / "generation_config.json"
    base_config.write_text(json.dumps({"eos_token_id": 256, "temperature": 0.6}))
    merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    # The template's end of turn is added to the base's own end of text.
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config == {"eos_token_id": [258, 256], "temperature": 0.6}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_generation_stops_at_the_trained_end_of_turn(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, tie_word_embeddings=False)
    # The base's own generation config knows another end, and its head is bent to say <|im_end|> (258) at once.
    prompt = torch.tensor([IDS[0]])
    hidden = pair.adapted().model(prompt).last_hidden_state[0, -1].detach()
    file = pair.base_directory / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"][258] = 100 * hidden / hidden.norm()
    save_file(state, file, {"format": "pt"})
    (pair.base_directory / "generation_config.json").write_text('{"eos_token_id": 256}')
    (pair.adapter / "ftkit.json").unlink()
    merge([WeightedAdapter(replace(pair.target, model=open_base(pair.base_directory)))], tmp_path / "merged")

    def generated(directory: Path) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(directory)
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        return ids[0, prompt.shape[1] :].tolist()

    assert generated(tmp_path / "merged") == [258]
    (tmp_path / "merged" / "generation_config.json").write_text('{"eos_token_id": 256}')
    assert len(generated(tmp_path / "merged")) == 6


def test_an_output_that_exists_is_kept_or_moved_aside(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("mine")
    with pytest.raises(UserError, match="merged exists already; choose another --output"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["precious"]
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged.old-1" / "precious").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged", "merged.old-1"]


# --- the report


def test_the_report_is_written_beside_the_model(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged", prompts=IDS)
    written = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert {
        "max_abs_logit_difference",
        "max_abs_logit",
        "top1_agreement",
        "cast",
        "tensors_changed",
        "base_fingerprint",
        "adapters",
    } <= set(written)
    cast = written["cast"]
    assert cast.pop("dtype") == "bfloat16"
    assert set(cast) == {
        "max_abs_logit_difference",
        "top1_agreement",
        "base_max_abs_logit_difference",
        "base_top1_agreement",
    }
    # bfloat16 costs much more than a merge may, and about as much as it costs the base.
    assert cast["max_abs_logit_difference"] > 100 * written["max_abs_logit_difference"]
    assert 0.2 < cast["max_abs_logit_difference"] / cast["base_max_abs_logit_difference"] < 5
    assert written["base_fingerprint"] == report.base_fingerprint
    assert written["adapters"][0]["path"] == str(pair.adapter)
    merged = BaseModel("merged", path=tmp_path / "merged")
    assert written["fingerprint"] == report.fingerprint == fingerprint(merged) != report.base_fingerprint
    assert (written["proof"], written["modules"], written["restored"]) == ("full", None, None)


def test_a_float32_base_loses_nothing_in_the_cast(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert report.cast.max_abs_logit_difference == report.max_abs_logit_difference
    assert report.cast.base_max_abs_logit_difference == 0.0


# --- the proof finds what is wrong


def alter_untouched(name: str, tensor: Tensor) -> Tensor:
    return tensor + 1e-7 if name == "model.norm.weight" else tensor


def alter_merged(name: str, tensor: Tensor) -> Tensor:
    return tensor.nextafter(tensor + 1) if name == "model.layers.1.mlp.up_proj.weight" else tensor


def leave_out_one(name: str, tensor: Tensor) -> Tensor | None:
    return None if name == "model.layers.0.self_attn.q_proj.weight" else tensor


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (alter_untouched, r"model\.norm\.weight was altered"),
        (alter_merged, r"model\.layers\.1\.mlp\.up_proj\.weight is not cast\(W \+ s BA\)"),
        (leave_out_one, "the tensors of model.safetensors are not those of the base"),
    ],
)
def test_a_file_that_is_wrong_in_one_tensor_is_rejected(
    alter: Callable[[str, Tensor], Tensor | None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path)

    rewrite = merging.rewrite

    def rewrite_and_alter(source: Path, target: Path, *arguments: Any, **keywords: Any) -> None:
        rewrite(source, target, *arguments, **keywords)
        file = target / "model.safetensors"
        altered = {name: alter(name, tensor) for name, tensor in load_file(file).items()}
        save_file({name: tensor for name, tensor in altered.items() if tensor is not None}, file, {"format": "pt"})

    monkeypatch.setattr(merging, "rewrite", rewrite_and_alter)
    with pytest.raises(CheckFailedError, match=message) as caught:
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert caught.value.exit_code == 6
    assert "kept as" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged.rejected"]


def test_rounding_twice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    rewrite = merging.rewrite

    def rounding_twice(source: Path, target: Path, deltas: dict[str, Any], **keywords: Any) -> None:
        rewrite(source, target, {n: lambda w, d=d: d(w).bfloat16().float() for n, d in deltas.items()}, **keywords)

    monkeypatch.setattr(merging, "rewrite", rounding_twice)
    with pytest.raises(CheckFailedError, match="is not cast"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")


def test_a_wrong_scale_shows_in_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)
    deltas = lora.deltas

    def scaled(*arguments: Any) -> Any:
        for name, delta in deltas(*arguments):
            yield name, lambda weight, delta=delta: delta(weight) * 1.01

    monkeypatch.setattr(lora, "deltas", scaled)
    with pytest.raises(CheckFailedError, match="logits differ from the adapted model's by"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert (tmp_path / "merged.rejected" / "merge_report.json").is_file()
    assert not (tmp_path / "merged").exists()


def test_a_delta_added_to_another_tensor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)
    in_files = Layout.in_files

    def swapped(self: Layout, deltas: dict[str, Any]) -> dict[str, Any]:
        found = in_files(self, deltas)
        one, two = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
        return found | {one: found[two], two: found[one]}

    monkeypatch.setattr(Layout, "in_files", swapped)
    with pytest.raises(CheckFailedError, match="is not the merged weight"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")


def test_overflow_in_float16_is_found(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, dtype=torch.float16)
    file = pair.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e4 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckFailedError, match=r"is not finite in torch\.float16"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")


def test_a_second_failure_keeps_the_first(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, dtype=torch.float16)
    file = pair.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e4 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    for _ in range(2):
        with pytest.raises(CheckFailedError):
            merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert (tmp_path / "merged.rejected").is_dir()
    assert (tmp_path / "merged.rejected.old-1").is_dir()


# --- what cannot be merged


def test_another_base_is_refused_with_both_identities(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    other = write_pair(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"trained on .*base \(sha256:\w+\), and the weights of .*other.* \(sha256:"):
        merge([WeightedAdapter(replace(pair.target, model=other.base))], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (pair.adapter / "ftkit.json").unlink()
    other = write_pair(tmp_path / "other", intermediate_size=48)
    with pytest.raises(UserError, match="load them on the base model they were trained on"):
        merge([WeightedAdapter(replace(pair.target, model=other.base))], tmp_path / "merged")


def test_bottleneck_adapters_cannot_be_merged(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    model = load_weights(pair.base, dtype=torch.float32)
    section = AdapterMethod(type="adapter", bottleneck=4)
    bottleneck.apply(model, section, seed=0)
    bottleneck.save(model, section, tmp_path / "houlsby", BaseIdentity("base"))
    with pytest.raises(UserError, match=r"non-linearity.*use the adapter directory") as caught:
        merge([WeightedAdapter(replace(pair.target, adapter=tmp_path / "houlsby"))], tmp_path / "merged")
    assert caught.value.exit_code == 2


def test_models_and_other_adapters_cannot_be_merged(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    with pytest.raises(UserError, match="nothing to merge"):
        merge([WeightedAdapter(whole_model(pair.base))], tmp_path / "merged")
    config = json.loads((pair.adapter / "adapter_config.json").read_text())
    (pair.adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="of the kind IA3"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", ("runs/a", 1.0)),
        ("runs/a:0.5", ("runs/a", 0.5)),
        ("runs/a:-1", ("runs/a", -1.0)),
        ("runs/a:1e-1", ("runs/a", 0.1)),
        ("hf://org/name", ("hf://org/name", 1.0)),
        ("runs/a:b:2", ("runs/a:b", 2.0)),
        ("runs/a:best", ("runs/a:best", 1.0)),
    ],
)
def test_the_weight_follows_the_last_colon_if_it_is_a_number(text: str, expected: tuple[str, float]) -> None:
    assert parse_adapter(text) == expected


def test_a_path_with_a_colon_and_a_number_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a:1").mkdir()
    assert parse_adapter(str(tmp_path / "a:1")) == (str(tmp_path / "a:1"), 1.0)


def test_nothing_is_left_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "check_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
