"""GGUF files by llama.cpp's own converter, read back weight by weight."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import LlamaForCausalLM

from ftkit.artifacts import export_gguf as exporting
from ftkit.artifacts.export_gguf import check_gguf, export_gguf
from ftkit.commands.export import export
from ftkit.errors import CheckFailedError, UserError
from ftkit.runs import find_target
from ftkit.verification.files import GgufFile
from tests.tiny_gguf import save_convertible
from tests.tiny_models import CHATML

LLAMA_3_ROPE: dict[str, object] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_convertible(tmp_path_factory.mktemp("gguf") / "tiny")


@pytest.mark.parametrize(("dtype", "kind"), [(None, "bf16"), ("f16", "f16"), ("float32", "f32"), ("q8_0", "q8_0")])
def test_a_model_becomes_one_file_that_is_read_back(dtype, kind, model, tmp_path, capsys):
    export(str(model), format="gguf", output=tmp_path / "out", dtype=dtype)
    (file,) = (tmp_path / "out").iterdir()
    assert f"llama-server --jinja -m {file}" in capsys.readouterr().out
    assert file.name == f"out-{kind}.gguf"
    reader = GGUFReader(file)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if tensor.name.endswith("attn_q.weight")}
    assert kinds == {kind.upper()}
    assert reader.fields["tokenizer.chat_template"].contents() == CHATML
    check_gguf(file, model, kind)


def test_an_unknown_precision_is_told_what_there_is(model):
    with pytest.raises(UserError, match="unknown --dtype q4_k; choose one of float32, bfloat16, float16, q8_0"):
        export(str(model), format="gguf", dtype="q4_k")
    with pytest.raises(UserError, match=r"q8_0 is a precision of \.gguf files; give --format gguf"):
        export(str(model), format="hf", dtype="q8_0")


def test_what_exists_is_kept(model, tmp_path):
    target, output = find_target(str(model)), tmp_path / "deep" / "out"
    export_gguf(target, output)
    (first,) = output.iterdir()
    with pytest.raises(UserError, match="exists already"):
        export_gguf(target, output)
    written = first.read_bytes()
    export_gguf(target, output, overwrite=True)
    assert first.read_bytes() == written == (output.with_name("out.old-1") / first.name).read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "out.old-1"]


def test_what_is_another_is_found(model, tmp_path, monkeypatch):
    export_gguf(find_target(str(model)), tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()

    other = tmp_path / "other"
    changed = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 0.1
    changed.save_pretrained(other)
    for path in model.glob("*.jinja"):
        (other / path.name).write_text(path.read_text())
    with pytest.raises(CheckFailedError, match=r"another model\.layers\.1\.mlp\.up_proj\.weight"):
        check_gguf(file, other, "bf16")

    (other / "chat_template.jinja").write_text("another")
    with pytest.raises(CheckFailedError, match="another chat template"):
        check_gguf(file, other, "bf16")

    monkeypatch.setattr(exporting, "read_json", lambda path: {"eos_token_id": [1]})
    with pytest.raises(CheckFailedError, match=r"end at token \d+, not \[1\]"):
        check_gguf(file, model, "bf16")


def test_a_file_that_fails_its_check_is_set_aside(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_is_near", lambda *arguments: False)
    with pytest.raises(CheckFailedError, match="kept as"):
        export_gguf(find_target(str(model)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_converter_refuses_is_told_in_its_words(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "CONVERTER", "json.tool")
    with pytest.raises(UserError, match=r"llama\.cpp's converter refuses the model: ") as caught:
        export_gguf(find_target(str(model)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(exporting, "CONVERTER", "no_such_module")
    with pytest.raises(UserError, match=r"needs llama\.cpp's converter; pip install 'ftkit\[gguf\]'"):
        export_gguf(find_target(str(model)), tmp_path / "out")


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
def test_the_file_says_what_a_chat_begins_with(begin, tmp_path):
    """llama.cpp takes a BOS and a space for granted where neither key is there."""
    model = save_convertible(tmp_path / "tiny", chat_template=begin + CHATML, says_beginning=False)
    export_gguf(find_target(str(model)), tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()
    fields = GGUFReader(file).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is bool(begin)
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False


def test_what_cannot_be_read_back_is_told(model, tmp_path, monkeypatch, capsys):
    original = exporting._weights

    def refusing(directory, dtype, **options):
        if "gguf_file" in options:
            raise ValueError("GGUF model with architecture granite is not supported yet.")
        return original(directory, dtype, **options)

    monkeypatch.setattr(exporting, "_weights", refusing)
    export_gguf(find_target(str(model)), tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert "weights of the .gguf file were not compared, since transformers cannot read it back" in shown
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_file_whose_positions_are_scaled_answers_by_a_server_alone(model, tmp_path):
    scaled = save_convertible(tmp_path / "scaled", rope=LLAMA_3_ROPE)
    for directory, answers in ((model, True), (scaled, False)):
        export_gguf(find_target(str(directory)), tmp_path / f"out-{answers}", dtype=torch.float32)
        (file,) = (tmp_path / f"out-{answers}").iterdir()
        side = GgufFile(file, device=torch.device("cpu"), compute=torch.float32)
        assert answers or side.answers([], {}, 1) is None
        assert ("only a server can tell" in side.kind) != answers
