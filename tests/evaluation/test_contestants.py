from dataclasses import replace

import pytest
import torch

from ftkit.data.types import Conversation, Message
from ftkit.errors import UserError
from ftkit.evaluation.contestants import leading_target, load_contestants
from ftkit.evaluation.items import Item
from ftkit.evaluation.metrics import Truth
from ftkit.methods.files import BaseIdentity
from ftkit.models.load import fingerprint
from ftkit.recipe.load import dump_recipe, load_recipe
from ftkit.runs import ENVIRONMENT, RECIPE, find_target
from tests.artifacts.adapters import open_base, write_pair
from tests.methods.cases import SECTIONS, applied, logits, method_of, perturb
from tests.tiny_models import CHATML, save_tiny, tiny_tokenizer
from tests.tiny_runs import write_recipe

LOUD = "{% if loud %}LOUD {% endif %}" + CHATML


@pytest.fixture
def run(tmp_path):
    """A run with a base, an adapter, a chat template of its own and keywords for it."""
    pair = write_pair(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    pair.adapter.rename(run / "adapter")
    tiny_tokenizer(LOUD).save_pretrained(run / "adapter")
    config = run / "adapter" / "adapter_config.json"
    assert str(pair.base_directory) in config.read_text()
    recipe = load_recipe(write_recipe(tmp_path), [f"base_model={pair.base_directory}", "data.max_length=64"]).recipe
    data = recipe.data.model_copy(update={"chat_template_kwargs": {"loud": True}})
    (run / RECIPE).write_text(dump_recipe(recipe.model_copy(update={"data": data})))
    (run / ENVIRONMENT).write_text("{}")
    return run


def load(*targets):
    return load_contestants(
        [find_target(str(target)) for target in targets], mode="auto", dtype=torch.float32, device=torch.device("cpu")
    )


def test_every_model_is_asked_as_the_run_was_trained_wherever_it_stands(run):
    item = Item(Conversation((Message("user", "sky"), Message("assistant", "blue"))), Truth(("blue",)), "here:1")
    for targets in ((run, run.parent / "base"), (run.parent / "base", run)):
        for contestant in load(*targets):
            example = contestant.prompts.answered(item, "blue", 512)
            assert tiny_tokenizer().decode(example.input_ids).startswith("LOUD <|im_start|>user")


def test_a_run_leads_then_what_was_tuned_then_the_first(run):
    base, tuned = find_target(str(run.parent / "base")), find_target(str(run))
    adapter = replace(tuned, run=None)
    assert leading_target([base, adapter, tuned]) is tuned
    assert leading_target([base, adapter]) is adapter
    other = replace(base, label="other")
    assert leading_target([base, other]) is base


def test_an_adapter_is_not_measured_on_a_base_that_has_changed(run):
    load(run)
    save_tiny(run.parent / "base", seed=7)
    with pytest.raises(UserError, match=r"adapter was trained on .*base \(sha256:\w+\), and .* \(sha256:\w+\) are"):
        load(run)
    # One that does not say what it was trained on is taken as it is.
    (run / "adapter" / "ftkit.json").unlink()
    load(run)


@pytest.mark.parametrize("case", ["lora", "adapter", "adapter-norms"])
def test_an_adapter_of_any_method_computes_in_bfloat16(case, tmp_path):
    base = save_tiny(tmp_path / "base")
    model = applied("llama", case)
    perturb(model)
    identity = BaseIdentity(str(base), None, fingerprint(open_base(base)))
    method_of(case).save(model, SECTIONS[case], tmp_path / "adapter", identity)
    target = find_target(str(tmp_path / "adapter"))
    of = {
        dtype: load_contestants([target], mode="raw", dtype=dtype, device=torch.device("cpu"))[0].model
        for dtype in (torch.float32, torch.bfloat16)
    }
    exact, rounded = logits(of[torch.float32]), logits(of[torch.bfloat16])
    assert rounded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; two layers and the head add a few roundings.
    assert (rounded - exact).abs().max() < 2**-5 * exact.abs().max()
