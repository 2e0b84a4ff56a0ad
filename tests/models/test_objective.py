"""The objective against transformers' own logits, document by document, through torch's cross-entropy."""

import copy
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ftkit.data.batches import Batch, collate
from ftkit.data.types import IGNORE, EncodedExample
from ftkit.errors import UserError
from ftkit.methods.lora_init import gaussian
from ftkit.methods.lora_layer import insert_lora
from ftkit.models.attention import NAME, register
from ftkit.models.objective import LossSums, Objective, check_router_loss, verify_head
from ftkit.models.precision import compute_in
from tests.models.batches import random_examples
from tests.tiny_models import CONFIGS, tiny_model

EXAMPLES = random_examples([9, 30, 2, 14, 9])
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SCALED: dict[str, dict[str, Any]] = {
    "cohere": SMALL,
    "granite": {**SMALL, "logits_scaling": 8.0},
    "gemma2": {**SMALL, "head_dim": 8},
}
"""Models whose logits are not head(hidden)."""
LAYOUTS = ("bounds", "position_ids", "padded")


def scaled_model(model_type: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SCALED[model_type])).train()


def make_objective(model: PreTrainedModel, layout: str, num_datasets: int = 2) -> Objective:
    if layout == "bounds":
        register()
        model.set_attn_implementation(NAME)
    return Objective(model, num_datasets=num_datasets, packed_attention=layout == "bounds")


def make_batch(layout: str, examples: Sequence[EncodedExample] = EXAMPLES) -> Batch:
    return collate(examples, packed=layout != "padded", pad_id=0)


def reference(model: PreTrainedModel, examples: Sequence[EncodedExample] = EXAMPLES) -> LossSums:
    """Each document alone, all its logits at once; gradients are left in the model."""
    by_dataset = torch.zeros(2)
    total = torch.zeros(())
    for encoded in examples:
        ids = torch.from_numpy(encoded.example.input_ids).long()
        labels = torch.from_numpy(encoded.example.labels).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits.float(), labels[1:], reduction="sum", ignore_index=IGNORE)
        total = total + loss
        by_dataset[encoded.dataset] += loss.detach()
    total.backward()
    return LossSums(total.detach(), by_dataset)


def assert_same_gradients(ours: PreTrainedModel, theirs: PreTrainedModel, tolerance: float = 1e-5) -> None:
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not mine.requires_grad:
            continue
        assert mine.grad is not None, name
        difference = float((mine.grad.float() - yours.grad.float()).abs().max() / yours.grad.float().abs().max())
        assert difference <= tolerance, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_gradients_are_those_of_the_documents_alone(
    architecture: str, layout: str, checkpointing: bool
) -> None:
    model, alone = tiny_model(architecture), tiny_model(architecture)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = make_objective(model.train(), layout)
    assert (objective.head, objective.notes) == ("chunked", ())
    loss, by_dataset = objective(make_batch(layout))
    loss.backward()
    expected, expected_by_dataset = reference(alone)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_dataset, expected_by_dataset, rtol=1e-5, atol=0)
    assert_same_gradients(model, alone)


@pytest.mark.parametrize("layout", ["bounds", "padded"])
@pytest.mark.parametrize("model_type", SCALED)
def test_models_with_another_head_make_their_own_logits(model_type: str, layout: str) -> None:
    model = scaled_model(model_type)
    alone = copy.deepcopy(model)
    objective = make_objective(model, layout)
    assert objective.head == "logits_to_keep"
    assert objective.notes == (
        "the model makes its logits itself, all targets of a micro-batch at once: it scales or soft-caps the logits",
    )
    loss, by_dataset = objective(make_batch(layout))
    loss.backward()
    expected, expected_by_dataset = reference(alone)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_dataset, expected_by_dataset, rtol=1e-5, atol=0)
    assert_same_gradients(model, alone)


@pytest.mark.parametrize("head", ["chunked", "logits_to_keep"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_targets_the_backward_pass_runs_and_gives_zeros(layout: str, head: str) -> None:
    model = tiny_model() if head == "chunked" else scaled_model("cohere")
    objective = make_objective(model, layout)
    assert objective.head == head
    for examples in ([], EXAMPLES[3:4]):
        loss, by_dataset = objective(make_batch(layout, examples))
        (loss / 7).backward()
        assert (loss.item(), by_dataset.tolist()) == (0.0, [0.0, 0.0])
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("model_type", ["llama", "cohere"])
def test_evaluation_gives_the_same_loss_without_gradients(model_type: str) -> None:
    model = tiny_model() if model_type == "llama" else scaled_model(model_type)
    objective = make_objective(model, "bounds").train()
    trained = objective(make_batch("bounds"))
    objective.eval()
    with torch.no_grad():
        evaluated = objective(make_batch("bounds"))
    assert not evaluated.loss.requires_grad
    assert torch.equal(evaluated.loss, trained.loss.detach())
    assert torch.equal(evaluated.by_dataset, trained.by_dataset)


def test_dropout_is_the_models_own() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.3)
    objective = make_objective(model, "bounds").train()
    batch = make_batch("bounds")

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return objective(batch).loss.detach()

    with torch.random.fork_rng():
        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))
        objective.eval()
        assert torch.equal(run(0), run(1))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_masters_in_bfloat16_give_the_float32_gradient_up_to_rounding(architecture: str) -> None:
    model, exact = tiny_model(architecture), tiny_model(architecture)
    compute_in(model, torch.bfloat16)
    objective = make_objective(model, "bounds")
    assert objective.head == "chunked"
    loss, _ = objective(make_batch("bounds"))
    loss.backward()
    expected, _ = reference(exact)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-2, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        # Two layers with weights of 0.1 noise amplify bfloat16's 2^-9; a wrong gradient is off by about 1.
        assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.2, name


# --------------------------------------------------------------------------------------------- which head is used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_verdict_does_not_depend_on_precision_or_the_size_of_logits(dtype: torch.dtype) -> None:
    assert verify_head(tiny_model().to(dtype)) == ("chunked", None)
    model = scaled_model("gemma2").to(dtype)
    with torch.no_grad():
        # Logits of 1e-3, which a soft-cap at 30 changes by less than any precision can tell.
        model.lm_head.weight.mul_(1e-3)
    assert verify_head(model)[0] == "logits_to_keep"


def test_verifying_leaves_no_trace() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    verify_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_hooks
    assert not model.transformer._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_head_with_lora_is_not_taken_for_its_weight() -> None:
    model = tiny_model(tie_word_embeddings=False)
    factors = gaussian(model.lm_head.weight, 4, 2.0, torch.Generator().manual_seed(0))
    insert_lora(model.lm_head, factors, scale=2.0, dropout=0.0)
    objective = make_objective(model, "bounds")
    assert objective.head == "logits_to_keep"
    assert objective.notes[0].endswith("its head is a LoraLinear")
    objective(make_batch("bounds")).loss.backward()
    assert float(model.lm_head.lora_B.grad.abs().max()) > 0


def transforms_hidden(model: PreTrainedModel, logits_to_keep: Any = slice(None), **kwargs: Any) -> Any:
    hidden = model.model(**kwargs).last_hidden_state[:, logits_to_keep]
    return SimpleNamespace(logits=model.lm_head(hidden * 1.001))


def calls_no_head(model: PreTrainedModel, logits_to_keep: Any = slice(None), **kwargs: Any) -> Any:
    hidden = model.model(**kwargs).last_hidden_state[:, logits_to_keep]
    return SimpleNamespace(logits=F.linear(hidden, model.lm_head.weight))


def clips_logits(model: PreTrainedModel, logits_to_keep: Any = slice(None), **kwargs: Any) -> Any:
    hidden = model.model(**kwargs).last_hidden_state[:, logits_to_keep]
    return SimpleNamespace(logits=model.lm_head(hidden).clamp(-90, 90))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (transforms_hidden, "it transforms the hidden states before the head"),
        (calls_no_head, "it does not call its head as a module"),
        (clips_logits, "it scales or soft-caps the logits"),
    ],
)
def test_what_a_model_does_around_its_head_is_seen(forward: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "forward", partial(forward, model))
    head, note = verify_head(model)
    assert head == "logits_to_keep"
    assert note is not None
    assert reason in note


def test_a_model_that_ignores_logits_to_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled_model("cohere")
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda logits_to_keep=0, **kwargs: own(**kwargs))
    with pytest.raises(UserError, match="has a head that ftkit cannot use: it scales or soft-caps") as caught:
        Objective(model, num_datasets=1, packed_attention=False)
    assert caught.value.problems[0].key == ("base_model",)


# ------------------------------------------------------------------------------------------------ mixture of experts

EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}


def test_a_router_loss_is_refused_or_named_but_never_lost_in_silence() -> None:
    off = tiny_model("llama", **EXPERTS)
    assert make_objective(off, "bounds").notes == (
        "the experts' load-balancing loss is off, as in the model's configuration (output_router_logits: false)",
    )
    with pytest.raises(UserError, match="asks for a router loss"):
        Objective(tiny_model("llama", **EXPERTS, output_router_logits=True), num_datasets=1, packed_attention=False)
    weightless = tiny_model("llama", **EXPERTS, output_router_logits=True, router_aux_loss_coef=0.0)
    assert check_router_loss(weightless) is None
    assert check_router_loss(tiny_model()) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_train_on_the_documents_alone(layout: str) -> None:
    model, alone = tiny_model("llama", **EXPERTS), tiny_model("llama", **EXPERTS)
    loss, _ = make_objective(model, layout)(make_batch(layout))
    loss.backward()
    expected, _ = reference(alone)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert_same_gradients(model, alone)
