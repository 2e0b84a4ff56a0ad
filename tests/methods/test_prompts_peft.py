"""Prompts and prefixes against peft: the same files, logits, gradients and answers.

Tolerances are for float32: 1e-5 on logits of size 1 to 10, where the two sum in another order.
"""

import pytest
import torch
from peft import AdaptionPromptConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from ftkit.errors import UserError
from ftkit.evaluation.generation import generate
from ftkit.methods.files import CONFIG_NAME, BaseIdentity, read_identity
from ftkit.methods.prompt_files import ROWS
from ftkit.methods.table import METHODS, method_of, section_of
from tests.methods.cases import SECTIONS, applied, inputs, logits, loss, perturb, trained, with_prompt
from tests.tiny_models import tiny_model

pytestmark = [
    # peft asks for a name that transformers has deprecated.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # And hands prefixes over under one.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    # It tells that it leaves positions to the model.
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

ROWS_5 = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
THEIRS = {
    "soft_prompt": lambda: PromptTuningConfig(**ROWS_5),
    "prefix": lambda: PrefixTuningConfig(**ROWS_5),
    "llama_adapter": lambda: AdaptionPromptConfig(adapter_len=5, adapter_layers=1, task_type="CAUSAL_LM"),
}
CASES = [
    *(
        (architecture, "soft_prompt")
        for architecture in ("llama", "qwen3", "gemma3", "mistral", "gpt2", "opt", "mixtral")
    ),
    *((architecture, "prefix") for architecture in ("llama", "qwen3", "gemma3", "mistral", "gpt2", "gpt_neox", "phi3")),
    *((architecture, "prefix") for architecture in ("opt", "mixtral")),
    *((architecture, "llama_adapter") for architecture in ("llama", "mistral")),
]
every_case = pytest.mark.parametrize(("architecture", "case"), CASES)


@torch.no_grad()
def peft_logits(model: PeftModel, ids: Tensor) -> Tensor:
    """Of the tokens; peft returns those of a soft prompt before them."""
    return model.eval()(input_ids=ids).logits[:, -ids.shape[1] :]


@torch.no_grad()
def our_logits(model, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=with_prompt(model, ids)).logits[:, -ids.shape[1] :]


def long_inputs() -> Tensor:
    """int64 [2, 40]: longer than the windows of 16."""
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(8))


def perturbed(architecture: str, case: str):
    """A tiny model with prompts that matter: gates are open."""
    model = applied(architecture, case)
    perturb(model)
    for name, parameter in trained(model).items():
        if name.endswith("adaption_gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return model


@every_case
def test_peft_loads_ours(architecture, case, tmp_path):
    model = perturbed(architecture, case)
    METHODS[case].save(model, SECTIONS[case], tmp_path, BaseIdentity("org/base"))
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    for ids in (inputs(), long_inputs()):
        ours = our_logits(model, ids)
        assert (peft_logits(theirs, ids) - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (logits(model) - logits(tiny_model(architecture))).abs().max() > 1e-2


@every_case
def test_we_load_what_peft_writes(architecture, case, tmp_path):
    theirs = get_peft_model(tiny_model(architecture), THEIRS[case]())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(-0.4)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(architecture)
    assert method_of(tmp_path) is METHODS[case]
    section = method_of(tmp_path).load(ours, tmp_path)
    assert section == section_of(tmp_path)
    assert (section.type, section.num_virtual_tokens) == (case, 5)
    assert read_identity(tmp_path).fingerprint is None
    for ids in (inputs(), long_inputs()):
        expected = peft_logits(theirs, ids)
        assert (our_logits(ours, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_case
def test_gradients_are_those_of_peft(architecture, case, tmp_path):
    ours = perturbed(architecture, case)
    METHODS[case].save(ours, SECTIONS[case], tmp_path, BaseIdentity("org/base"))
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    # peft refuses to load a prompt as one that trains.
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("prompt_encoder" in name or "adaption_" in name)
    loss(ours.train()).backward()
    ids = inputs()
    scores = theirs.train()(input_ids=ids).logits[:, -ids.shape[1] :]
    F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    own = {name: p.grad for name, p in trained(ours).items()}
    if case == "prefix":
        parts = [p.grad for _, p in sorted(trained(ours).items(), key=_layer)]
        own = {ROWS: torch.stack(parts, dim=1).flatten(1)}
    assert len(own) == len(expected)
    for mine, other in zip(_by_size(own), _by_size(expected), strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


def _layer(item: tuple[str, Tensor]) -> tuple[int, bool]:
    name, _ = item
    return int(next(part for part in name.split(".") if part.isdigit())), name.endswith("values")


def _by_size(gradients: dict[str, Tensor]) -> list[Tensor]:
    return sorted(gradients.values(), key=lambda gradient: gradient.numel())


@every_case
def test_answers_are_those_of_peft(architecture, case, tmp_path):
    """Prompts of several lengths in one batch, token by token, with a cache."""
    model = perturbed(architecture, case)
    METHODS[case].save(model, SECTIONS[case], tmp_path, BaseIdentity("org/base"))
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
    prompts = [inputs()[0, :length].tolist() for length in (3, 12, 7)]
    written = generate(model.eval(), prompts, end_ids=(), max_new_tokens=6, max_tokens=1000)
    for prompt, answer in zip(prompts, written, strict=True):
        ids, expected = torch.tensor([prompt]), []
        for _ in range(6):
            expected.append(int(peft_logits(theirs, ids)[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([expected[-1:]])], dim=1)
        assert list(answer.ids) == expected


def test_a_prefix_of_another_shape_is_refused(tmp_path):
    METHODS["prefix"].save(applied("llama", "prefix"), SECTIONS["prefix"], tmp_path, BaseIdentity("org/base"))
    with pytest.raises(UserError) as caught:
        METHODS["prefix"].load(tiny_model("gpt2"), tmp_path)
    (problem,) = caught.value.problems
    assert problem.what == "has 2 heads of keys and values, 16 numbers in all, and this model 4 with 32"
    assert problem.where == str(tmp_path / CONFIG_NAME)


def test_what_we_lack_is_refused_by_name(tmp_path):
    theirs = get_peft_model(tiny_model("llama"), PromptTuningConfig(**ROWS_5, modules_to_save=["lm_head"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        METHODS["soft_prompt"].load(tiny_model("llama"), tmp_path)
    assert [problem.what for problem in caught.value.problems] == ['modules_to_save: ["lm_head"] is not supported']
