"""Loading: all problems at once, each in one line with its place and the fix; defaults; overrides; writing."""

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ftkit.recipe.load import dump_recipe, load_recipe, resolve
from ftkit.recipe.marked_yaml import parse_yaml
from ftkit.recipe.schema import METHOD_SECTIONS, LoraMethod, Recipe
from tests.recipe.recipes import BASE, load, problems, write

WRONG_VALUES = {
    "misspelt": ("training: {lerning_rate: 1}", "training.lerning_rate: unknown key; did you mean learning_rate?"),
    "text for a number": (
        "training: {learning_rate: fast}",
        "training.learning_rate: expected a number above 0, got the text 'fast'",
    ),
    "quoted number": (
        "training: {max_steps: '100'}",
        "training.max_steps: expected a whole number above 0, got the text '100'; remove the quotes",
    ),
    "grouped digits": (
        "training: {max_steps: 1_000}",
        "training.max_steps: expected a whole number above 0, got the text '1_000'; write 1000",
    ),
    "out of range": (
        "training: {learning_rate: -1}",
        "training.learning_rate: expected a number above 0, got the number -1",
    ),
    "infinite": (
        "training: {learning_rate: .inf}",
        "training.learning_rate: expected a number above 0, got the number inf",
    ),
    "fraction of a step": (
        "training: {max_steps: 2.5}",
        "training.max_steps: expected a whole number above 0, got the number 2.5",
    ),
    "percent": (
        "training: {warmup_steps: 5%}",
        "training.warmup_steps: expected a whole number of at least 0 or a number of at least 0 and below 1, got the"
        " text '5%'; write 0.05",
    ),
    "share of one": (
        "training: {eval_steps: 1.0}",
        "training.eval_steps: expected a whole number of at least 1 or a number above 0 and below 1, got the number"
        " 1.0; write 1",
    ),
    "number or word": (
        "training: {max_tokens_per_device: many}",
        "training.max_tokens_per_device: expected a whole number of at least 8 or auto, got the text 'many'",
    ),
    "switch": (
        "training: {eval_on_start: yes}",
        "training.eval_on_start: expected one of true, false, got the text 'yes'; write true",
    ),
    "number for a switch": (
        "training: {eval_on_start: 1}",
        "training.eval_on_start: expected one of true, false, got the number 1",
    ),
    "word": (
        "training: {lr_scheduler_type: cosin}",
        "training.lr_scheduler_type: expected one of cosine, linear, constant, wsd, got the text 'cosin'; did you mean"
        " cosine?",
    ),
    "number for text": ("output_dir: 5", "output_dir: expected text, got the number 5; put it in quotes"),
    "empty text": ("output_dir: ''", "output_dir: expected text, got empty text"),
    "null": ("seed: null", "seed: expected a whole number of at least 0 and below 4294967296, got nothing"),
    "switch for a number": (
        "seed: true",
        "seed: expected a whole number of at least 0 and below 4294967296, got true",
    ),
    "list for a section": (
        "training: [1]",
        "training: expected a mapping, got a list; write its keys below it: num_train_epochs, max_steps,"
        " global_batch_size, max_tokens_per_device, ...",
    ),
    "name for the model": (
        "model: org/name",
        "model: expected a mapping, got the text 'org/name'; the base model's name belongs to base_model",
    ),
    "number of layers": (
        "training: {gradient_checkpointing: 4}",
        "training.gradient_checkpointing: the number 4 is not in this version; write true to recompute every block",
    ),
    "later optimizer": (
        "training: {optim: adamw_8bit}",
        "training.optim: the text 'adamw_8bit' is not in this version; write adamw; its state takes 8 bytes a trained"
        " parameter",
    ),
    "metric": (
        "training: {metric_for_best_model: accuracy}",
        "training.metric_for_best_model: expected eval_loss or eval_loss_NAME of a validation data set, got 'accuracy'",
    ),
    "unlike anything": (
        "zzz: 1",
        "zzz: unknown key; the keys here are base_model, model, data, method, training, output_dir, seed",
    ),
}

CHOICES = "full, lora, adapter, soft_prompt, prefix, llama_adapter"

METHODS = {
    "type: soft_prompt, init: text": "init: expected one of vocabulary, random, got the text 'text'",
    "type: soft_prompt, init: random, init_text: a": "init_text: a prompt that starts from a text does not start at"
    " random: leave method.init out",
    "type: prefix, zzz: 1": "zzz: unknown key; the keys here are type, num_virtual_tokens, init_std, init_from",
    "type: prefix, prefix_projection: true": "prefix_projection: a prefix trains as it is, not through a network that"
    " makes it (P-Tuning v2); remove it",
    "type: lorra": "type: unknown method, the text 'lorra'; did you mean lora?",
    "type: magic": f"type: unknown method, the text 'magic'; choose one of {CHOICES}",
    "type: [lora]": f"type: unknown method, a list; choose one of {CHOICES}",
    "type: qlora": "type: qlora is no method of its own here; write lora, and set model.quantization: nf4",
    "rank: 8": f"type: required key is missing; choose one of {CHOICES}",
    "type: full, rank: 8": "rank: no key of this method; it belongs to lora; remove it, or change method.type",
    "type: lora, rnak: 8": "rnak: unknown key; did you mean rank?",
    "type: lora, rank: 8.5": "rank: expected a whole number above 0, got the number 8.5",
    "type: lora, lora_ran: 8": "lora_ran: unknown key; did you mean method.rank?",
    "type: lora, targets: []": "targets: expected text or a list of names (at least one), got an empty list",
    "type: lora, targets: [1]": "targets: expected text or a list of names (at least one), got a list",
    "type: lora, targets: '(q'": "targets: (q is not a regular expression: missing ), unterminated subpattern at"
    " position 0",
}

DATASETS = {
    "train.jsonl": ": expected a mapping, got the text 'train.jsonl'; write path: train.jsonl",
    "{name: a}": ".path: required key is missing; add it: A json, jsonl, csv or parquet file, a glob or a directory"
    " (relative to the recipe), or a hub id",
    "{pth: a}": ".path: required key is missing",
    "{path: 5}": ".path: expected text, got the number 5; put it in quotes",
    "{path: a, format: alpacca}": ".format: expected one of alpaca, sharegpt, messages, prompt_completion, text, task,"
    " got the text 'alpacca'; did you mean alpaca?",
    "{path: a, columns: {txt: b}}": ".columns.txt: unknown key; did you mean text?",
    "{path: a, roles: {bot: robot}}": ".roles.bot: expected one of system, user, assistant, tool, got the text 'robot'",
    "{path: a, max_samples: 0}": ".max_samples: expected a whole number above 0, got the number 0",
}

ONE = "data: {train: [{path: a}]"
CONFLICTS = (
    (
        ONE + ", mixing: {epoch_size: 5}}",
        "data.mixing.epoch_size: concat takes every row once an epoch; set data.mixing.strategy: weights, or remove it",
    ),
    (ONE + ", mixing: {stopping: all_exhausted}}", "data.mixing.stopping: concat takes every row once an epoch"),
    ("data: {train: [{path: a, weight: 2}]}", "data.train.0.weight: concat takes every row once an epoch"),
    (ONE + ", eval: [{path: b, weight: 2}]}", "data.eval.0.weight: validation rows are not drawn"),
    (ONE + ", eval: [{path: b, clusters: [x]}]}", "data.eval.0.clusters: validation rows of all clusters are measured"),
    (ONE + ", eval: [{path: b, exclude_clusters: [x]}]}", "data.eval.0.exclude_clusters: validation rows of all"),
    (ONE + ", eval: [{path: b, templates: c, few_shot: 0.5}]}", "data.eval.0.few_shot: validation rows are asked"),
    (ONE + ", eval: [{path: b, templates: c, rationale: 0.5}]}", "data.eval.0.rationale: validation rows are asked"),
    (ONE + ", eval: [{path: b, repeat: 2}]}", "data.eval.0.repeat: each validation row is measured once; remove it"),
    (
        ONE + ", mixing: {strategy: weights, epoch_size: 5, stopping: all_exhausted}}",
        "data.mixing.stopping: epoch_size and stopping both end an epoch; keep one of them",
    ),
    (
        "data: {train: [{path: a, name: x}, {path: b, name: x}]}",
        "data.train.1.name: data.train.0 has the name x too; give each data set a name of its own",
    ),
    (
        "training: {eval_steps: 10, save_steps: 15}",
        "training.save_steps: checkpoints are saved at evaluations, and 15 is no multiple of training.eval_steps, 10;"
        " make it one, or leave it out",
    ),
    ("training: {eval_steps: 0.1, save_steps: 0.25}", "training.save_steps: checkpoints are saved at evaluations"),
    ("training: {eval_steps: 10, save_steps: 5}", "training.save_steps: checkpoints are saved at evaluations"),
    (
        ONE + ", val_size: 0}\ntraining: {early_stopping_patience: 2}",
        "training.early_stopping_patience: early stopping needs validation rows; set data.val_size or data.eval",
    ),
    (
        ONE + ", val_size: 0}\ntraining: {metric_for_best_model: eval_loss_a}",
        "training.metric_for_best_model: there are no validation rows",
    ),
    (
        ONE + ", eval: [{path: b, name: x}]}\ntraining: {metric_for_best_model: eval_loss_y}",
        "training.metric_for_best_model: there is no validation data set y; choose one of eval_loss, eval_loss_x",
    ),
    (
        "output_dir: runs/{nam}",
        "output_dir: unknown placeholder {nam}; choose among {name}, {n}, {method}, {time}",
    ),
    ("output_dir: runs/{n", "output_dir: a brace without its partner"),
    ("output_dir: .", "output_dir: . is no place for a run"),
)

AGREEMENTS = (
    "training: {eval_steps: 10, save_steps: 20}",
    "training: {eval_steps: 0.1, save_steps: 0.3}",
    "training: {eval_steps: 0.1, save_steps: 20}",
    "data: {train: [{path: a}], val_size: 0}\ntraining: {eval_steps: 10, save_steps: 15}",
    "data: {train: [{path: a}], val_size: 0}\ntraining: {final: best}",
    "data: {train: [{path: a, name: x}], eval: [{path: b, name: x}]}\ntraining: {metric_for_best_model: eval_loss_x}",
    "data: {train: [{path: a}, {path: b, weight: 2}], mixing: {strategy: weights, stopping: first_exhausted}}",
    "output_dir: runs/{name}/{method}-{time}-{n}",
    "training:\nmodel:\n",  # All keys commented out.
    "data: {train: [{path: a, columns: null}], mixing: null}",
)


def _with(section: str) -> str:
    """BASE with top-level keys replaced."""
    keys = [line.split(":")[0] for line in section.splitlines()]
    return "".join(_blocks(BASE, without=keys)) + section + "\n"


def _blocks(text: str, *, without: list[str]) -> list[str]:
    kept, skipping = [], False
    for line in text.splitlines(keepends=True):
        if not line.startswith(" "):
            skipping = line.split(":")[0] in without
        kept += [] if skipping else [line]
    return kept


@pytest.mark.parametrize(("addition", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values(tmp_path: Path, addition: str, message: str) -> None:
    assert problems(tmp_path, BASE + addition + "\n") == [f"recipe.yaml:7: {message}"]


@pytest.mark.parametrize(("section", "message"), METHODS.items(), ids=METHODS)
def test_wrong_methods(tmp_path: Path, section: str, message: str) -> None:
    found = problems(tmp_path, _with(f"method: {{{section}}}"))
    assert found == [f"recipe.yaml:5: method.{message}"]


@pytest.mark.parametrize(("entry", "message"), DATASETS.items(), ids=DATASETS)
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_wrong_datasets(tmp_path: Path, entry: str, message: str, kind: str) -> None:
    other = "  train: [{path: a}]\n" if kind == "eval" else "\n"
    text = f"base_model: a\nmethod: {{type: full}}\ndata:\n{other}  {kind}:\n  - {entry}\n"
    found = problems(tmp_path, text)
    assert any(line.startswith(f"recipe.yaml:6: data.{kind}.0{message}") for line in found), found


@pytest.mark.parametrize(("addition", "message"), CONFLICTS)
def test_conflicts_between_keys(tmp_path: Path, addition: str, message: str) -> None:
    found = problems(tmp_path, _with(addition))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("addition", AGREEMENTS)
def test_what_is_no_conflict(tmp_path: Path, addition: str) -> None:
    assert problems(tmp_path, _with(addition)) == []


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
seed: -1
data:
  train: train.jsonl
  max_lenght: 5
method: {type: lora, rank: x}
training:
  bf16: true
"""
    assert problems(tmp_path, text, "training.learning_rate=high", "x") == [
        "recipe.yaml: base_model: required key is missing; add it: Hub id, directory, or .gguf file",
        "recipe.yaml:1: seed: expected a whole number of at least 0 and below 4294967296, got the number -1",
        "recipe.yaml:3: data.train: expected a list of mappings (at least one), got the text 'train.jsonl'; write"
        " [{path: train.jsonl}]",
        "recipe.yaml:4: data.max_lenght: unknown key; did you mean max_length?",
        "recipe.yaml:5: method.rank: expected a whole number above 0, got the text 'x'",
        "recipe.yaml:7: training.bf16: another tool's key; set model.dtype: bfloat16 or float32 (trained"
        " weights are kept in float32)",
        "command line: 'x' sets no key; write it as key=value, e.g. training.learning_rate=1e-4, and one with spaces in"
        " quotes: 'key=[a, b]'",
        "command line: training.learning_rate: expected a number above 0, got the text 'high'",
    ]


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "5\n"])
def test_a_recipe_is_a_mapping(tmp_path: Path, text: str) -> None:
    (found,) = problems(tmp_path, text)
    assert found.startswith("recipe.yaml: a recipe is a mapping of keys, not ")


@pytest.mark.parametrize(
    ("method", "expected"), [("full", (2e-5, 32, 2)), ("lora", (2e-4, 16, 3)), ("adapter", (3e-4, 16, 3))]
)
def test_defaults_by_method(tmp_path: Path, method: str, expected: tuple[float, int, int]) -> None:
    training = load(tmp_path, BASE, f"method.type={method}").recipe.training
    assert (training.learning_rate, training.global_batch_size, training.num_train_epochs) == expected
    training = load(tmp_path, BASE, f"method.type={method}", "lr=1", "training.num_train_epochs=9").recipe.training
    assert (training.learning_rate, training.global_batch_size, training.num_train_epochs) == (1.0, expected[1], 9)


def test_values_keep_their_types(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE + "training: {learning_rate: 1e-4, warmup_steps: 0, eval_steps: 5}\n").recipe
    assert recipe.training.learning_rate == 1e-4
    assert type(recipe.training.warmup_steps) is int
    assert type(recipe.training.eval_steps) is int
    assert isinstance(recipe.data.train, tuple)
    with pytest.raises(ValidationError):
        recipe.seed = 1


def test_marks_tell_file_and_command_line_apart(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE, "seed=1", "data.train.0.name=x")
    assert loaded.marks[("seed",)] == loaded.marks[("data", "train", 0, "name")] == "command line"
    assert loaded.marks[("data", "train", 0, "path")] == f"{tmp_path}/recipe.yaml:4"


OVERRIDES = {
    ("training.learning_rate=1e-4",): lambda r: r.training.learning_rate == 1e-4,
    ("seed=1", "seed=2"): lambda r: r.seed == 2,
    ("data.train.0.max_samples=100",): lambda r: r.data.train[0].max_samples == 100,
    ("data.train.1.path=b.json",): lambda r: [d.path for d in r.data.train] == ["train.jsonl", "b.json"],
    ("data.eval.0.path=b.json", "data.eval.0.name=b"): lambda r: r.data.eval[0].name == "b",
    ("data.train=[{path: x}, {path: y}]",): lambda r: [d.path for d in r.data.train] == ["x", "y"],
    ("method.targets=[q_proj, v_proj]",): lambda r: r.method.targets == ("q_proj", "v_proj"),
    ("method={type: full}",): lambda r: r.method.type == "full",
    ("data.chat_template_kwargs.enable_thinking=false",): lambda r: (
        r.data.chat_template_kwargs == {"enable_thinking": False}
    ),
    ("training.max_grad_norm=null",): lambda r: r.training.max_grad_norm is None,
    ("training.max_grad_norm=",): lambda r: r.training.max_grad_norm is None,
    ("data.packing=off",): lambda r: r.data.packing == "off",
    ("data.train.0.template=Review: {text} # really",): lambda r: r.data.train[0].template == "Review: {text} # really",
    ("data.train.0.template='a=b: c'",): lambda r: r.data.train[0].template == "a=b: c",
    ("learning_rate=1e-3", "rank=4", "lora_alpha=8"): lambda r: (
        (r.training.learning_rate, r.method.rank, r.method.alpha) == (1e-3, 4, 8.0)
    ),
    (" seed = 7 ",): lambda r: r.seed == 7,
}


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_overrides(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert OVERRIDES[overrides](load(tmp_path, BASE, *overrides).recipe)


WRONG_OVERRIDES = {
    "seed": "'seed' sets no key; write it as key=value, e.g. training.learning_rate=1e-4",
    "a..b=1": "'a..b=1' sets no key",
    "=1": "'=1' sets no key",
    "traning.lr=1": "traning.lr: unknown key; did you mean training.learning_rate?",
    "training.lerning_rate=1": "training.lerning_rate: unknown key; did you mean learning_rate?",
    "learning_rat=1": "learning_rat: unknown key; did you mean training.learning_rate?",
    "training.max_length=5": "training.max_length: unknown key; it belongs to data.max_length",
    "data.train.0.pth=x": "data.train.0.pth: unknown key; did you mean path?",
    "data.train.2.path=x": "data.train.2.path: data.train has 1 entry, counted from 0; choose one of them, or 1",
    "data.eval.1.path=x": "data.eval.1.path: data.eval has no entries; write 0 to add one",
    "data.train.x.path=y": "data.train.x.path: unknown key",
    "data.train.0.path.x=1": "data.train.0.path.x: data.train.0.path has no keys; set data.train.0.path to text",
    "method.rank=010": "method.rank: 010 has a leading zero; write 10 for the number, or '010' for text",
    "method.targets=[q": "method.targets: a bracket or brace is not closed; put the whole argument in quotes: ",
    "method.rank=x": "method.rank: expected a whole number above 0, got the text 'x'",
    "per_device_train_batch_size=4": "per_device_train_batch_size: the batch is global here; set",
    "quantization=nf5": "model.quantization: ",
    "bnb_4bit_quant_type=nf4": "bnb_4bit_quant_type: another tool's key; set model.quantization: nf4",
    "data.train.0.few_shot=0.5": "data.train.0.few_shot: only templates use it; set templates",
    "data.mixing.maximum=10": "data.mixing.maximum: concat has no maximum; set data.mixing.strategy: proportional",
}


@pytest.mark.parametrize(("override", "message"), WRONG_OVERRIDES.items(), ids=WRONG_OVERRIDES)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    (found,) = problems(tmp_path, BASE, override)
    assert found.startswith(f"command line: {message}")


def test_an_override_wins_over_another_name_in_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "lr: 1e-3\n", "training.learning_rate=1e-5").recipe.training.learning_rate == 1e-5
    assert load(tmp_path, BASE + "lr: 1e-3\n", "lr=1e-5").recipe.training.learning_rate == 1e-5


# ------------------------------------------------------------------------------------------------ resolving


def test_columns_of_phrasings_are_kept(tmp_path: Path) -> None:
    """They are no fields of the schema, and a resumed run reads them from its own recipe."""
    text = BASE.replace("method:", "      templates: sst2\n      columns: {sentence: review, label: y}\nmethod:")
    recipe = load(tmp_path, text).recipe
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml").recipe == recipe


def test_resolve_makes_existing_inputs_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = tmp_path / "recipes"
    (recipes / "data").mkdir(parents=True)
    for name in ("data/a.json", "data/b.json", "chat.jinja", "own.yaml"):
        (recipes / name).touch()
    for name in ("model", "tokenizer"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    text = """\
base_model: ../model
model: {chat_template: chat.jinja, tokenizer: ../tokenizer}
data:
  train: [{path: data/a.json}, {path: data/*.json}, {path: data}, {path: org/data}, {path: hf://data/a.json}]
  eval:
    - {path: missing/*.json}
    - {path: HERE/data/b.json, templates: own.yaml}
    - {path: missing/b.json, templates: own.yaml:one}
    - {path: missing/c.json, templates: sst2}
method: {type: full}
""".replace("HERE", str(recipes))
    recipe = resolve(load(recipes, text))
    assert recipe.base_model == str(recipes / "../model")
    assert recipe.model.chat_template == str(recipes / "chat.jinja")
    assert recipe.model.tokenizer == str(recipes / "../tokenizer")
    assert [dataset.path for dataset in recipe.data.train] == [
        str(recipes / "data/a.json"),
        str(recipes / "data/*.json"),
        str(recipes / "data"),
        "org/data",
        "hf://data/a.json",
    ]
    assert [dataset.path for dataset in recipe.data.eval[:2]] == ["missing/*.json", str(recipes / "data/b.json")]
    own = recipes / "own.yaml"
    assert [dataset.templates for dataset in recipe.data.eval[1:]] == [str(own), f"{own}:one", "sst2"]
    assert resolve(load(recipes, BASE + "model: {chat_template: chatml}\n")).model.chat_template == "chatml"


def test_paths_on_the_command_line_start_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for directory in (recipes, here):
        (directory / "data").mkdir(parents=True)
        for name in ("a.jsonl", "data/b.json", "data/c.json", "chat.jinja", "org"):
            (directory / name).touch()
    (here / "m").mkdir()
    (recipes / "beside").mkdir()
    monkeypatch.chdir(here)
    text = BASE.replace("train.jsonl", "a.jsonl")

    def resolved(*overrides: str) -> Recipe:
        return resolve(load(recipes, text, *overrides))

    recipe = resolved("base_model=./m", "data.train.1.path=a.jsonl", "model.chat_template=chat.jinja")
    assert recipe.base_model == str(here / "m")
    assert recipe.model.chat_template == str(here / "chat.jinja")
    # What the file says still starts from the file, also where another key of the same data set is overridden.
    assert [dataset.path for dataset in recipe.data.train] == [str(recipes / "a.jsonl"), str(here / "a.jsonl")]
    assert resolved("data.train.0.max_samples=3").data.train[0].path == str(recipes / "a.jsonl")
    # A whole list, a whole section, another tool's name.
    lists = resolved("data.train=[{path: a.jsonl}, {path: 'data/*.json'}]", "data.eval=[{path: data}]").data
    assert [dataset.path for dataset in lists.train] == [str(here / "a.jsonl"), str(here / "data/*.json")]
    assert lists.eval[0].path == str(here / "data")
    assert resolved("data={train: [{path: a.jsonl}]}").data.train[0].path == str(here / "a.jsonl")
    assert resolved("model={chat_template: chat.jinja}").model.chat_template == str(here / "chat.jinja")
    assert resolved("model_name_or_path=m").base_model == str(here / "m")
    # Hub ids and built-in names stay what they are, whatever lies beside the recipe.
    assert resolved("base_model=beside").base_model == "beside"
    assert resolved("base_model=org/name", "data.train.0.path=org/data").data.train[0].path == "org/data"
    assert resolved("model.chat_template=chatml").model.chat_template == "chatml"
    assert resolved("model.tokenizer=org/name").model.tokenizer == "org/name"


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("runs/{name}-{n}", "runs/recipe-{n}"),
        ("runs/{name}", "runs/recipe-{n}"),
        ("fixed", "fixed-{n}"),
        ("fixed/", "fixed-{n}"),
        ("{method}-{time}", "{method}-{time}"),
        ("{method}/x", "{method}/x-{n}"),
        ("/tmp/x-{n}", "/tmp/x-{n}"),
    ],
)
def test_resolve_leaves_the_number_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, resolved: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = resolve(load(tmp_path, BASE + f"output_dir: '{written}'\n"))
    assert recipe.output_dir == str(tmp_path / "elsewhere" / resolved)
    again = resolve(load(tmp_path, dump_recipe(recipe)))
    assert again == recipe


def test_resolve_takes_braces_in_names_for_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = resolve(load_recipe(write(tmp_path, name="a{b}.yaml")))
    assert recipe.output_dir == f"{tmp_path}/runs/a_b_-{{n}}"
    assert load(tmp_path, dump_recipe(recipe)).recipe == recipe


# ------------------------------------------------------------------------------------------------ writing

TEXTS = (
    "1e-4",
    "010",
    "off",
    "null",
    "",
    " x ",
    "a: b",
    "#x",
    "é\u2028",
    "a\nb\n",
    "\n a",
    "x\r\ny",
    "- a",
    "'",
    "12:30",
    "~",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_writing(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path).recipe
    dataset = recipe.data.train[0].model_copy(update={"template": text})
    data = recipe.data.model_copy(update={"train": (dataset,), "chat_template_kwargs": {"k": text, "l": [text]}})
    changed = recipe.model_copy(update={"data": data})
    assert load(tmp_path, dump_recipe(changed)).recipe == changed


@pytest.mark.parametrize("method", METHOD_SECTIONS)
def test_every_method_survives_writing(tmp_path: Path, method: str) -> None:
    overrides = [f"method.type={method}", "training.max_grad_norm=null", "training.learning_rate=1e-5", "val_size=0"]
    recipe = load(tmp_path, BASE, *overrides, "data.eval.0.path=x", "data.train.0.columns={text: body}").recipe
    text = dump_recipe(recipe)
    assert load(tmp_path, text).recipe == recipe
    written = parse_yaml(text, "x")[0]
    assert written["training"]["global_batch_size"] == (32 if method == "full" else 16), "defaults are written out"
    assert written["training"]["max_grad_norm"] is None
    assert "revision" not in written["model"]


def test_random_text_survives_writing(tmp_path: Path) -> None:
    generator = random.Random(0)
    alphabet = "ab01 \t\n:#-'\"{}[]|>&*!%@`,?~.eE+_é\u3000\x85\\/=<"
    texts = {"".join(generator.choices(alphabet, k=generator.randrange(12))) for _ in range(500)}
    recipe = load(tmp_path).recipe
    data = recipe.data.model_copy(update={"chat_template_kwargs": {text: [text, {"x": text}] for text in texts}})
    changed = recipe.model_copy(update={"data": data})
    assert load(tmp_path, dump_recipe(changed)).recipe == changed


def test_columns_of_phrasings_alone_are_written_too(tmp_path: Path) -> None:
    """`sentence` is no column of a format: only the library's phrasings of sst2 name it."""
    columns = ["data.train.0.templates=sst2", "data.train.0.columns={sentence: 'no', label: text}"]
    recipe = load(tmp_path, BASE, *columns).recipe
    assert recipe.data.train[0].columns.model_extra == {"sentence": "no", "label": "text"}
    assert load(tmp_path, dump_recipe(recipe)).recipe == recipe


PIECES = [
    "null",
    "[]",
    "{}",
    "5",
    "-1.5",
    "yes",
    "'x'",
    "{a: 1}",
    "[1]",
    "&a",
    "*a",
    "<<",
    "\t",
    ":",
    "- ",
    " ",
    '"',
    "{",
]


def test_damaged_recipes_end_in_user_errors(tmp_path: Path) -> None:
    """Whatever is in the file, what comes out is a recipe or one line a problem, never a traceback."""
    generator = random.Random(1)
    full = dump_recipe(load(tmp_path, BASE, "data.eval.0.path=x", "method.targets=[a, b]").recipe)
    refused = 0
    for _ in range(150):
        lines = full.splitlines()
        for _ in range(generator.randrange(1, 4)):
            index, piece = generator.randrange(len(lines)), generator.choice(PIECES)
            key, _, value = lines[index].partition(": ")
            damaged = [f"{key}: {piece}", piece + lines[index], value, f"{key[:-1]}: {value}"]
            lines[index] = generator.choice(damaged)
        found = problems(tmp_path, "\n".join(lines))
        refused += bool(found)
        assert all(line.startswith(("recipe.yaml:", "command line:")) and "\n" not in line for line in found), found
    assert refused > 75


def test_one_error_a_key_whatever_the_value(tmp_path: Path) -> None:
    """Unions must not report each of their branches."""
    values: list[Any] = ["null", "true", "3", "-3", "0.5", "1.5", "text", "[]", "[1, a]", "{}", "{a: {b: 1}}"]
    for section in ("model", "data", "training"):
        for name in type(getattr(load(tmp_path).recipe, section)).model_fields:
            for value in values:
                found = problems(tmp_path, BASE, f"{section}.{name}={value}")
                keys = [line.split(": ")[1] for line in found]
                assert len(keys) == len(set(keys)), found
                assert all("Input should" not in line for line in found), found


def test_a_recipe_can_be_built_in_code() -> None:
    recipe = Recipe.model_validate({"base_model": "a", "data": {"train": [{"path": "b"}]}, "method": {"type": "lora"}})
    assert recipe.method == LoraMethod(type="lora")
    with pytest.raises(ValidationError):
        Recipe.model_validate({"base_model": "a", "data": {"train": [{"path": "b"}]}, "method": {"type": ["lora"]}})
