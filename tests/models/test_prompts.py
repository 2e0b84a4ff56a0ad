"""Prompts in packed rows: every document gets its own, and what it computes is what it computes alone.

Sums over another order of float32 products differ by 1e-5 of the largest at most.
"""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ftkit.data.batches import Batch, collate
from ftkit.errors import UserError
from ftkit.methods.base import report
from ftkit.methods.table import METHODS
from ftkit.models.attention import NAME, bounds_kwargs, padded_attention, register
from ftkit.models.attention_prompts import Prefix
from ftkit.models.objective import Objective
from ftkit.models.soft_prompt import ids_of_prompt, insert_soft_prompt, prompt_ids
from ftkit.recipe.schema import LlamaAdapterMethod, PrefixMethod, SoftPromptMethod
from tests.methods.cases import perturb, trained
from tests.models.batches import random_examples
from tests.tiny_models import tiny_model

EXAMPLES = random_examples([9, 30, 2, 14, 9])
SECTIONS = {
    "soft_prompt": SoftPromptMethod(type="soft_prompt", num_virtual_tokens=3),
    "prefix": PrefixMethod(type="prefix", num_virtual_tokens=3),
    "llama_adapter": LlamaAdapterMethod(type="llama_adapter", num_virtual_tokens=3, num_layers=2),
}
FUSED = ("gpt2", "gpt_neox", "phi3")
CASES = [
    (architecture, method)
    for architecture in ("llama", "qwen3", "gemma3", "mistral", "mixtral", "opt", "gpt_oss", *FUSED)
    for method in SECTIONS
    if (method, architecture in FUSED) != ("llama_adapter", True)
]
every_case = pytest.mark.parametrize(("architecture", "method"), CASES)


def prompted(architecture: str, method: str, *, packed: bool) -> PreTrainedModel:
    """A tiny model with prompts as if they had trained."""
    register()
    model = tiny_model(architecture)
    if packed:
        model.set_attn_implementation(NAME)
    METHODS[method].apply(model, SECTIONS[method], seed=1)
    perturb(model)
    return model.train()


def run(model: PreTrainedModel, batches: list[Batch], *, packed: bool) -> tuple[float, dict[str, Tensor]]:
    """Summed loss, and gradients."""
    objective = Objective(model, num_datasets=2, packed_attention=packed)
    total = 0.0
    for batch in batches:
        loss = objective(batch).loss
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in trained(model).items()}


@every_case
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_document_of_a_packed_row_gets_its_own_prompt(architecture, method, checkpointing):
    alone = prompted(architecture, method, packed=False)
    before = prompt_ids(alone)
    batches = [collate([example], packed=False, pad_id=0, prompt_ids=before) for example in EXAMPLES]
    loss, gradients = run(alone, batches, packed=False)

    together = prompted(architecture, method, packed=True)
    if checkpointing:
        together.activation_checkpointing_enable({"use_reentrant": False})
    row = collate(EXAMPLES, packed=True, pad_id=0, prompt_ids=before)
    packed_loss, packed_gradients = run(together, [row], packed=True)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        # A gate is one number, the sum of many that cancel.
        tolerance = 1e-4 if name.endswith("gate") else 1e-5
        assert (packed_gradients[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name

    # The test can tell: prompts that stand elsewhere compute something else.
    without = collate(EXAMPLES, packed=True, pad_id=0)
    if method == "soft_prompt":
        assert run(together, [without], packed=True)[0] != pytest.approx(loss, rel=1e-4)


@every_case
def test_padding_changes_nothing(architecture, method):
    model = prompted(architecture, method, packed=False)
    before = prompt_ids(model)
    single = [collate([example], packed=False, pad_id=0, prompt_ids=before) for example in EXAMPLES]
    loss, _ = run(model, single, packed=False)
    padded = collate(EXAMPLES, packed=False, pad_id=0, prompt_ids=before)
    assert run(model, [padded], packed=False)[0] == pytest.approx(loss, rel=1e-6)


def test_prompts_in_a_batch():
    """Ids, positions, bounds and targets, packed and padded."""
    examples, ids = random_examples([4, 2]), ids_of_prompt(3)
    assert ids == (-1, -2, -3)
    packed = collate(examples, packed=True, pad_id=7, prompt_ids=ids)
    first, second = (example.example.input_ids.tolist() for example in examples)
    assert packed.input_ids.tolist() == [[*ids, *first, *ids, *second]]
    assert packed.position_ids.tolist() == [[*range(7), *range(5)]]
    assert packed.cu_seq_lens.tolist() == [0, 7, 12]
    assert (packed.num_tokens, packed.max_seq_len) == (6, 7)
    plain = collate(examples, packed=True, pad_id=7)
    assert torch.equal(packed.target_ids, plain.target_ids)
    assert torch.equal(packed.input_ids[0, packed.target_positions], plain.input_ids[0, plain.target_positions])
    padded = collate(examples, packed=False, pad_id=7, prompt_ids=ids)
    assert padded.input_ids.tolist() == [[*ids, *first], [*ids, *second, 7, 7]]
    assert padded.attention_mask.tolist() == [[1] * 7, [1] * 5 + [0, 0]]


def test_no_gradient_between_documents():
    """With a prefix the row's documents stay apart, to the bit."""
    model = prompted("llama", "prefix", packed=True)
    ids = torch.arange(3, 15)
    embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    bounds = bounds_kwargs(torch.tensor([0, 5, 12], dtype=torch.int32))
    hidden = model.model(inputs_embeds=embedded, position_ids=positions, use_cache=False, **bounds).last_hidden_state
    (gradient,) = torch.autograd.grad(hidden[0, 5:].sum(), embedded)
    assert gradient[0, :5].abs().max() == 0.0
    assert gradient[0, 5:].abs().min(dim=1).values.max() > 0.0


def test_a_rank_without_documents_still_trains_the_prompt():
    for method in SECTIONS:
        model = prompted("llama", method, packed=True)
        objective = Objective(model, num_datasets=2, packed_attention=True)
        objective(collate([], packed=True, pad_id=0, prompt_ids=prompt_ids(model))).loss.backward()
        for name, parameter in trained(model).items():
            assert parameter.grad is not None, name
            assert parameter.grad.count_nonzero() == 0, name


def test_the_parameters_of_llama_adapter_on_7b():
    """10 tokens in 30 of 32 layers: 1,228,800, besides a gate each (Zhang et al. 2023, section 3.1)."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, vocab_size=32000))
    METHODS["llama_adapter"].apply(model, LlamaAdapterMethod(type="llama_adapter"), seed=0)
    counts = report(model, METHODS["llama_adapter"])
    assert counts.trainable_parameters == 1_228_800 + 30
    assert counts.places == (
        "10 gated vectors in each of the last 30 layers (model.layers.2.self_attn to model.layers.31.self_attn)",
    )


def test_more_layers_than_there_are():
    section = LlamaAdapterMethod(type="llama_adapter", num_layers=3)
    with pytest.raises(UserError, match="the model has 2 attention layers, fewer than 3"):
        METHODS["llama_adapter"].apply(tiny_model("llama"), section, seed=0)


def test_a_model_that_looks_tokens_up_in_every_layer_takes_no_soft_prompt():
    model = tiny_model("llama")
    model.config.hidden_size_per_layer_input = 8
    with pytest.raises(UserError, match="looks tokens up in every layer"):
        insert_soft_prompt(model, torch.zeros(2, 32))


def test_a_soft_prompt_starts_as_common_tokens_or_as_text():
    for init, largest in (("vocabulary", None), ("random", 0.5)):
        model = tiny_model("gemma3")
        section = SoftPromptMethod(type="soft_prompt", num_virtual_tokens=6, init=init)
        METHODS["soft_prompt"].apply(model, section, seed=0)
        (rows,) = METHODS["soft_prompt"].trained_state(model).values()
        known = model.get_input_embeddings()(torch.arange(320)).detach()
        equal = [(known == row).all(-1).any() for row in rows]
        assert all(equal) == (init == "vocabulary"), "Gemma scales what it looks up, and the prompt starts as that"
        assert len({row.sum().item() for row in rows}) == 6
        if largest is not None:
            assert rows.abs().max() <= largest
    METHODS["soft_prompt"].start_from_text(model, (5, 9, 5, 7))
    (rows,) = METHODS["soft_prompt"].trained_state(model).values()
    assert torch.equal(rows, known[[5, 9, 5, 7, 5, 9]])


def test_attention_without_a_mask_or_positions_is_refused():
    module, states = torch.nn.Module(), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="no mask"):
        padded_attention(module, states, states, states, None)
    module.add_module("prefix", Prefix(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
    with pytest.raises(ValueError, match="positions"):
        padded_attention(module, states, states, states, torch.ones(1, 1, 3, 3, dtype=torch.bool), sliding_window=2)
    module.prefix = Prefix(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="do not go with a prefix"):
        padded_attention(module, states, states, states, torch.ones(1, 1, 3, 3, dtype=torch.bool))
