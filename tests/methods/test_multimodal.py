"""Every method on the language layers of multimodal models, and peft on the same class with the same files."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods import full, lora
from ftkit.methods.base import report
from ftkit.methods.files import BaseIdentity
from ftkit.models.architecture import towers
from ftkit.recipe.schema import LoraMethod
from tests.methods.cases import SECTIONS, logits, loss, method_of, perturb, trained
from tests.tiny_multimodal import MULTIMODAL_CONFIGS, multimodal_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
every_kind = pytest.mark.parametrize("kind", MULTIMODAL_CONFIGS)
IDENTITY = BaseIdentity("org/base")


def applied(kind: str, section: LoraMethod) -> PreTrainedModel:
    """A tiny model with a LoRA that has trained."""
    model = multimodal_model(kind)
    lora.apply(model, section, seed=1)
    perturb(model)
    return model


def refused(section: LoraMethod) -> tuple[str, str]:
    """What is said of a section that Gemma 3 cannot be tuned by, and the remedy."""
    with pytest.raises(UserError) as caught:
        lora.apply(multimodal_model("gemma3"), section, seed=1)
    (problem,) = caught.value.problems
    return problem.what, problem.how


@every_kind
@pytest.mark.parametrize("case", ["full", "lora", "lora-modules", "adapter", "adapter-norms"])
def test_only_the_language_model_trains_and_all_that_trains_learns(kind: str, case: str) -> None:
    model = multimodal_model(kind)
    before = logits(model)
    method_of(case).apply(model, SECTIONS[case], seed=1)
    assert (logits(model) - before).abs().max() <= 1e-5
    perturb(model)
    loss(model.train()).backward()
    names = set(trained(model))
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in names)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == names
    kept = [parameter for parameters in towers(model).values() for parameter in parameters]
    if case == "full":
        assert {id(p) for p in model.parameters()} - {id(p) for p in kept} == {id(p) for p in trained(model).values()}


def test_full_training_says_what_stays_as_it_is() -> None:
    model = multimodal_model("gemma3")
    full.apply(model, SECTIONS["full"], seed=0)
    kept = {path: sum(p.numel() for p in parameters) for path, parameters in towers(model).items()}
    (note,) = full.notes(model)
    assert f"model.vision_tower ({kept['model.vision_tower']:,})" in note
    assert report(model).trainable_parameters == model.num_parameters() - sum(kept.values())


@every_kind
@pytest.mark.parametrize("modules", [(), ("embed_tokens", "lm_head")])
def test_peft_loads_ours_on_the_same_class(kind: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    section = LoraMethod(type="lora", rank=4, alpha=7.0, modules_to_save=modules)
    model = applied(kind, section)
    lora.save(model, section, tmp_path, IDENTITY)
    theirs = PeftModel.from_pretrained(multimodal_model(kind), tmp_path)
    expected = logits(model)
    assert (logits(theirs) - expected).abs().max() <= 1e-5
    assert (expected - logits(multimodal_model(kind))).abs().max() > 0.1
    own = {name for name, _ in multimodal_model(kind).named_modules()}
    for key in load_file(tmp_path / "adapter_model.safetensors"):
        path = key.removeprefix("base_model.model.").rpartition(".weight")[0]
        assert path.removesuffix(".lora_A").removesuffix(".lora_B") in own


@every_kind
def test_we_load_what_peft_writes(kind: str, tmp_path: Path) -> None:
    targets = r"model\.language_model\..*\.(q_proj|down_proj)"
    config = LoraConfig(r=4, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM")
    theirs = get_peft_model(multimodal_model(kind), config)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = multimodal_model(kind)
    lora.load(ours, tmp_path)
    assert (logits(theirs) - logits(ours)).abs().max() <= 1e-5
    assert len(trained(ours)) == len(trained(theirs))


def test_targets_in_the_vision_tower_alone_are_refused_by_name() -> None:
    for targets in (("fc1",), r".*vision_tower.*fc1"):
        what, how = refused(LoraMethod(type="lora", rank=4, targets=targets))
        assert "no text reaches model.vision_tower; the decoder blocks have: q_proj (2)" in what
        assert how == "name some of these"
    what, _ = refused(LoraMethod(type="lora", rank=4, targets=("nothing",)))
    assert "vision" not in what


def test_names_that_both_have_mean_the_language_layers() -> None:
    section = LoraMethod(type="lora", rank=4, targets=("q_proj",))
    assert len(trained(applied("gemma3", section))) == 2 * 2


def test_modules_in_the_vision_tower_alone_are_not_trained_in_full() -> None:
    what, how = refused(LoraMethod(type="lora", rank=4, modules_to_save=("multi_modal_projector",)))
    assert what.startswith("multi_modal_projector is only in model.multi_modal_projector, which no text reaches")
    assert how == "name modules of the language model"


def test_full_weights_go_back_to_the_names_of_the_files(tmp_path: Path) -> None:
    model = multimodal_model("gemma3")
    full.apply(model, SECTIONS["full"], seed=0)
    perturb(model)
    full.save(model, SECTIONS["full"], tmp_path, IDENTITY)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    fresh = multimodal_model("gemma3")
    full.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
