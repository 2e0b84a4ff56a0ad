"""`method.init_from`: the same weights as were saved, and a line for everything that does not agree."""

import pytest
import torch

from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.methods.files import BaseIdentity
from ftkit.methods.start import continue_from
from tests.methods.cases import SECTIONS, applied, logits, method_of, perturb
from tests.tiny_models import tiny_model

CASES = [case for case in SECTIONS if case != "full"]


def written(case: str, directory, *, architecture: str = "llama", **changes):
    """A trained adapter in `directory`; returns its model."""
    section, method, model = SECTIONS[case].model_copy(update=changes), method_of(case), tiny_model(architecture)
    method.apply(model, section, seed=1)
    perturb(model)
    method.save(model, section, directory, BaseIdentity("org/base"))
    return model


def start(case: str, directory, **changes):
    """A model with fresh weights of the case, then with those of `directory`."""
    section, method, model = SECTIONS[case].model_copy(update=changes), method_of(case), tiny_model("llama")
    method.apply(model, section, seed=2)
    continue_from(model, method, section, directory)
    return model


@pytest.mark.parametrize("case", CASES)
def test_training_begins_with_the_saved_weights(case, tmp_path):
    trained, fresh = written(case, tmp_path), applied("llama", case, seed=2)
    model = start(case, tmp_path)
    assert torch.equal(logits(model), logits(trained))
    assert not torch.equal(logits(model), logits(fresh))
    wanted = {name: parameter.requires_grad for name, parameter in fresh.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted


def test_what_does_not_change_the_weights_meaning_may_differ(tmp_path):
    trained = written("lora", tmp_path, init="gaussian")
    model = start("lora", tmp_path, dropout=0.5, learning_rate_ratio=4.0)
    assert torch.equal(logits(model), logits(trained))
    assert {layer.lora_dropout for _, layer in lora._layers(model)} == {0.5}


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("lora", {"rank": 8}),
        ("lora", {"alpha": 3.0}),
        ("lora", {"rank_pattern": {"q_proj": 8}}),
        ("lora", {"alpha_pattern": {"q_proj": 8.0}}),
        ("lora", {"rank_stabilized": True}),
        ("lora", {"dora": True}),
        ("lora", {"init": "pissa"}),
        ("lora-pissa", {"init": "kaiming"}),
        ("adapter", {"bottleneck": 8}),
        ("adapter", {"non_linearity": "relu"}),
        ("adapter", {"train_norms": True}),
        ("adapter", {"placement": ("feed_forward",)}),
        ("adapter", {"insertion": "parallel"}),
        ("adapter-parallel", {"scale": 1.0}),
    ],
)
def test_what_changes_it_is_refused_by_key(case, changes, tmp_path):
    written(case, tmp_path)
    ((key, ours),) = changes.items()
    with pytest.raises(UserError) as caught:
        start(case, tmp_path, **changes)
    (problem,) = caught.value.problems
    assert problem.key == ("method", key)
    assert problem.what == f"{ours}, and {tmp_path} was trained with {getattr(SECTIONS[case], key)}"


def test_a_bottleneck_is_the_same_by_number_and_by_factor(tmp_path):
    trained = written("adapter-parallel", tmp_path)
    model = start("adapter-parallel", tmp_path, bottleneck=5, reduction_factor=None, dropout=0.5)
    assert torch.equal(logits(model), logits(trained))
    with pytest.raises(UserError, match=r"4, and .* was trained with 5") as caught:
        start("adapter-parallel", tmp_path, reduction_factor=8.0)
    assert [problem.key for problem in caught.value.problems] == [("method", "bottleneck")]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            ("q_proj", "v_proj"),
            ("q_proj",),
            r"lacks base_model\.model\.model\.layers\.0\.self_attn\.v_proj.* and 3 more",
        ),
        (("q_proj",), ("q_proj", "v_proj"), r"has besides base_model\.model\.model\.layers\.0\.self_attn\.v_proj"),
    ],
)
def test_other_modules_are_refused(ours, theirs, message, tmp_path):
    written("lora", tmp_path, targets=theirs)
    with pytest.raises(UserError, match=message) as caught:
        start("lora", tmp_path, targets=ours)
    assert caught.value.problems[0].key == ("method", "init_from")


def test_modules_that_trained_in_full_are_wanted_again(tmp_path):
    written("lora-modules", tmp_path)
    with pytest.raises(UserError, match=r"has besides base_model\.model\.lm_head\.weight and 1 more"):
        start("lora", tmp_path)


def test_another_kind_is_refused(tmp_path):
    written("adapter", tmp_path)
    with pytest.raises(UserError, match=r"was trained as adapter, and this is lora; set method\.type: adapter"):
        start("lora", tmp_path)


def test_another_models_shapes_are_refused(tmp_path):
    written("lora", tmp_path)
    model = tiny_model("llama", intermediate_size=48)
    lora.apply(model, SECTIONS["lora"], seed=0)
    with pytest.raises(UserError, match="have another shape"):
        continue_from(model, lora, SECTIONS["lora"], tmp_path)
