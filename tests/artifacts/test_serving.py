"""Which commands are proposed after an export or a merge, and what is said where a server cannot load it."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from ftkit.artifacts.export import EXPORTERS
from ftkit.artifacts.serving import after_export, after_model
from ftkit.methods import adapter as bottleneck
from ftkit.methods.files import BaseIdentity
from ftkit.models.load import load_weights
from ftkit.recipe.schema import AdapterMethod
from tests.artifacts.adapters import Pair, write_pair
from tests.tiny_models import CHATML, tiny_tokenizer


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    # A user's directory may be called so.
    return write_pair(tmp_path / "it's mine")


def proposed(pair: Pair, **changed) -> list[str]:
    """The lines after the adapter's export, with other values in its configuration."""
    path = pair.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    output = pair.adapter.parent / "out"
    EXPORTERS["adapter"](pair.target, output, overwrite=True)
    return after_export(pair.target, output, "adapter")


def test_a_lora_is_served_beside_its_base(pair: Pair) -> None:
    serve, verify, peft = map(shlex.split, proposed(pair))
    output = str(pair.adapter.parent / "out")
    assert serve == [
        *["vllm", "serve", str(pair.base_directory), "--enable-lora", "--max-lora-rank", "8"],
        *["--lora-modules", f"tuned={output}"],
    ]
    assert verify == ["ftkit", "verify", str(pair.adapter), "--endpoint", "http://localhost:8000"]
    assert peft[:2] == ["python", "-c"]
    compile(peft[2], "printed", "exec")


def test_what_vllm_would_take_from_the_base_is_named(pair: Pair) -> None:
    """Its template and its end of generation: an adapter's own are not looked at."""
    (pair.base_directory / "generation_config.json").write_text('{"eos_token_id": 256}')
    serve = shlex.split(proposed(pair)[0])
    assert serve[-2:] == ["--generation-config", str(pair.adapter.parent / "out")]
    assert "--chat-template" not in serve
    (pair.base_directory / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    tiny_tokenizer(CHATML + "{# another #}").save_pretrained(pair.base_directory)
    serve = shlex.split(proposed(pair)[0])
    template = Path(serve[serve.index("--chat-template") + 1])
    assert template.read_text() == CHATML
    assert "--generation-config" not in serve


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (100, 128), (400, 512)])
def test_the_rank_is_one_that_vllm_knows(pair: Pair, rank: int, served: int) -> None:
    assert f"--max-lora-rank {served} " in proposed(pair, r=rank)[0]
    assert proposed(pair, r=600)[0].startswith("note: vLLM does not load it: its rank is above 512")


def test_a_revision_of_the_hub_is_passed_on(pair: Pair) -> None:
    serve, _, peft = proposed(pair, base_model_name_or_path="org/model", revision="abc")
    assert "vllm serve org/model --enable-lora --max-lora-rank 8 --revision abc --lora-modules" in serve
    assert "M.from_pretrained('org/model', revision='abc')" in shlex.split(peft)[2]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"use_dora": True}, "DoRA's lengths"),
        ({"modules_to_save": ["lm_head"]}, "modules that trained in full"),
        ({"rank_pattern": {"q_proj": 8}}, "a rank of its own for some layers"),
        ({"alpha_pattern": {"q_proj": 8}}, "an alpha of its own for some layers"),
        ({"target_parameters": ["experts.down_proj"]}, "updates of stacked experts"),
        ({"trainable_token_indices": [3]}, "rows of new tokens"),
    ],
)
def test_what_vllm_does_not_load_is_merged_first(pair: Pair, changed: dict, reason: str, monkeypatch) -> None:
    # What is in the adapter's file does not matter here.
    monkeypatch.setattr("ftkit.artifacts.export_adapter._check_readable", lambda path: None)
    note, merge, *peft = proposed(pair, **changed)
    assert note == f"note: vLLM does not load it: it has {reason}; a merged model has them"
    assert shlex.split(merge) == ["ftkit", "merge", str(pair.adapter)]
    assert len(peft) == (0 if "trainable_token_indices" in changed else 1)


def test_bottleneck_adapters_are_ftkits_alone(pair: Pair) -> None:
    model = load_weights(pair.base, dtype=None)
    section = AdapterMethod(type="adapter", bottleneck=4)
    bottleneck.apply(model, section, seed=0)
    directory = pair.adapter.parent / "houlsby"
    bottleneck.save(model, section, directory, BaseIdentity("base"))
    tiny_tokenizer().save_pretrained(directory)
    target = replace(pair.target, label=str(directory), adapter=directory, tokenizer=directory)
    EXPORTERS["adapter"](target, directory.parent / "out")
    assert after_export(target, directory.parent / "out", "adapter") == [
        "note: vLLM does not load it: it is a bottleneck adapter, which only ftkit computes; "
        "train method.type: lora for a server"
    ]


def test_a_model_directory_is_served_and_asked(pair: Pair) -> None:
    output = pair.adapter.parent / "model"
    EXPORTERS["hf"](pair.target, output)
    serve, files, endpoint, pipeline = map(shlex.split, after_model(pair.target, output))
    assert serve == ["vllm", "serve", str(output)]
    assert files == ["ftkit", "verify", str(pair.adapter), "--exported", str(output)]
    assert endpoint == ["ftkit", "verify", str(pair.adapter), "--endpoint", "http://localhost:8000"]
    assert "'role': 'user'" in pipeline[2]
    # Nobody's in particular: the sum of several adapters.
    asked = shlex.split(after_model(None, output)[1])
    assert asked == ["ftkit", "verify", str(output), "--endpoint", "http://localhost:8000"]
    # Without a template there is no conversation to verify.
    (output / "chat_template.jinja").unlink()
    assert [line.split()[0] for line in after_model(None, output)] == ["vllm", "python"]
