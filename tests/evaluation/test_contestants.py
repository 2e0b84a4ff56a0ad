from dataclasses import replace

import pytest
import torch

from ftkit.data.types import Conversation, Message
from ftkit.errors import UserError
from ftkit.evaluation import contestants
from ftkit.evaluation.compare import evaluate_models
from ftkit.evaluation.contestants import leading_target, load_contestants
from ftkit.evaluation.items import Item
from ftkit.evaluation.metrics import Truth
from ftkit.methods.files import BaseIdentity
from ftkit.models.load import fingerprint, load_weights
from ftkit.recipe.load import dump_recipe, load_recipe
from ftkit.runs import ENVIRONMENT, RECIPE, find_target
from tests.artifacts.adapters import open_base, whole_model, write_pair, write_second
from tests.evaluation.test_compare import color_task
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_one_base_share_its_weights_and_compute_what_they_compute_alone(dtype, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    for name in ("lora", "lora-dora", "adapter"):
        model = applied("llama", name)
        perturb(model)
        identity = BaseIdentity(str(base), None, fingerprint(open_base(base)))
        method_of(name).save(model, SECTIONS[name], tmp_path / name, identity)
    targets = [find_target(str(tmp_path / name)) for name in ("lora", "lora-dora", "base", "adapter")]

    def load_together(targets):
        return load_contestants(targets, mode="raw", dtype=dtype, device=torch.device("cpu"))

    alone = [logits(load_together([target])[0].model) for target in targets]
    loaded = count_loads(monkeypatch)
    models = [contestant.model for contestant in load_together(targets)]
    assert len(loaded) == 1
    shared = {parameter.data_ptr() for parameter in models[2].parameters()}
    assert all(shared <= {parameter.data_ptr() for parameter in model.parameters()} for model in models)
    # In any order, and again: nothing that one of them does is seen by another.
    for index in (0, 3, 1, 2, 0, 2):
        assert torch.equal(logits(models[index]), alone[index]), index
    assert len({tensor.sum().item() for tensor in alone}) == 4


def test_two_adapters_are_compared_with_the_scores_of_separate_loads(tmp_path, monkeypatch):
    pair = write_pair(tmp_path)
    second = write_second(pair, tmp_path / "second", targets="all-linear")
    targets = [pair.target, second, whole_model(pair.base)]

    def scores(targets):
        found = load_contestants(targets, mode="raw", dtype=torch.float32, device=torch.device("cpu"))
        return [result.score for result in evaluate_models(found, [color_task(("perplexity",))]).results]

    separate = [scores([target])[0] for target in targets]
    loaded = count_loads(monkeypatch)
    assert scores(targets) == separate
    assert len(loaded) == 1
    assert len(set(separate)) == 3


def count_loads(monkeypatch):
    """A list that gets the base of every model whose weights are read from now on."""
    loaded = []

    def counting(base, **keywords):
        loaded.append(base)
        return load_weights(base, **keywords)

    monkeypatch.setattr(contestants, "load_weights", counting)
    return loaded
