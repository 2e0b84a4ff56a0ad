import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.export import EXPORTERS, find_exporter
from ftkit.artifacts.merge import merge
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods import adapter as bottleneck
from ftkit.methods.files import BaseIdentity
from ftkit.models.load import BaseModel, load_weights
from ftkit.recipe.schema import AdapterMethod
from tests.artifacts.adapters import Pair, logits, open_base, whole_model, write_pair
from tests.models.test_gguf import write_gguf
from tests.tiny_models import CONFIGS, tiny_model


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path)


def contents(directory: Path) -> dict[str, bytes]:
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- every format; gguf, whose converter knows certain tokenizers only, in test_export_gguf.py


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name != "gguf"])
def test_every_format_keeps_what_exists_and_leaves_nothing_half(name: str, pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "export"
    EXPORTERS[name](pair.target, output)
    written = contents(output)
    with pytest.raises(UserError, match="exists already"):
        EXPORTERS[name](pair.target, output)
    assert contents(output) == written
    EXPORTERS[name](pair.target, output, overwrite=True)
    assert contents(output) == written == contents(output.with_name("export.old-1"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["export", "export.old-1"]


def test_formats_of_later_and_of_never() -> None:
    assert find_exporter("hf") is EXPORTERS["hf"]
    with pytest.raises(UserError, match="onnx: not in this version; --format hf or adapter or gguf"):
        find_exporter("onnx")
    with pytest.raises(UserError, match="no export format zip"):
        find_exporter("zip")


# --- hf


def test_hf_of_a_lora_is_the_merged_model_with_its_proof(pair: Pair, tmp_path: Path) -> None:
    EXPORTERS["hf"](pair.target, tmp_path / "export")
    merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert contents(tmp_path / "export") == contents(tmp_path / "merged")
    assert "merge_report.json" in contents(tmp_path / "export")


def test_hf_of_a_full_model_is_the_model_with_the_tuned_tokenizer(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, max_shard_size="40KB", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(pair.base_directory)
    tokenizer.chat_template += "{# tuned #}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (pair.base_directory / "LICENSE").write_text("Apache-2.0")
    (pair.base_directory / "training_state.safetensors").write_text("not of the model")
    EXPORTERS["hf"](replace(whole_model(pair.base), tokenizer=tmp_path / "tokenizer"), tmp_path / "export")
    before, after = contents(pair.base_directory), contents(tmp_path / "export")
    weights = {name for name in before if name.startswith("model")}
    assert len(weights) > 2
    assert all(after[name] == before[name] for name in weights)
    assert after.keys() == before.keys() - {"training_state.safetensors"}
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == tokenizer.chat_template
    assert json.loads(after["config.json"])["dtype"] == "bfloat16"
    assert json.loads(after["generation_config.json"])["eos_token_id"] == [258]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(model)[0], logits(load_weights(pair.base, dtype=torch.bfloat16))[0])


def test_hf_in_another_precision(pair: Pair, tmp_path: Path) -> None:
    EXPORTERS["hf"](whole_model(pair.base), tmp_path / "export", dtype=torch.bfloat16)
    before = load_file(pair.base_directory / "model.safetensors")
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_hf_of_a_gguf_is_a_float32_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    original = tiny_model("llama")
    base = open_base(write_gguf(tmp_path / "tiny.gguf", original))
    EXPORTERS["hf"](whole_model(base), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.dtype == torch.float32
    assert torch.equal(logits(model)[0], logits(original)[0])
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template


def test_hf_of_a_bottleneck_adapter_says_what_to_do_instead(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format adapter"):
        EXPORTERS["hf"](replace(pair.target, adapter=write_bottleneck(pair, tmp_path)), tmp_path / "export")


def test_a_failed_proof_is_no_export(pair: Pair, tmp_path: Path) -> None:
    half = write_pair(tmp_path / "half", dtype=torch.float16)
    file = half.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e4 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckFailedError):
        EXPORTERS["hf"](half.target, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert (tmp_path / "export.rejected").is_dir()


# --- adapter


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("architecture", CONFIGS)
def test_peft_loads_an_exported_adapter_with_equal_logits(architecture: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, architecture)
    EXPORTERS["adapter"](pair.target, tmp_path / "export")
    base = AutoModelForCausalLM.from_pretrained(pair.base_directory)
    plain = logits(base)
    with_peft = logits(PeftModel.from_pretrained(base, tmp_path / "export"))
    for ours, theirs, without in zip(logits(pair.adapted()), with_peft, plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
        assert (without - theirs).abs().max() > 1e-2 * ours.abs().max()


def test_an_exported_adapter_holds_its_own_files_and_no_others(pair: Pair, tmp_path: Path) -> None:
    (pair.adapter / "optimizer.safetensors").write_text("of a checkpoint")
    before = contents(pair.adapter)
    EXPORTERS["adapter"](pair.target, tmp_path / "export")
    del before["optimizer.safetensors"]
    assert contents(tmp_path / "export") == before
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(before)
    # It merges as the original does.
    merge([WeightedAdapter(replace(pair.target, adapter=tmp_path / "export"))], tmp_path / "merged")


def test_bottleneck_adapters_are_exported_too(pair: Pair, tmp_path: Path) -> None:
    directory = write_bottleneck(pair, tmp_path)
    EXPORTERS["adapter"](replace(pair.target, adapter=directory, tokenizer=directory), tmp_path / "export")
    assert contents(tmp_path / "export") == contents(directory)


def test_what_is_no_adapter_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapter; --format hf"):
        EXPORTERS["adapter"](whole_model(pair.base), tmp_path / "export")
    with pytest.raises(UserError, match="keeps its own precision"):
        EXPORTERS["adapter"](pair.target, tmp_path / "export", dtype=torch.bfloat16)
    (pair.adapter / "adapter_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="is damaged"):
        EXPORTERS["adapter"](pair.target, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_hub_models_are_exported_from_their_snapshot(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the hub holds links; the export holds files."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in pair.base_directory.iterdir():
        (snapshot / path.name).symlink_to(path)
    monkeypatch.setattr("ftkit.models.load.fetch", lambda *arguments, **keywords: snapshot)
    base = BaseModel("org/good", repo_id="org/good", revision="0" * 40)
    EXPORTERS["hf"](whole_model(base), tmp_path / "export")
    assert not any(path.is_symlink() for path in (tmp_path / "export").iterdir())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def write_bottleneck(pair: Pair, directory: Path) -> Path:
    """A bottleneck adapter for the base of `pair`."""
    model = load_weights(pair.base, dtype=torch.float32)
    section = AdapterMethod(type="adapter", bottleneck=4)
    bottleneck.apply(model, section, seed=0)
    bottleneck.save(model, section, directory / "houlsby", BaseIdentity("base"))
    return directory / "houlsby"
