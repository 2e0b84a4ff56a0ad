import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ftkit.errors import StorageError, UserError
from ftkit.models import gguf as converter
from ftkit.models.load import find_base, load_tokenizer, load_weights
from ftkit.recipe.schema import ModelSection
from tests.tiny_models import CHATML, SPECIAL_TOKENS, VOCAB_SIZE, tiny_model, tiny_tokenizer

LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Module of a Llama block -> llama.cpp's name for it."""


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    end_tokens: dict[str, int] | None = None,
    rope_scaling: gguf.RopeScalingType = gguf.RopeScalingType.NONE,
    pre: str = "gpt-2",
) -> Path:
    """Write a tiny Llama as llama.cpp's converter does: rotary rows interleaved, everything float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _write_tokenizer(writer, pre)
    writer.add_rope_scaling_type(rope_scaling)
    for key, value in (end_tokens or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)

    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for module, name in LLAMA_NAMES.items():
            weight = weights[f"model.layers.{layer}.{module}.weight"]
            if name in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                weight = _interleave(weight, heads)
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    vocabulary[len(vocabulary)] = "!!"
    tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(VOCAB_SIZE)]
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    types = [control if t in SPECIAL_TOKENS else normal if i in vocabulary else unused for i, t in enumerate(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # An empty list of merges cannot be written; no text of the tests holds this pair.
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(259)
    writer.add_chat_template(CHATML)


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("pre", "pieces"), [("gpt-2", [" ½", " 12"]), ("smollm", [" ", "½", " ", "1", "2"])])
def test_texts_are_cut_as_llama_cpp_cuts_them(pre: str, pieces: list[str], cache: Path, tmp_path: Path) -> None:
    """Before it looks for tokens; SmolLM's are trained on single digits."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), pre=pre)
    tokenizer = load_tokenizer(find_base("tiny.gguf", ModelSection(), base=tmp_path))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(" ½ 12")
    assert [" ½ 12"[start:end] for _, (start, end) in cut] == pieces


def test_a_gguf_base_is_an_equal_model_in_the_cache(cache: Path, tmp_path: Path) -> None:
    original = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", original)
    base = find_base("tiny.gguf", ModelSection(), base=tmp_path)
    assert base.path is not None
    assert base.path.parent == cache / "gguf"
    loaded = load_weights(base, dtype=torch.float32)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, original.state_dict()[name]), name
    ids = torch.arange(60)[None]
    assert torch.equal(loaded(ids).logits, original.eval()(ids).logits)
    assert loaded.generation_config.eos_token_id == 258
    assert json.loads((base.path / "config.json").read_text())["dtype"] == "float32"

    tokenizer = load_tokenizer(base)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Grüße, 42!"}], tokenize=False)
    assert text == "<|im_start|>user\nGrüße, 42!<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert tokenizer.model_max_length == 512


def test_it_is_converted_once_in_silence_and_leaves_nothing_else(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    capfd.readouterr()
    first = converter.convert_gguf(path)
    assert capfd.readouterr() == ("", "")
    written = (first / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert converter.convert_gguf(copy) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in first.parent.iterdir()] == [first.name]


def test_other_content_is_another_directory(cache: Path, tmp_path: Path) -> None:
    first = converter.convert_gguf(write_gguf(tmp_path / "a.gguf", tiny_model("llama")))
    second = converter.convert_gguf(write_gguf(tmp_path / "b.gguf", tiny_model("llama", seed=1)))
    assert first != second


def test_the_slower_of_two_conversions_gives_way(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    write_directory = converter._write_directory

    def overtaken(path: Path, directory: Path, **keywords: Any) -> None:
        monkeypatch.setattr(converter, "_write_directory", write_directory)
        converter.convert_gguf(path)
        write_directory(path, directory, **keywords)

    monkeypatch.setattr(converter, "_write_directory", overtaken)
    directory = converter.convert_gguf(path)
    assert (directory / "config.json").is_file()
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]


def test_every_token_that_ends_an_answer_stops_generation(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_model("llama"), end_tokens={"eot_token_id": 256, "eom_token_id": 258}
    )
    config = json.loads((converter.convert_gguf(path) / "generation_config.json").read_text())
    assert config["eos_token_id"] == [258, 256]


def test_scaled_rotary_positions_are_refused_not_lost(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "scaled.gguf", tiny_model("llama"), rope_scaling=gguf.RopeScalingType.YARN)
    with pytest.raises(UserError, match="scales its rotary positions"):
        converter.convert_gguf(path)
    assert list((cache / "gguf").iterdir()) == []


def test_files_that_cannot_be_converted_are_one_line(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tiny\.gguf is not a GGUF file"):
        converter.convert_gguf(path)
    part = tmp_path / "big-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"one of several parts.*llama-gguf-split --merge"):
        converter.convert_gguf(part)
    writer = gguf.GGUFWriter(path, "hovercraft")
    writer.add_name("tiny")
    _write_tokenizer(writer, "gpt-2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"cannot be converted: .*hovercraft"):
        converter.convert_gguf(path)


def test_without_the_extra_the_pip_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "find_spec", lambda name: None)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"pip install 'ftkit\[gguf\]'"):
        find_base("tiny.gguf", ModelSection(), base=tmp_path)


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "file"))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    with pytest.raises(StorageError, match="FTKIT_CACHE"):
        converter.convert_gguf(path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert converter.cache_directory() == Path("/some/cache/ftkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert converter.cache_directory() == Path.home() / ".cache" / "ftkit"
    monkeypatch.setenv("FTKIT_CACHE", "~/elsewhere")
    assert converter.cache_directory() == Path.home() / "elsewhere"
