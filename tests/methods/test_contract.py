"""What every method must keep, on every architecture that ftkit promises."""

import hashlib
import re
import subprocess
import sys
from functools import partial
from typing import get_args

import pytest
import torch

from ftkit.errors import UserError
from ftkit.methods.base import merged_weight, report
from ftkit.methods.files import BaseIdentity
from ftkit.methods.table import METHODS
from ftkit.models.architecture import key_value_shape, linear_modules, linear_shape, norm_modules, stacked_experts
from ftkit.models.precision import compute_in
from ftkit.recipe.schema import Method
from tests.methods.cases import (
    CASES,
    REFUSED,
    SECTIONS,
    applied,
    computing,
    logits,
    loss,
    method_of,
    perturb,
    section_of,
    trained,
)
from tests.tiny_models import VOCAB_SIZE, tiny_model

IDENTITY = BaseIdentity("org/base", "abc", "sha256:0")
WIDTH, BOTTLENECK = 32, 6
TIED = ("llama", "gemma3", "gpt2", "opt")
"""Architectures whose head is their embeddings."""

every_case = pytest.mark.parametrize(("architecture", "case"), CASES)
every_section = pytest.mark.parametrize("case", SECTIONS)


def rounding(case: str) -> float:
    """Share of the largest logit by which a model may differ from its base that computes the same.

    Full and bottleneck adapters are exact; LoRA multiplies rows as a matrix, where a BLAS may round otherwise, and
    PiSSA's products cancel.
    """
    exact = {"full": 0.0, "adapter": 0.0, "soft_prompt": 0.0, "lora": 1e-5 if case == "lora-pissa" else 1e-6}
    # Prompts inside attention need a mask, with which another kernel computes.
    return exact.get(SECTIONS[case].type, 1e-6)


def tied_head(model) -> str:
    """The first name of the head's weight, which may be that of the embeddings."""
    return next(name for name, parameter in model.named_parameters() if parameter is model.lm_head.weight)


def stacks(architecture: str) -> dict[str, torch.Size]:
    """Name of each stack of experts -> [E, O, I]."""
    model = tiny_model(architecture)
    return {name: model.get_parameter(name).shape for name in stacked_experts(model)}


def test_the_table_and_the_schema_know_the_same_methods():
    union, _ = get_args(Method)
    names = {get_args(section.model_fields["type"].annotation)[0] for section in get_args(union)}
    assert set(METHODS) == names
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}


def test_the_cases_cover_the_table():
    assert {section.type for section in SECTIONS.values()} == set(METHODS)


@pytest.mark.parametrize(("architecture", "case"), REFUSED)
def test_what_has_no_place_is_refused_with_the_reason(architecture, case):
    model = tiny_model(architecture)
    with pytest.raises(UserError, match=re.escape(REFUSED[architecture, case])):
        method_of(case).apply(model, section_of(architecture, case), seed=0)
    assert not [name for name, _ in model.named_modules() if "prompt" in name or "prefix" in name]


@every_case
def test_starts_as_the_base(architecture, case):
    before = logits(tiny_model(architecture))
    after = logits(applied(architecture, case))
    if case in ("soft_prompt", "prefix"):
        # What is seen before the first token changes all that follows; a prompt cannot start as none.
        assert not torch.allclose(before, after)
        return
    assert (after - before).abs().max() <= rounding(case) * before.abs().max()


@every_case
def test_only_what_is_meant_trains_and_gets_a_gradient(architecture, case):
    model = applied(architecture, case)
    base = {name for name, _ in tiny_model(architecture).named_parameters()}
    norms = {f"{path}.{name}" for path, norm in norm_modules(model).items() for name, _ in norm.named_parameters()}
    expected = {
        "full": base,
        "lora": {name for name, _ in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))},
        "adapter": {name for name, _ in model.named_parameters() if ".adapter." in name},
        "soft_prompt": {name for name, _ in model.named_parameters() if name.endswith(".prompt_embeddings")},
        "prefix": {name for name, _ in model.named_parameters() if ".prefix." in name},
        "llama_adapter": {name for name, _ in model.named_parameters() if ".gated_prompt." in name},
    }
    expected["lora-pissa"] = expected["lora"]
    expected["lora-dora"] = expected["lora"] | {
        name for name, _ in model.named_parameters() if name.endswith(".lora_magnitude")
    }
    expected["lora-modules"] = expected["lora"] | {tied_head(model)}
    expected["adapter-norms"] = expected["adapter"] | norms
    expected["adapter-parallel"] = expected["adapter"]
    assert set(trained(model)) == expected[case]
    assert all(parameter.dtype == torch.float32 for parameter in trained(model).values())

    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    loss(model).backward()
    # B = 0 leaves A without a gradient in the first step, and `up` = 0 does so to `down`.
    optimizer.step()
    optimizer.zero_grad()
    loss(model).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.count_nonzero() > 0, name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, frozen[name]), name


@every_case
def test_saved_and_loaded_gives_equal_bits(architecture, case, tmp_path):
    model, method = applied(architecture, case), method_of(case)
    perturb(model)
    method.save(model, section_of(architecture, case), tmp_path, IDENTITY)
    fresh = tiny_model(architecture)
    section = method.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.equal(logits(fresh), logits(tiny_model(architecture)))
    assert set(trained(fresh)) == set(trained(model))
    assert section.type == section_of(architecture, case).type


@every_case
def test_state_goes_into_another_model(architecture, case):
    source, target, method = applied(architecture, case), applied(architecture, case, seed=2), method_of(case)
    perturb(source)
    method.load_state(target, method.trained_state(source))
    assert torch.equal(logits(source), logits(target))


@every_section
def test_same_weights_same_bytes(case, tmp_path):
    hashes = []
    for run in ("a", "b"):
        model = applied("llama", case)
        perturb(model)
        method_of(case).save(model, SECTIONS[case], tmp_path / run, IDENTITY)
        (weights,) = (tmp_path / run).glob("*.safetensors")
        hashes.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


@every_section
def test_start_follows_from_the_seed_alone(case):
    def state(seed, *, draws=0):
        torch.rand(draws)
        return method_of(case).trained_state(applied("llama", case, seed=seed))

    first, before = state(1), torch.get_rng_state()
    again, other = state(1, draws=3), state(2)
    torch.rand(3)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.items()) == (case == "full")
    torch.set_rng_state(before)
    model = tiny_model("llama")
    method_of(case).apply(model, SECTIONS[case], seed=5)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"


@every_section
def test_modules_start_differently(case):
    state = method_of(case).trained_state(applied("llama", case))
    starts = [tensor for name, tensor in state.items() if name.endswith(("lora_A.weight", "adapter.down.weight"))]
    assert len({tensor.flatten()[0].item() for tensor in starts}) == len(starts)


@every_case
def test_on_a_model_without_memory(architecture, case, tmp_path):
    """A plan counts parameters, and a merge reads names and layouts, from a model on the meta device."""
    source, method = applied(architecture, case), method_of(case)
    with torch.device("meta"):
        empty, loaded = (type(source)(source.config) for _ in range(2))
    method.apply(empty, section_of(architecture, case), seed=1)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert report(empty) == report(source)
    assert list(method.trained_state(empty)) == list(method.trained_state(source))
    if method.name != "full":
        method.save(source, section_of(architecture, case), tmp_path, IDENTITY)
        method.load(loaded, tmp_path)
        assert report(loaded) == report(source)


@every_section
def test_a_state_that_does_not_fit_is_refused_by_name(case):
    method, model = method_of(case), applied("llama", case)
    state = method.trained_state(model)
    first, second = (*state, None)[:2]
    broken = {name: tensor for name, tensor in state.items() if name != first}
    broken |= {"model.unknown": torch.zeros(1)} | ({second: torch.zeros(3)} if second is not None else {})
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(UserError) as caught:
        method.load_state(model, broken)
    problems = [f"the saved weights lack: {first}", "the saved weights do not fit this model: model.unknown"]
    if second is not None:
        shape = list(state[second].shape)
        problems.append(f"the saved weights have another shape: {second} [3] in place of {shape}")
    assert [problem.what for problem in caught.value.problems] == problems
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.trained_state(model).items())


@every_section
def test_every_tensor_is_gathered(case):
    model, seen = applied("llama", case), []

    def gather(tensor):
        assert not tensor.requires_grad
        seen.append(tensor)
        return tensor * 2

    plain, whole = method_of(case).trained_state(model), method_of(case).trained_state(model, gather=gather)
    assert len(seen) >= len({tensor.data_ptr() for tensor in whole.values()})
    assert all(torch.equal(plain[name] * 2, tensor) for name, tensor in whole.items())


@every_section
def test_a_given_state_is_what_is_saved(case, tmp_path):
    """Under fully_shard the model holds shards: the gathered state must be written, not the model's."""
    method, model, other = method_of(case), applied("llama", case), applied("llama", case)
    perturb(other)
    method.save(model, SECTIONS[case], tmp_path, IDENTITY, state=method.trained_state(other))
    fresh = tiny_model("llama")
    method.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(other))


@every_case
def test_checkpointing_changes_no_bit(architecture, case):
    gradients = []
    for checkpointing in (False, True):
        model = applied(architecture, case).train()
        perturb(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss(model).backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
    # Where a layer's input is used several times, recomputing may add its gradients in another order.
    tolerance = 1e-6 if (architecture, case) == ("qwen3_5", "soft_prompt") else 0.0
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= tolerance * gradient.abs().max(), name


@every_case
def test_the_base_is_there_while_disabled(architecture, case):
    method, model = method_of(case), applied(architecture, case)
    perturb(model)
    tuned = logits(model)
    if not method.keeps_base(section_of(architecture, case)):
        assert case in ("full", "adapter-norms", "lora-modules")
        return
    base = logits(tiny_model(architecture))
    with method.disabled(model):
        inside = logits(model)
    assert (inside - base).abs().max() <= rounding(case) * base.abs().max()
    with pytest.raises(RuntimeError), method.disabled(model):
        raise RuntimeError
    assert torch.equal(logits(model), tuned)


@every_case
def test_merging_equals_the_adapted_model(architecture, case):
    method, model = method_of(case), applied(architecture, case)
    if method.merge_refusal is not None:
        with pytest.raises(AssertionError):
            list(method.deltas(model, method.trained_state(model), section_of(architecture, case)))
        return
    perturb(model)
    merged, changed = tiny_model(architecture), set()
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in method.deltas(merged, method.trained_state(model), section_of(architecture, case)):
            weight = parameters[name]
            assert torch.equal(delta(weight), delta(weight))
            assert delta(weight).dtype == torch.float32
            weight.copy_(merged_weight(weight, delta))
            changed.add(name)
    replaced = {"lm_head.weight", tied_head(merged)} if case == "lora-modules" else set()
    experts = set(stacks(architecture)) if case in ("lora", "lora-modules") else set()
    assert changed == {f"{path}.weight" for path in linear_modules(merged)} | replaced | experts
    adapted = logits(model)
    # Qwen 3.5's recurrence carries the rounding of one token's products into all that follow.
    assert (logits(merged) - adapted).abs().max() <= (5e-5 if architecture == "qwen3_5" else 1e-5)


@every_case
def test_report_counts(architecture, case):
    base = report(tiny_model(architecture)).total_parameters
    norms = sum(p.numel() for norm in norm_modules(tiny_model(architecture)).values() for p in norm.parameters())
    shapes = [linear_shape(layer) for layer in linear_modules(tiny_model(architecture)).values()]
    layers = tiny_model(architecture).config.num_hidden_layers
    # Two adapters a block of 2md + d + m parameters.
    adapters, narrow = (2 * layers * (2 * m * WIDTH + WIDTH + m) for m in (BOTTLENECK, WIDTH // 6))
    inserted = {"full": 0, "lora": sum(4 * (i + o) for i, o in shapes)}
    if case in ("lora", "lora-modules"):
        inserted["lora"] += sum(4 * e * (i + o) for e, o, i in stacks(architecture).values())
    inserted |= {"adapter": adapters, "adapter-norms": adapters, "adapter-parallel": narrow}
    # Of 5 rows: of the model's width; of its keys and values in every layer; of its width in one, with a gate.
    heads, width = key_value_shape(tiny_model(architecture).config)
    inserted |= {"soft_prompt": 5 * WIDTH, "prefix": 5 * 2 * layers * heads * width, "llama_adapter": 5 * WIDTH + 1}
    # A length for every row.
    inserted["lora-dora"] = inserted["lora"] + sum(o for _, o in shapes)
    # What PiSSA starts from is kept beside what trains, and saved.
    saved = inserted | {"full": base, "adapter-norms": adapters + norms, "lora-pissa": 2 * inserted["lora"]}
    inserted["lora-pissa"] = saved["lora-pissa"]
    head = WIDTH * VOCAB_SIZE
    trains = saved | {"lora-pissa": inserted["lora"], "lora-modules": inserted["lora"] + head}
    inserted["lora-modules"] = inserted["lora"]
    # A tied weight is saved under both of its names.
    saved["lora-modules"] = trains["lora-modules"] + (head if architecture in TIED else 0)
    result = report(applied(architecture, case), method_of(case))
    assert result.trainable_parameters == trains[case]
    assert result.total_parameters == base + inserted[case]
    assert result.share == trains[case] / (base + inserted[case])
    assert result.saved_bytes == 4 * saved[case]


def test_report_tells_precisions_apart():
    model = tiny_model("llama").bfloat16()
    METHODS["lora"].apply(model, SECTIONS["lora"], seed=0)
    trained_part, frozen_part = report(model).precision
    assert (trained_part.dtype, trained_part.trained) == (torch.float32, True)
    assert (frozen_part.dtype, frozen_part.trained) == (torch.bfloat16, False)
    assert trained_part.parameters + frozen_part.parameters == report(model).total_parameters


@every_section
def test_the_saved_size_is_nearly_that_of_the_file(case, tmp_path):
    model = applied("llama", case)
    method_of(case).save(model, SECTIONS[case], tmp_path, IDENTITY)
    (weights,) = tmp_path.glob("*.safetensors")
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.stat().st_size - header == report(model, method_of(case)).saved_bytes


@every_case
def test_a_bfloat16_base_trains_float32_masters(architecture, case):
    model = tiny_model(architecture).bfloat16()
    names = {name for name, _ in model.named_parameters()}
    method_of(case).apply(model, section_of(architecture, case), seed=0)
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if name in names and not trains else torch.float32), name
    perturb(model)
    compute_in(model, torch.bfloat16)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        loss(model).backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
        assert gradient.count_nonzero() > 0, name
        # As above, in bfloat16.
        tolerance = 2e-2 if (architecture, case) == ("qwen3_5", "soft_prompt") else 0.0
        assert (gradient - gradients[1][name]).abs().max() <= tolerance * gradient.abs().max(), name


@every_case
def test_in_bfloat16_it_starts_loads_and_merges_too(architecture, case, tmp_path):
    """What a run computes: a frozen bfloat16 base, float32 masters that are cast where they are used."""
    method, section = method_of(case), section_of(architecture, case)

    half = partial(computing, architecture, torch.bfloat16)
    base, model = half(lambda fresh: None), half(lambda fresh: method.apply(fresh, section, seed=1))

    def apart(one, other):
        """Share of the largest logit; of most of Mixtral's tokens: for some the router chooses otherwise."""
        by_token = (logits(one) - logits(other)).abs().amax(-1).flatten().float() / logits(other).abs().max().float()
        return by_token.quantile(0.8 if architecture == "mixtral" else 1.0)

    # Steps of bfloat16 (2**-8), a few in a row; a recurrence carries them on.
    tolerance = 2**-3 if architecture == "qwen3_5" else 2**-5
    if case not in ("soft_prompt", "prefix"):
        assert apart(model, base) <= tolerance
    perturb(model)
    method.save(model, section, tmp_path, IDENTITY)
    loaded = half(lambda fresh: method.load(fresh, tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    if method.merge_refusal is not None:
        return
    merged = tiny_model(architecture).bfloat16()
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in method.deltas(merged, method.trained_state(model), section):
            parameters[name].copy_(merged_weight(parameters[name].float(), delta))
    assert apart(merged, model) <= tolerance


def test_a_fresh_process_loads_the_same_bits(tmp_path):
    """All cases in one process: starting it costs more than all of them."""
    for architecture, case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            directory, section = tmp_path / str(dtype) / architecture / case, section_of(architecture, case)
            model = computing(
                architecture,
                dtype,
                lambda fresh, case=case, section=section: method_of(case).apply(fresh, section, seed=1),
            )
            perturb(model)
            method_of(case).save(model, section, directory, IDENTITY)
            torch.save(logits(model), directory / "logits.pt")
    done = subprocess.run([sys.executable, "-m", "tests.methods.cases", str(tmp_path)], text=True, capture_output=True)
    assert (done.returncode, done.stdout.split()) == (0, ["equal"] * 2 * len(CASES)), done.stderr
