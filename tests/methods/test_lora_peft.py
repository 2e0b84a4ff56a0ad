"""LoRA against peft: the same files, logits, gradients and losses."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.methods.files import CONFIG_NAME, BaseIdentity, read_identity
from ftkit.recipe.schema import LoraMethod
from tests.methods.cases import applied, batches, inputs, logits, loss, perturb, trained
from tests.tiny_models import tiny_model

# peft asks for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NAMED = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
both = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def peft_model(architecture: str, **options) -> PeftModel:
    """peft's LoRA of rank 4 and scale 7/4, on every linear layer unless `options` says otherwise."""
    defaults = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(**{**defaults, "fan_in_fan_out": architecture == "gpt2", **options})
    return get_peft_model(tiny_model(architecture), config)


def same_start(architecture: str) -> tuple[torch.nn.Module, PeftModel]:
    """The same model and LoRA, with random A and B, in ftkit and in peft."""
    ours, theirs = applied(architecture, "lora"), peft_model(architecture)
    perturb(ours)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in lora.trained_state(ours).items():
            parameters[name.replace(".weight", ".default.weight")].copy_(tensor)
    assert len(trained(ours)) == len(trained(theirs))
    return ours.train(), theirs.train()


@both
def test_peft_loads_ours(architecture, tmp_path):
    """Logits within 1e-5; a warning about the files would fail this."""
    model = applied(architecture, "lora")
    perturb(model)
    lora.save(model, LoraMethod(type="lora", rank=4, alpha=7.0), tmp_path, BaseIdentity("org/base"))
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert (logits(theirs) - logits(tiny_model(architecture))).abs().max() > 0.1


@both
@pytest.mark.parametrize("targets", ["all-linear", "names", "regex"])
def test_we_load_what_peft_writes(architecture, targets, tmp_path):
    chosen = {"all-linear": "all-linear", "names": NAMED[architecture], "regex": r".*\.0\..*(q_proj|c_attn)"}[targets]
    theirs = peft_model(architecture, target_modules=chosen)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(architecture)
    section = lora.load(ours, tmp_path)
    assert (section.rank, section.alpha, section.dropout) == (4, 7.0, 0.0)
    assert len(trained(ours)) == len(trained(theirs))
    assert (logits(theirs) - logits(ours)).abs().max() <= 1e-5
    assert (logits(ours) - logits(tiny_model(architecture))).abs().max() > 0.01


@both
def test_there_and_back_again(architecture, tmp_path):
    """What peft wrote and ftkit wrote again, peft reads with the same bits."""
    theirs = peft_model(architecture, target_modules=NAMED[architecture], layers_to_transform=[1])
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_model(architecture)
    section = lora.load(ours, tmp_path / "theirs")
    assert len(trained(ours)) == 4
    lora.save(ours, section, tmp_path / "ours", BaseIdentity("org/base"))
    again = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "ours")
    assert torch.equal(logits(again), logits(theirs))


@both
def test_gradients_equal_pefts(architecture):
    """float32, within 1e-6 of each tensor's maximum; at the logits, within 1e-6 of theirs."""
    ours, theirs = same_start(architecture)
    largest = logits(theirs).abs().max()
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-6 * largest
    loss(ours).backward()
    loss(theirs).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            gradient = expected[f"base_model.model.{name}.default.weight"]
            assert (parameter.grad - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@both
def test_twenty_steps_equal_pefts(architecture):
    """AdamW on the same batches: the losses agree within 1e-4 at every step, and do not stay what they were."""
    ours, theirs = same_start(architecture)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        values = []
        for ids in batches(20):
            value = loss(model, ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(value.item())
        losses.append(values)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-4
    assert losses[0][-1] < losses[0][0] - 0.1


@both
def test_deltas_are_pefts_bit_for_bit(architecture):
    ours, theirs = same_start(architecture)
    section = LoraMethod(type="lora", rank=4, alpha=7.0)
    deltas = dict(lora.deltas(ours, lora.trained_state(ours), section))
    for name, module in theirs.base_model.model.named_modules():
        if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict):
            assert torch.equal(deltas.pop(f"{name}.weight")(module.weight), module.get_delta_weight("default"))
    assert not deltas


def test_deltas_need_no_weights():
    """A model on the meta device is enough to tell the layout."""
    ours = applied("gpt2", "lora")
    perturb(ours)
    with torch.device("meta"):
        empty = type(ours)(ours.config)
    state, section = lora.trained_state(ours), LoraMethod(type="lora", rank=4, alpha=7.0)
    for (name, delta), (_, expected) in zip(
        lora.deltas(empty, state, section), lora.deltas(ours, state, section), strict=True
    ):
        weight = ours.get_parameter(name)
        assert delta(weight).shape == empty.get_parameter(name).shape
        assert torch.equal(delta(weight), expected(weight))


def edited(directory, **changes) -> None:
    path = directory / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("invented_later", {"by": "peft"}),
    ],
)
def test_what_ftkit_lacks_is_refused_by_name(key, value, tmp_path):
    peft_model("llama").save_pretrained(tmp_path)
    edited(tmp_path, **{key: value})
    with pytest.raises(UserError) as caught:
        lora.load(tiny_model("llama"), tmp_path)
    (problem,) = caught.value.problems
    assert problem.what == f"{key}: {json.dumps(value)} is not supported"
    assert problem.where == str(tmp_path / CONFIG_NAME)
    assert "merge_and_unload" in problem.how


def test_everything_that_is_lacking_is_named_at_once(tmp_path):
    peft_model("llama").save_pretrained(tmp_path)
    edited(tmp_path, lora_bias=True, bias="all")
    with pytest.raises(UserError) as caught:
        lora.load(tiny_model("llama"), tmp_path)
    assert [problem.what.partition(":")[0] for problem in caught.value.problems] == ["bias", "lora_bias"]


def test_an_adapted_head_is_refused(tmp_path):
    peft_model("mistral", target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UserError, match="adapts lm_head, which is no linear layer of this model's blocks"):
        lora.load(tiny_model("mistral"), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    peft_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"adapts model\.layers\.0\.mlp\.down_proj, which is no linear layer"):
        lora.load(tiny_model("gpt2"), tmp_path)
    with pytest.raises(UserError, match="have another shape"):
        lora.load(tiny_model("llama", intermediate_size=48), tmp_path)


def test_a_rank_that_the_weights_do_not_have_is_refused(tmp_path):
    peft_model("llama").save_pretrained(tmp_path)
    edited(tmp_path, r=8)
    with pytest.raises(UserError, match="have another shape"):
        lora.load(tiny_model("llama"), tmp_path)
    edited(tmp_path, r="eight")
    with pytest.raises(UserError, match=r"adapter_config\.json: rank: .*integer"):
        lora.load(tiny_model("llama"), tmp_path)


def test_identity_of_an_adapter_that_peft_wrote(tmp_path):
    peft_model("llama").save_pretrained(tmp_path)
    edited(tmp_path, base_model_name_or_path="org/base")
    assert read_identity(tmp_path) == BaseIdentity("org/base", None, None)


def test_generation_runs():
    """With the cache that transformers fills during generation."""
    model = applied("llama", "lora").eval()
    tokens = model.generate(inputs()[:, :4], attention_mask=torch.ones(2, 4), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 4
