import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftkit.errors import UserError
from ftkit.methods.targets import select_targets, shortest_names
from tests.tiny_models import tiny_model

LAYER = "model.layers.{}.self_attn.{}"


def paths(targets, exclude=(), architecture="llama") -> list[str]:
    return list(select_targets(tiny_model(architecture), targets, exclude))


def test_names_match_whole_components():
    assert paths(("q_proj",)) == [LAYER.format(0, "q_proj"), LAYER.format(1, "q_proj")]
    assert paths(("attn.c_proj",), architecture="gpt2") == [
        "transformer.h.0.attn.c_proj",
        "transformer.h.1.attn.c_proj",
    ]
    assert paths(("v_proj", "model.layers.1.self_attn.k_proj")) == [
        LAYER.format(0, "v_proj"),
        LAYER.format(1, "k_proj"),
        LAYER.format(1, "v_proj"),
    ]


def test_an_expression_matches_whole_paths():
    assert paths(r".*\.1\..*[qv]_proj") == [LAYER.format(1, "q_proj"), LAYER.format(1, "v_proj")]
    with pytest.raises(UserError):
        paths("q_proj")


def test_all_linear_is_every_layer_of_the_blocks():
    assert len(paths("all-linear")) == 14
    assert len(paths("all-linear", architecture="gpt2")) == 8


def test_exclude_takes_names_and_expressions():
    assert not [path for path in paths("all-linear", ("down_proj", "o_proj")) if path.endswith(("down_proj", "o_proj"))]
    assert paths(("q_proj",), r".*\.0\..*") == [LAYER.format(1, "q_proj")]


@pytest.mark.parametrize(
    ("targets", "named", "how"),
    [
        (("q_prj", "v_proj"), "q_prj", "did you mean q_proj?"),
        (("W_pack",), "W_pack", "name some of these"),
        (("proj",), "proj", "did you mean"),
        (("all_linear",), "all_linear", "did you mean all-linear?"),
        (r"decoder\..*", r"decoder\..*", "name some of these"),
        (("lm_head",), "lm_head", "name some of these"),
    ],
)
def test_targets_that_match_nothing_list_what_there_is(targets, named, how):
    with pytest.raises(UserError) as caught:
        paths(targets)
    (problem,) = caught.value.problems
    assert problem.key == ("method", "targets")
    assert problem.what == (
        f"{named} matches no linear layer of the decoder blocks, which have: q_proj (2), k_proj (2), v_proj (2), "
        "o_proj (2), gate_proj (2), up_proj (2), down_proj (2)"
    )
    assert problem.how.startswith(how)


def test_an_exclude_that_matches_nothing_is_an_error():
    with pytest.raises(UserError) as caught:
        paths("all-linear", ("lm_haed",))
    assert caught.value.problems[0].key == ("method", "exclude")


def test_nothing_left_is_an_error():
    with pytest.raises(UserError, match="leaves out every target"):
        paths(("q_proj",), ("q_proj",))


def test_stacked_experts_are_not_left_out_in_silence():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"mlp\.experts\.gate_up_proj.*targets: \[q_proj, k_proj, v_proj, o_proj\]"):
        select_targets(model, "all-linear", ())
    assert len(select_targets(model, ("q_proj",), ())) == 1


@pytest.mark.parametrize(
    ("architecture", "targets", "names"),
    [
        ("llama", "all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("llama", ("q_proj",), ["q_proj"]),
        ("llama", r".*\.1\..*q_proj", ["model.layers.1.self_attn.q_proj"]),
        # The last component would match mlp.c_proj too.
        ("gpt2", ("attn.c_proj",), ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]),
    ],
)
def test_names_for_peft_match_exactly_what_was_chosen(architecture, targets, names):
    model = tiny_model(architecture)
    assert shortest_names(model, select_targets(model, targets, ())) == names
