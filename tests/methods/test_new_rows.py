"""Rows of new tokens in a LoRA's files: peft reads ours and we read peft's, with equal logits; and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.methods.files import BaseIdentity
from ftkit.methods.lora_saved import read_saved
from ftkit.methods.new_rows import ENDING
from ftkit.models.token_rows import owners, train_rows
from ftkit.recipe.schema import LoraMethod
from tests.methods.cases import perturb, trained
from tests.models.test_token_rows import ARCHITECTURES, IDS, tokens
from tests.tiny_models import VOCAB_SIZE, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning"),
]

SECTION = LoraMethod(type="lora", rank=4, alpha=7.0)
IDENTITY = BaseIdentity("somewhere/base")
TOLERANCE = 1e-5


def ours(architecture: str, ids: list[int]):
    """A model with a LoRA and new rows, as if they had trained."""
    model = tiny_model(architecture)
    lora.apply(model, SECTION, seed=1)
    train_rows(model, ids)
    perturb(model)
    return model


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    """Of old and new tokens."""
    return model.eval()(input_ids=tokens(ids)).logits


def resized(architecture: str, ids: list[int]):
    """The base as peft wants it: with rows for all ids."""
    model = tiny_model(architecture)
    if ids[-1] >= VOCAB_SIZE:
        model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    return model


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_ours(architecture: str, kind: str, tmp_path: Path) -> None:
    ids = IDS[kind]
    model = ours(architecture, ids)
    lora.save(model, SECTION, tmp_path, IDENTITY)
    theirs = PeftModel.from_pretrained(resized(architecture, ids), tmp_path)
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("saves_table", [False, True])
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_we_load_pefts(architecture: str, kind: str, saves_table: bool, tmp_path: Path) -> None:
    """Also where peft saves the whole table beside the rows, as it does when it sees that the base was resized."""
    ids = IDS[kind]
    base = resized(architecture, ids)
    names = ["wte" if architecture == "gpt2" else "embed_tokens"]
    names += [] if base.get_output_embeddings().weight is base.get_input_embeddings().weight else ["lm_head"]
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["c_attn"] if architecture == "gpt2" else ["q_proj", "down_proj"],
        fan_in_fan_out=architecture == "gpt2",
        trainable_token_indices={name: ids for name in names},
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(base, config)
    perturb(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=saves_table)
    model = tiny_model(architecture)
    lora.load(model, tmp_path)
    assert (logits(model, ids) - logits(theirs, ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_only_rows_and_factors_train_and_are_saved(architecture: str, tmp_path: Path) -> None:
    ids = IDS["after the last"]
    model = ours(architecture, ids)
    names = ["model.embed_tokens"] if architecture == "llama" else ["model.embed_tokens", "lm_head"]
    assert {name for name in trained(model) if ".lora_" not in name} == {f"{name}.token_rows" for name in names}
    saved = lora.trained_state(model)
    rows = {f"base_model.model.{name}{ENDING}" for name in names}
    assert {name for name in saved if ".lora_" not in name} == rows
    assert all(saved[name].shape == (3, 32) for name in rows)
    lora.save(model, SECTION, tmp_path, IDENTITY)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {name.rpartition(".")[2]: ids for name in names}
    assert config["modules_to_save"] is None
    again = tiny_model(architecture)
    lora.load(again, tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert read_saved(tmp_path).in_full == ()


def test_without_added_tokens_nothing_is_said_of_them(tmp_path: Path) -> None:
    model = tiny_model("llama")
    lora.apply(model, SECTION, seed=1)
    lora.save(model, SECTION, tmp_path, IDENTITY)
    assert "trainable_token_indices" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert not list(owners(model))


def test_without_its_adapter_the_model_is_the_base() -> None:
    model, base = ours("llama", IDS["in reserve"]), tiny_model("llama")
    with lora.disabled(model):
        assert torch.equal(logits(model, IDS["in reserve"]), logits(base, IDS["in reserve"]))
    assert not torch.equal(logits(model, IDS["in reserve"]), logits(base, IDS["in reserve"]))


def test_gradients_are_the_same_with_checkpointing() -> None:
    ids, gradients = IDS["both"], []
    for checkpointing in (False, True):
        model = copy.deepcopy(ours("qwen3", ids)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(ids)).logits.float().square().mean().backward()
        gradients.append([parameter.grad for parameter in trained(model).values()])
    assert all(one is not None for one in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_rows_of_a_tied_head_that_were_trained_apart_are_refused(tmp_path: Path) -> None:
    model = ours("llama", IDS["both"])
    state = lora.trained_state(model)
    name = f"base_model.model.lm_head{ENDING}"
    same = state[f"base_model.model.model.embed_tokens{ENDING}"]
    lora.load_state(model, {**state, name: same.clone()})
    with pytest.raises(UserError, match=r"do not fit this model: base_model\.model.lm_head.token_adapter"):
        lora.load_state(model, {**state, name: same + 1})


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"embed_tokens": [300], "lm_head": [301]}, "other tokens for each"),
        ({"q_proj": [3]}, "names other modules than embedding and head"),
        ({"embed_tokens": [VOCAB_SIZE]}, "lm_head would have no rows for the tokens from 320 on"),
    ],
)
def test_rows_that_ftkit_lacks_are_refused(indices: dict[str, list[int]], message: str, tmp_path: Path) -> None:
    model = ours("qwen3", IDS["in reserve"])
    lora.save(model, SECTION, tmp_path, IDENTITY)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(UserError, match=message):
        lora.load(tiny_model("qwen3"), tmp_path)
