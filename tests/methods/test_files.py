import json

import pytest
import torch
from safetensors import safe_open

from ftkit.errors import UserError
from ftkit.methods.files import (
    BOTTLENECK,
    LORA,
    BaseIdentity,
    check_base,
    lora_config,
    lora_section,
    read_adapter,
    read_identity,
    write_adapter,
)
from ftkit.recipe.schema import LoraMethod

IDENTITY = BaseIdentity("org/base", "abc", "sha256:1")


def write(directory, state=None, config=None):
    state = {"b": torch.ones(2, 2), "a": torch.zeros(3)} if state is None else state
    write_adapter(directory, config or {"peft_type": LORA}, state, IDENTITY, base_dtype=torch.bfloat16)


def test_three_files(tmp_path):
    write(tmp_path / "new" / "adapter")
    directory = tmp_path / "new" / "adapter"
    assert sorted(path.name for path in directory.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ftkit.json",
    ]
    own = json.loads((directory / "ftkit.json").read_text())
    assert own["base_model"] == "org/base"
    assert own["base_fingerprint"] == "sha256:1"
    assert own["base_dtype"] == "bfloat16"
    assert own["ftkit_version"]
    assert read_identity(directory) == IDENTITY


def test_tensors_of_any_layout_are_written_in_the_same_bytes(tmp_path):
    plain = torch.arange(6.0).reshape(2, 3)
    shared = torch.arange(12.0)
    states = [
        {"a": plain, "b": plain + 6},
        {"b": shared[6:].view(2, 3), "a": shared[:6].view(2, 3)},
        {"b": (plain + 6).t().contiguous().t(), "a": torch.nn.Parameter(plain)},
    ]
    for index, state in enumerate(states):
        write(tmp_path / str(index), state)
    contents = [(tmp_path / str(index) / "adapter_model.safetensors").read_bytes() for index in range(3)]
    assert contents[0] == contents[1] == contents[2]
    with safe_open(tmp_path / "0" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_reading_gives_what_was_written(tmp_path):
    write(tmp_path, {"a": torch.tensor([1.5])}, {"peft_type": BOTTLENECK, "bottleneck": 3})
    config, state = read_adapter(tmp_path, peft_type=BOTTLENECK)
    assert config["bottleneck"] == 3
    assert state["a"].tolist() == [1.5]


def test_another_kind_of_adapter_is_refused(tmp_path):
    write(tmp_path, config={"peft_type": "IA3"})
    with pytest.raises(UserError, match="is an adapter of the kind 'IA3', not 'LORA'"):
        read_adapter(tmp_path, peft_type=LORA)


def test_a_directory_without_an_adapter(tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path, peft_type=LORA)
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        read_identity(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        UserError, match=r"has no adapter_model\.safetensors, only a pickle file.*save it once with peft"
    ):
        read_adapter(tmp_path, peft_type=LORA)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; name the directory"):
        read_adapter(tmp_path, peft_type=LORA)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files(name, tmp_path):
    write(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path, peft_type=LORA)
    assert caught.value.problems[0].where == str(path)


@pytest.mark.parametrize(("alpha", "written"), [(32.0, 32), (0.5, 0.5)])
def test_lora_configuration_there_and_back(alpha, written, tmp_path):
    section = LoraMethod(type="lora", rank=8, alpha=alpha, dropout=0.1, targets=("k_proj", "q_proj"))
    config = lora_config(section, ["k_proj", "q_proj"], fan_in_fan_out=False)
    assert json.dumps(config["lora_alpha"]) == json.dumps(written)
    assert lora_section(json.loads(json.dumps(config)), tmp_path) == section


def test_another_base_is_refused_with_both_identities(tmp_path):
    other = BaseIdentity("org/base", "d" * 40, "sha256:2")
    with pytest.raises(UserError) as caught:
        check_base(tmp_path, IDENTITY, other)
    assert str(caught.value) == (
        f"{tmp_path} was trained on org/base at abc (sha256:1), and the weights of org/base at {'d' * 12} (sha256:2) "
        "are others; use org/base as it was then"
    )
    # The same weights elsewhere, or an adapter of another tool, which does not say.
    check_base(tmp_path, IDENTITY, BaseIdentity("./copy", None, "sha256:1"))
    check_base(tmp_path, BaseIdentity("org/base"), other)
