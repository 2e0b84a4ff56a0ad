import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftkit.errors import NetworkError, UserError
from ftkit.models import load
from ftkit.models.load import BaseModel, find_base
from ftkit.recipe.schema import ModelSection
from tests.models.fake_hub import COMMIT
from tests.tiny_models import CONFIGS, save_tiny, tiny_model, tiny_tokenizer

SECTION = ModelSection()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "models" / "tiny-llama")


def base_at(directory: Path) -> BaseModel:
    return find_base(str(directory), SECTION, base=directory)


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# --- where the model lies


def test_a_path_is_relative_to_the_recipe_and_wins_over_a_hub_id(model: Path) -> None:
    found = find_base("models/tiny-llama", SECTION, base=model.parent.parent)
    assert found == BaseModel("models/tiny-llama", path=model)
    assert base_at(model).path == model


def test_hf_prefix_forces_the_hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(repo_id: str, revision: str | None, *, offline: bool, weights: bool) -> str:
        asked.append((repo_id, revision, offline))
        return COMMIT

    monkeypatch.setattr(load, "resolve_commit", resolve)
    found = find_base("hf://models/tiny-llama", ModelSection(revision="v1"), base=model.parent.parent, offline=True)
    assert asked == [("models/tiny-llama", "v1", True)]
    assert (found.path, found.repo_id, found.revision) == (None, "models/tiny-llama", COMMIT)


def test_a_hub_model_is_read_from_its_snapshot(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(repo_id: str, commit: str, *, weights: bool, code: bool, offline: bool) -> Path:
        fetched.append((repo_id, commit, weights))
        return model

    monkeypatch.setattr(load, "fetch", fetch)
    base = BaseModel("org/good", repo_id="org/good", revision=COMMIT)
    assert load.load_tokenizer(base).eos_token == "<|im_end|>"
    assert load.load_config(base).model_type == "llama"
    assert fetched == [("org/good", COMMIT, False)] * 2
    assert load.fingerprint(base) == load.fingerprint(base_at(model))
    assert fetched[2:] == [("org/good", COMMIT, True)]


def test_a_name_that_is_no_path_may_be_one_with_a_slip(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub cannot be asked, what lies beside the recipe is likelier."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise NetworkError("no answer", how="try again")

    monkeypatch.setattr(load, "resolve_commit", unreachable)
    where = f"no answer, and there is no {model.parent}"
    with pytest.raises(NetworkError, match=f"{where}/tiny-lama; did you mean {model}\\?"):
        find_base("tiny-lama", SECTION, base=model.parent)
    with pytest.raises(NetworkError, match=f"{where}/org/other; try again"):
        find_base("org/other", SECTION, base=model.parent)


@pytest.mark.parametrize("name", ["./models/tiny-lama", "models/../models/tiny-lama", "models/tiny-lama.gguf"])
def test_a_path_that_does_not_exist_suggests_similar_ones(model: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no such model: .*; did you mean .*tiny-llama") as caught:
        find_base(name, SECTION, base=model.parent.parent)
    assert caught.value.problems[0].key == ("base_model",)


def test_a_path_in_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        find_base("./nowhere/model", SECTION, base=tmp_path)


def test_a_file_or_revision_that_makes_no_sense(model: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is a file, not a model directory"):
        find_base("config.json", SECTION, base=model)
    with pytest.raises(UserError, match="a revision belongs to a hub model") as caught:
        find_base(str(model), ModelSection(revision="main"), base=model)
    assert caught.value.problems[0].key == ("model", "revision")


def test_directories_that_are_not_models_say_what_is_missing(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"it has no config\.json; name a directory"):
        base_at(empty)

    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match=f"it is a run: `ftkit merge {run}`"):
        base_at(run)
    with pytest.raises(UserError, match=r"it is an adapter: name the model it was trained on \(org/base\)"):
        base_at(run / "adapter")
    model.rename(model.parent / "model")
    with pytest.raises(UserError, match=f"did you mean {model.parent / 'model'}"):
        base_at(model.parent)


def test_weights_must_be_safetensors_and_complete(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as a pickle file \(pytorch_model.bin\).*save_pretrained"):
        base_at(model)
    (model / "pytorch_model.bin").rename(model / "model.Q8_0.gguf")
    with pytest.raises(UserError, match=r"only as GGUF; name the file itself: model.Q8_0.gguf"):
        base_at(model)
    (model / "model.Q8_0.gguf").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        base_at(model)

    sharded = tmp_path / "sharded"
    tiny_model().save_pretrained(sharded, max_shard_size="40KB")
    base_at(sharded)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 weight files .*: model-00002-of-00003.safetensors"):
        base_at(sharded)


def test_an_adapter_beside_the_model_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        base_at(model)


# --- configuration and tokenizer


def test_models_that_ftkit_does_not_train_are_refused_by_name(model: Path) -> None:
    edit_config(model, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification, not a causal language model"):
        load.load_config(base_at(model))
    edit_config(model, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantized weights \(gptq\): not in this version"):
        load.load_config(base_at(model))
    edit_config(model, architectures=None, quantization_config=None, model_type="t5")
    with pytest.raises(UserError, match=r"encoder-decoder \(t5\)"):
        load.load_config(base_at(model))
    edit_config(model, model_type="hovercraft")
    with pytest.raises(UserError, match="hovercraft"):
        load.load_config(base_at(model))


def test_remote_code_does_not_run_by_itself(model: Path) -> None:
    edit_config(model, model_type="hovercraft", auto_map={"AutoConfig": "code.Config"})
    (model / "code.py").write_text(f"open({str(model / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"brings its own Python code.*--trust-remote-code"):
        load.load_config(base_at(model))
    assert not (model / "ran").exists()


def test_damaged_files_are_one_line(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load.load_tokenizer(base_at(model))
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load.load_tokenizer(base_at(model))
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON") as caught:
        load.load_config(base_at(model))
    assert "\n" not in str(caught.value)


def test_the_tokenizer_keeps_its_template_and_special_tokens(model: Path) -> None:
    tokenizer = load.load_tokenizer(base_at(model))
    expected = tiny_tokenizer()
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert tokenizer("Ünïcode\n<|im_end|>")["input_ids"] == expected("Ünïcode\n<|im_end|>")["input_ids"]


# --- weights


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_files(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load.load_weights(base_at(save_tiny(tmp_path / "model", architecture)), dtype=dtype)
    expected = tiny_model(architecture).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert weight.dtype == dtype, name
        assert torch.equal(weight, expected[name].to(dtype)), name
    assert not model.training
    # Rotary frequencies in bfloat16 shift gradients by 2%.
    assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if "inv_freq" in name)


def test_bfloat16_logits_stay_near_float32(model: Path) -> None:
    ids = torch.arange(40)[None]
    exact = load.load_weights(base_at(model), dtype=torch.float32)(ids).logits
    rounded = load.load_weights(base_at(model), dtype=torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_a_missing_weight_is_an_error_and_never_random(model: Path) -> None:
    edit_weights(model, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"lack weights of the model \(1, e\.g\. model\.norm\.weight\)"):
        load.load_weights(base_at(model), dtype=torch.float32)


def test_tied_embeddings_are_not_missing_but_untied_ones_are(model: Path) -> None:
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    load.load_weights(base_at(model), dtype=torch.float32)
    edit_config(model, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load.load_weights(base_at(model), dtype=torch.float32)


def test_unexpected_and_misshapen_weights_are_errors_reported_together(model: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.extra.weight"] = torch.zeros(2)
        weights["model.norm.weight"] = torch.zeros(3)

    edit_weights(model, change)
    with pytest.raises(UserError, match=r"model\.extra\.weight.*model\.norm\.weight \[3\], not \[32\]"):
        load.load_weights(base_at(model), dtype=torch.float32)


def test_a_truncated_weight_file_is_damaged(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="a weight file is damaged"):
        load.load_weights(base_at(model), dtype=torch.float32)


def test_attention_that_cannot_be_used_names_the_key(model: Path) -> None:
    assert load.load_weights(base_at(model), dtype=torch.float32, attn_implementation="eager")
    with pytest.raises(UserError, match="cannot use attention flash_attention_2") as caught:
        load.load_weights(base_at(model), dtype=torch.float32, attn_implementation="flash_attention_2")
    assert caught.value.problems[0].key == ("model", "attn_implementation")


def test_loading_is_silent(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load.load_weights(base_at(model), dtype=torch.float32)
    load.load_tokenizer(base_at(model))
    assert capfd.readouterr() == ("", "")


# --- fingerprint


def test_the_fingerprint_follows_the_weights_and_nothing_else(model: Path, tmp_path: Path) -> None:
    first = load.fingerprint(base_at(model))
    assert first.startswith("sha256:")
    assert load.fingerprint(base_at(save_tiny(tmp_path / "elsewhere"))) == first
    edit_config(model, note="other")
    assert load.fingerprint(base_at(model)) == first
    edit_weights(model, lambda weights: weights["model.norm.weight"][0].add_(1e-3))
    assert load.fingerprint(base_at(model)) != first


def test_the_fingerprint_covers_every_shard(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    first = load.fingerprint(base_at(tmp_path))
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert load.fingerprint(base_at(tmp_path)) != first


# --- compute dtype


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "dtype", "reason"),
    [
        (True, False, torch.bfloat16, "AMX"),
        (False, True, torch.bfloat16, "AVX512-BF16"),
        (False, False, torch.float32, "neither AVX512-BF16 nor AMX"),
    ],
)
def test_compute_dtype_on_cpu(
    amx: bool, avx512_bf16: bool, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    chosen, why = load.choose_compute_dtype("auto", torch.device("cpu"))
    assert chosen == dtype
    assert reason in why


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_compute_dtype_on_cuda(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    chosen, why = load.choose_compute_dtype("auto", torch.device("cuda"))
    assert chosen == dtype
    assert f"Some GPU (sm{capability[0]}{capability[1]})" in why


def test_compute_dtype_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.choose_compute_dtype("auto", torch.device("mps"))[0] == torch.float32
    assert load.choose_compute_dtype("float32", torch.device("cpu")) == (torch.float32, "the recipe asks for it")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    chosen, why = load.choose_compute_dtype("bfloat16", torch.device("cpu"))
    assert chosen == torch.bfloat16
    assert "float32 may be much faster" in why
    with pytest.raises(UserError, match="float16 needs loss scaling: not in this version"):
        load.choose_compute_dtype("float16", torch.device("cpu"))
