"""What training changed, against decompositions of the whole matrices by numpy."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftkit.artifacts.inspection import Change, Inspection, inspect_adapter, inspect_factors, inspect_model
from ftkit.console import Console
from ftkit.errors import UserError
from ftkit.models.load import load_weights
from ftkit.recipe.schema import LoraMethod
from tests.artifacts.adapters import Pair, open_base, tensors, write_lora, write_pair
from tests.tiny_models import tiny_model

BOTH = ("experts.gate_up_proj", "experts.down_proj")
QUIET = Console(quiet=True)


def inspected(pair: Pair, *names: str) -> Inspection:
    return inspect_adapter(pair.target, console=QUIET, names=names)


def second(pair: Pair, directory: Path, section: LoraMethod) -> Pair:
    """Another adapter of the same base."""
    write_lora(pair.base, section, directory)
    return Pair(pair.base, directory, section)


def check_low_rank(change: Change, update: Tensor, weight: Tensor, rank: int, *, tolerance: float = 1e-9) -> None:
    """Every figure of an adapted layer, from dW and W [O, I] in full. The files' float32 values are exact in float64.

    Args:
        tolerance: relative, of the largest singular value where a singular value is compared.
    """
    assert (change.rank, change.shape) == (rank, tuple(update.shape))
    dense, base = update.double().numpy(), weight.double().numpy()
    u, values, v = np.linalg.svd(dense)
    found = change.spectrum.values_K.numpy()
    np.testing.assert_allclose(found, values[: len(found)], rtol=0, atol=tolerance * values[0])
    assert values[len(found) :].max(initial=0) <= max(tolerance, 1e-7) * values[0]
    norm = np.linalg.norm(dense)
    assert change.relative_norm == pytest.approx(norm / np.linalg.norm(base), rel=tolerance)
    projected = np.linalg.norm(u[:, :rank].T @ base @ v[:rank].T)
    assert change.amplification == pytest.approx(norm / projected, rel=100 * tolerance)
    shares = values[values > 0] / values.sum()
    entropy = -(shares * np.log(shares)).sum()
    assert change.spectrum.effective_rank == pytest.approx(math.exp(entropy), rel=1000 * tolerance)
    held = np.cumsum(values**2) / (values**2).sum()
    for share in (0.5, 0.9, 0.99):
        assert change.spectrum.rank_holding(share) == int(np.searchsorted(held, share)) + 1


def dense_updates(directory: Path, scale: float) -> dict[str, Tensor]:
    """Path -> scale * B A [O, I] in float64, from an adapter's file alone."""
    state = load_file(directory / "adapter_model.safetensors")
    paths = [n.split(".", 2)[2].removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")]
    found = {}
    for path in paths:
        a, b = (state[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        found[path] = scale * (b @ a)
    return found


def rename(directory: Path, old: str, new: str) -> None:
    """Change what the names of a model's weights begin with."""
    (file,) = directory.glob("*.safetensors")
    state = {re.sub(rf"^{re.escape(old)}", new, name): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


# --- LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_every_layer_as_numpy_decomposes_it(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """GPT-2 stores its weights [I, O], under names without its prefix; Mixtral's layers lie under other names."""
    targets = ("q_proj", "o_proj") if architecture == "mixtral" else "all-linear"
    pair = write_pair(tmp_path, architecture, dtype=dtype, targets=targets)
    inspection = inspected(pair)
    updates = dense_updates(pair.adapter, 1.5)
    assert [change.name for change in inspection.changes] == sorted(updates)
    weights = dict(load_weights(pair.base, dtype=torch.float32).named_parameters())
    for change in inspection.changes:
        weight = weights[f"{change.name}.weight"].detach()
        check_low_rank(change, updates[change.name], weight.t() if architecture == "gpt2" else weight, 4)
    assert (inspection.label, inspection.base, inspection.notes) == (str(pair.adapter), pair.base.name, ())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
def test_a_dora_changes_what_peft_merges(tmp_path: Path) -> None:
    """Its update is of full rank; the figures are those of the weights that peft writes, in its float32."""
    pair = write_pair(tmp_path)
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("q_proj", "down_proj"), dora=True)
    pair = second(pair, tmp_path / "dora", section)
    merged = PeftModel.from_pretrained(load_weights(pair.base, dtype=torch.float32), pair.adapter).merge_and_unload()
    weights = tensors(pair.base_directory)
    inspection = inspected(pair)
    assert len(inspection.changes) == 4
    for change in inspection.changes:
        name = f"{change.name}.weight"
        update = merged.state_dict()[name].double() - weights[name].double()
        assert len(change.spectrum.values_K) == 32
        check_low_rank(change, update, weights[name], 2, tolerance=3e-6)


def test_rank_stabilised_scales_and_patterns(tmp_path: Path) -> None:
    section = LoraMethod(
        type="lora",
        rank=4,
        alpha=6.0,
        targets=("q_proj", "k_proj"),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.k_proj": 10.0},
        rank_stabilized=True,
    )
    pair = second(write_pair(tmp_path), tmp_path / "other", section)
    scales = {"q_proj": (6 / math.sqrt(2), 2), "0.self_attn.k_proj": (3.0, 4), "1.self_attn.k_proj": (5.0, 4)}
    updates, weights = dense_updates(pair.adapter, 1.0), tensors(pair.base_directory)
    changes = inspected(pair).changes
    assert len(changes) == 4
    for change in changes:
        scale, rank = next(value for end, value in scales.items() if change.name.endswith(end))
        check_low_rank(change, scale * updates[change.name], weights[f"{change.name}.weight"], rank)


def test_a_pissa_is_the_lora_of_twice_the_rank_that_is_saved(tmp_path: Path) -> None:
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("q_proj",), init="pissa")
    pair = second(write_pair(tmp_path), tmp_path / "pissa", section)
    updates, weights = dense_updates(pair.adapter, 2.0), tensors(pair.base_directory)
    for change in inspected(pair).changes:
        check_low_rank(change, updates[change.name], weights[f"{change.name}.weight"], 4)


@pytest.mark.parametrize("stored", ["model.embed_tokens", "lm_head"])
def test_modules_that_trained_in_full_are_compared_with_the_base(stored: str, tmp_path: Path) -> None:
    """The tied head is the embedding, and stands once, under the name in the base's files; norms have no spectrum."""
    saved = ("embed_tokens", "lm_head", "input_layernorm")
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("q_proj",), modules_to_save=saved)
    pair = second(write_pair(tmp_path), tmp_path / "other", section)
    file, name = pair.adapter / "adapter_model.safetensors", "base_model.model.model.embed_tokens.weight"
    state = load_file(file)
    # Trained as one, and saved under both names.
    state["base_model.model.lm_head.weight"] = state[name].clone()
    save_file(state, file)
    rename(pair.base_directory, "model.embed_tokens", stored)
    inspection = inspected(pair)
    (change,) = [change for change in inspection.changes if change.rank is None]
    assert change.name == stored
    weight = tensors(pair.base_directory)[f"{stored}.weight"].double()
    values = np.linalg.svd((state[name].double() - weight).numpy(), compute_uv=False)
    np.testing.assert_allclose(change.spectrum.values_K.numpy(), values, rtol=1e-8)
    assert change.relative_norm == pytest.approx(float(np.linalg.norm(values) / weight.norm()))
    assert change.amplification is None
    layers = [f"model.layers.{layer}.input_layernorm" for layer in (0, 1)]
    assert inspection.notes == (f"{', '.join(layers)} trained in full too, and has no spectrum",)


# --- experts


def expert_updates(directory: Path, scale: float) -> dict[str, Tensor]:
    """Name of a stack -> scale * B A of every expert [E, O, I], by peft's own formula."""
    state = load_file(directory / "adapter_model.safetensors")
    found = {}
    for layer in (0, 1):
        for begin, own in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
            path = f"model.layers.{layer}.mlp.experts"
            a, b = (state[f"base_model.model.{path}.{begin}lora_{part}.weight"].double() for part in "AB")
            a, b = a.reshape(8, -1, a.shape[1]), b.reshape(b.shape[0], -1, 8)
            found[f"{path}.{own}"] = scale * torch.einsum("o r e, e r i -> e o i", b, a)
    return found


def stack_files(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the experts as the running model has them, in place of one by one."""
    (file,) = directory.glob("*.safetensors")
    others = {name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}
    stacks = {name: tensor.detach().contiguous() for name, tensor in weights.items() if ".experts." in name}
    save_file(others | stacks, file, metadata={"format": "pt"})


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_one_by_one_whichever_way_the_files_hold_them(stacked: bool, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "mixtral", targets=("q_proj",))
    section = LoraMethod(type="lora", rank=3, alpha=6.0, targets=("q_proj",), target_parameters=BOTH)
    pair = second(pair, tmp_path / "experts", section)
    weights = dict(load_weights(pair.base, dtype=torch.float32).named_parameters())
    if stacked:
        stack_files(pair.base_directory, weights)
    inspection, updates = inspected(pair), expert_updates(pair.adapter, 2.0)
    assert len(inspection.changes) == 2 * (1 + 8 + 8)
    by_name = {change.name: change for change in inspection.changes}
    for name, of_experts in updates.items():
        for expert, update in enumerate(of_experts):
            check_low_rank(by_name[f"{name}[{expert}]"], update, weights[name].detach()[expert], 3)
    chosen = inspected(pair, "experts.down_proj").changes
    assert [change.name for change in chosen[:2]] == [f"model.layers.0.mlp.experts.down_proj[{n}]" for n in (0, 1)]
    assert len(chosen) == 16


def test_experts_without_their_base(tmp_path: Path) -> None:
    """The names of peft's file tell which is which, whether one or both projections are adapted, and however named."""
    pair = write_pair(tmp_path, "mixtral", targets=("q_proj",))
    for number, names in enumerate((BOTH, BOTH[:1], BOTH[1:], ("down_proj",))):
        section = LoraMethod(
            type="lora",
            rank=3,
            alpha=6.0,
            targets=("q_proj",),
            target_parameters=names,
            rank_pattern={names[-1]: 2},
        )
        one = second(pair, tmp_path / f"experts-{number}", section)
        if names == ("down_proj",):
            # As a user of peft may write it; every layer's path ends in something that this could be the parameter of.
            file = one.adapter / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": list(names)}))
        with_base, without = inspected(one), inspect_factors("x", one.adapter)
        assert [change.name for change in without.changes] == [change.name for change in with_base.changes]
        for theirs, ours in zip(with_base.changes, without.changes, strict=True):
            assert (ours.rank, ours.shape) == (theirs.rank, theirs.shape)
            torch.testing.assert_close(ours.spectrum.values_K, theirs.spectrum.values_K)


def test_experts_that_trained_in_full(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "mixtral", targets=("q_proj",))
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("q_proj",), modules_to_save=("experts",))
    pair = second(pair, tmp_path / "tuned", section)
    changes = {change.name: change for change in inspected(pair).changes}
    assert len(changes) == 2 * (1 + 16)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tuned = load_file(pair.adapter / "adapter_model.safetensors")[f"base_model.model.{name}"]
    before = dict(load_weights(pair.base, dtype=torch.float32).named_parameters())[name].detach()
    for expert in range(8):
        values = np.linalg.svd((tuned[expert].double() - before[expert].double()).numpy(), compute_uv=False)
        np.testing.assert_allclose(changes[f"{name}[{expert}]"].spectrum.values_K.numpy(), values, rtol=1e-8)


# --- without a base


def test_without_the_base_there_are_spectra_alone(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    with_base, without = inspected(pair), inspect_factors("x", pair.adapter)
    assert (without.label, without.base, without.notes) == ("x", None, ())
    for theirs, ours in zip(with_base.changes, without.changes, strict=True):
        assert replace(theirs, relative_norm=None, amplification=None, spectrum=ours.spectrum) == ours
        torch.testing.assert_close(ours.spectrum.values_K, theirs.spectrum.values_K)


def test_what_needs_the_base_is_said(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("q_proj",), modules_to_save=("lm_head",))
    notes = inspect_factors("x", second(pair, tmp_path / "saved", section).adapter).notes
    assert notes == ("lm_head.weight, model.embed_tokens.weight trained in full: what changed needs the base",)
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("q_proj",), dora=True)
    with pytest.raises(UserError, match=r"x is a DoRA: .* depends on the weights of its base.*name it with --base"):
        inspect_factors("x", second(pair, tmp_path / "dora", section).adapter)


def test_embeddings_with_factors_of_their_own_are_refused(tmp_path: Path) -> None:
    """As peft writes them where `target_modules` names an embedding."""
    pair = write_pair(tmp_path)
    file = pair.adapter / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file(load_file(file) | {name: torch.zeros(4, 320)}, file)
    with pytest.raises(UserError, match=r"holds .*lora_embedding_A, which is of no linear layer; merge it into its"):
        inspect_factors("x", pair.adapter)


# --- full runs


def write_tuned(pair: Pair, directory: Path, changes: Mapping[str, Tensor]) -> Path:
    """A model whose weights are the base's plus these, in float32."""
    model = load_weights(pair.base, dtype=torch.float32)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_parameter(name).add_(change)
    model.save_pretrained(directory)
    return directory


def planted(values: list[float], out: int, into: int) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(side, len(values), generator=generator)).Q for side in (out, into))
    return u @ torch.diag(torch.tensor(values)) @ v.t()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_full_run_against_its_base(architecture: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, architecture, targets=("c_attn",) if architecture == "gpt2" else ("q_proj",))
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(5)
    noise = {name: torch.randn(p.shape, generator=generator) * 0.01 for name, p in model.named_parameters()}
    tuned = write_tuned(pair, tmp_path / "tuned", noise)
    inspection = inspect_model("tuned", open_base(tuned), pair.base, console=QUIET)
    before, after = tensors(pair.base_directory), tensors(tuned)
    matrices = {name: value for name, value in after.items() if value.ndim == 2}
    assert {change.name for change in inspection.changes} == {name.removesuffix(".weight") for name in matrices}
    for change in inspection.changes:
        name = f"{change.name}.weight"
        difference = (after[name].double() - before[name].double()).numpy()
        values = np.linalg.svd(difference, compute_uv=False)
        np.testing.assert_allclose(change.spectrum.values_K.numpy(), values, rtol=0, atol=1e-7 * values[0])
        assert change.relative_norm == pytest.approx(np.linalg.norm(difference) / float(before[name].double().norm()))
        held = np.cumsum(values**2) / (values**2).sum()
        for share in (0.5, 0.9, 0.99):
            assert change.spectrum.rank_holding(share) == int(np.searchsorted(held, share)) + 1
        assert (change.rank, change.amplification) == (None, None)
    vectors = [name for name, value in after.items() if value.ndim == 1]
    moved = max(float((after[n].double() - before[n].double()).norm() / before[n].double().norm()) for n in vectors)
    assert inspection.notes == (f"{len(vectors)} vectors (norms, biases) moved by {moved:.2%} of their norm at most",)


def test_the_ranks_that_hold_shares_of_a_planted_difference(tmp_path: Path) -> None:
    """3 singular values of 4, 2, 1: 16, 4 and 1 of 21 of the squared norm."""
    pair = write_pair(tmp_path)
    name = "model.layers.1.mlp.up_proj"
    tuned = write_tuned(pair, tmp_path / "tuned", {f"{name}.weight": planted([4.0, 2.0, 1.0], 64, 32)})
    changes = {c.name: c for c in inspect_model("t", open_base(tuned), pair.base, console=QUIET).changes}
    spectrum = changes[name].spectrum
    torch.testing.assert_close(spectrum.values_K[:3], torch.tensor([4.0, 2.0, 1.0]).double(), rtol=1e-5, atol=0)
    assert [spectrum.rank_holding(share) for share in (0.5, 0.9, 0.99)] == [1, 2, 3]
    untouched = [change for change in changes.values() if change.name != name]
    assert len(untouched) == 14
    assert all(c.spectrum.norm == 0 and c.relative_norm == 0 and c.spectrum.rank_holding(0.9) == 0 for c in untouched)


def test_weights_that_the_base_lacks_are_named(tmp_path: Path) -> None:
    """Experts that one model's files stack and the other's do not, and a vocabulary that has grown."""
    pair = write_pair(tmp_path, "mixtral", targets=("q_proj",))
    tuned = write_tuned(pair, tmp_path / "tuned", {})
    stack_files(tuned, dict(load_weights(pair.base, dtype=torch.float32).named_parameters()))
    (file,) = tuned.glob("*.safetensors")
    state = load_file(file)
    save_file(state | {"lm_head.weight": torch.cat([state["lm_head.weight"]] * 2)}, file, metadata={"format": "pt"})
    inspection = inspect_model("t", open_base(tuned), pair.base, console=QUIET)
    assert not any(".experts." in change.name for change in inspection.changes)
    assert inspection.notes[-1] == (
        "lm_head, model.layers.0.mlp.experts.down_proj, model.layers.0.mlp.experts.gate_up_proj and 2 more: the base's "
        "files hold no weight of this name and shape; save both with the same transformers' save_pretrained to compare "
        "them"
    )


def test_names_with_and_without_the_models_prefix(tmp_path: Path) -> None:
    """The hub's GPT-2 leaves it out, and models saved by transformers have it."""
    pair = write_pair(tmp_path, "gpt2", targets=("c_attn",))
    tuned = write_tuned(pair, tmp_path / "tuned", {})
    rename(pair.base_directory, "transformer.", "")
    for one, other in ((open_base(tuned), pair.base), (pair.base, open_base(tuned))):
        inspection = inspect_model("t", one, other, console=QUIET)
        assert len(inspection.changes) == 2 + 2 * 4
        assert len(inspection.notes) == 1
    assert len(inspected(pair).changes) == 2


def test_stacks_of_experts_of_a_full_run_are_taken_apart(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "mixtral", targets=("q_proj",))
    weights = dict(load_weights(pair.base, dtype=torch.float32).named_parameters())
    name = "model.layers.0.mlp.experts.down_proj"
    change = torch.zeros_like(weights[name])
    change[5] = planted([3.0, 1.0], 32, 64)
    tuned = write_tuned(pair, tmp_path / "tuned", {})
    stack_files(pair.base_directory, weights)
    stack_files(tuned, {**weights, name: weights[name].detach() + change})
    changes = inspect_model("t", open_base(tuned), pair.base, console=QUIET, names=("down_proj",)).changes
    moved = {change.name: change.spectrum.rank_holding(0.99) for change in changes if change.spectrum.norm > 0}
    assert (len(changes), moved) == (16, {f"{name}[5]": 2})


def test_models_that_have_nothing_in_common(tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "llama")
    other = write_pair(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match=r"t and .* have no weights of one name and shape; name the model that it was"):
        inspect_model("t", other.base, pair.base, console=QUIET)


# --- names


def test_layers_stand_in_the_models_order(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, num_hidden_layers=11, targets=("q_proj",))
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(11)]
    assert [change.name for change in inspected(pair).changes] == names
    assert [change.name for change in inspected(pair, "layers.10.self_attn.q_proj").changes] == names[10:]


def test_names_that_match_nothing(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, targets=("q_proj", "k_proj"))
    with pytest.raises(UserError, match=r"--modules q_prj matches nothing that was trained; did you mean q_proj\?"):
        inspected(pair, "k_proj", "q_prj")
    with pytest.raises(UserError, match=r"--modules zzz matches nothing that was trained; there are k_proj, q_proj"):
        inspect_factors("x", pair.adapter, names=("zzz",))


def test_a_damaged_base_is_named(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    file = pair.base_directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: is damaged .*; copy or download it again"):
        inspected(pair)
