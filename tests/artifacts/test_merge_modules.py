"""Merging and measuring adapters with modules that trained in full."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import merge
from ftkit.errors import UserError
from ftkit.evaluation.contestants import load_contestants
from ftkit.methods import lora
from ftkit.methods.files import BaseIdentity
from ftkit.methods.saved_modules import saved_parameters
from ftkit.models.load import fingerprint, load_weights
from ftkit.recipe.schema import LoraMethod
from tests.artifacts.adapters import Pair, open_base, write_second
from tests.methods.cases import logits, perturb
from tests.tiny_models import tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"


def write_pair(
    directory: Path,
    architecture: str,
    modules: tuple[str, ...],
    *,
    dtype: torch.dtype = torch.float32,
    **more_tensors: str,
) -> Pair:
    """A base in `dtype`, and a LoRA with `modules`; `more_tensors`: name in the base's file -> which to copy there."""
    tiny_model(architecture).to(dtype).save_pretrained(directory / "base")
    tiny_tokenizer().save_pretrained(directory / "base")
    if more_tensors:
        tensors = load_file(directory / "base" / WEIGHTS)
        tensors |= {name.replace("__", "."): tensors[source].clone() for name, source in more_tensors.items()}
        save_file(tensors, directory / "base" / WEIGHTS, metadata={"format": "pt"})
    base = open_base(directory / "base")
    section = LoraMethod(type="lora", rank=4, alpha=6.0, modules_to_save=modules)
    model = load_weights(base, dtype=torch.float32)
    lora.apply(model, section, seed=1)
    perturb(model)
    with torch.no_grad():
        for parameter in saved_parameters(model).values():
            # Digits finer than the base's: without them W + (W' - W) is W' by chance.
            parameter.mul_(0.37)
    lora.save(model, section, directory / "adapter", BaseIdentity(base.name, None, fingerprint(base)))
    tiny_tokenizer().save_pretrained(directory / "adapter")
    return Pair(base, directory / "adapter", section)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "modules", "replaced"),
    [
        # Untied; tied; tied, with the base's prefix left out in the file.
        ("mistral", ("lm_head", "norm"), {"lm_head.weight", "model.norm.weight"}),
        ("llama", ("lm_head",), {"model.embed_tokens.weight"}),
        ("gpt2", ("wte", "ln_f"), {"transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}),
    ],
)
def test_a_replaced_tensor_is_the_tuned_one_cast(architecture, modules, replaced, dtype, tmp_path):
    pair = write_pair(tmp_path, architecture, modules, dtype=dtype)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    tuned = load_file(pair.adapter / "adapter_model.safetensors")
    before, after = (load_file(tmp_path / place / WEIGHTS) for place in ("base", "merged"))
    assert before.keys() == after.keys()
    assert replaced <= after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == report.tensors_changed
    for name in replaced:
        assert torch.equal(after[name], tuned[f"base_model.model.{name}"].to(dtype)), name
    assert all("proj" in name or "c_" in name for name in changed - replaced)


def test_a_base_that_stores_a_tied_weight_twice_stays_tied(tmp_path):
    """transformers ties what is equal in both places: one of them left as it was would cut the tie."""
    pair = write_pair(tmp_path, "llama", ("embed_tokens",), lm_head__weight="model.embed_tokens.weight")
    merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    after = load_file(tmp_path / "merged" / WEIGHTS)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (logits(model) - logits(pair.adapted())).abs().max() <= 1e-5


def test_a_replaced_module_merges_beside_an_adapter_that_leaves_it_alone_and_not_at_a_weight(tmp_path):
    pair = write_pair(tmp_path, "llama", ("lm_head",))
    second = write_second(pair, tmp_path / "second", targets=("q_proj",))
    report = merge([WeightedAdapter(pair.target), WeightedAdapter(second, 0.5)], tmp_path / "merged")
    assert report.max_abs_logit_difference <= 1e-5 * report.max_abs_logit
    after, tuned = (load_file(path) for path in (tmp_path / "merged" / WEIGHTS, pair.adapter / f"adapter_{WEIGHTS}"))
    assert torch.equal(after["model.embed_tokens.weight"], tuned["base_model.model.lm_head.weight"])
    what = r"trained (model\.embed_tokens|lm_head) in full \(modules_to_save\); merge it at weight 1"
    for adapters in ([WeightedAdapter(pair.target, 0.5)], [WeightedAdapter(pair.target)] * 2):
        with pytest.raises(UserError, match=what):
            merge(adapters, tmp_path / "other")


def test_the_base_is_measured_as_it_was(tmp_path):
    """It is gone from the model that its modules trained in: another one is loaded."""
    pair = write_pair(tmp_path, "llama", ("lm_head",))
    base = pair.target.__class__("base", pair.base, None, None, None, None)
    tuned, plain = load_contestants([pair.target, base], mode="raw", dtype=torch.float32, device=torch.device("cpu"))
    expected = logits(load_weights(pair.base, dtype=torch.float32))
    assert torch.equal(logits(plain.model), expected)
    assert (logits(tuned.model) - logits(pair.adapted())).abs().max() <= 1e-6
    assert (logits(tuned.model) - expected).abs().max() > 0.1
