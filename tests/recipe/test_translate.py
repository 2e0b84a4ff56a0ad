"""Configurations of axolotl, LLaMA-Factory and TRL, in their own words, against the recipe that each means."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftkit.data.template_texts import BUILT_IN
from ftkit.errors import UserError, dotted
from ftkit.recipe.load import load_recipe
from ftkit.recipe.translate import AXOLOTL, LLAMA_FACTORY, TRL, Translated, translate
from ftkit.recipe.translate_settings import DEFAULTS, LORA_DEFAULTS
from tests.recipe.other_tools import rows

QLORA = """
base_model: org/model
model_type: LlamaForCausalLM
load_in_4bit: true
load_in_8bit: false
datasets:
  - path: data/mine.jsonl
    ds_type: json
    type: alpaca
  - path: org/talks
    split: train[:10%]
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
  - path: org/books
    type: completion
    name: en
    train_on_split: train
val_set_size: 0.05
output_dir: ./outputs/qlora
sequence_len: 4096
sample_packing: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: true
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 2
saves_per_epoch: 1
wandb_project:
"""
FACTORY = """
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine, talks
dataset_dir: data
template: qwen
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
bf16: true
overwrite_output_dir: true
"""
SFT = """
model_name_or_path: org/model
dataset_name: trl-lib/Capybara
dataset_train_split: train
learning_rate: 2.0e-5
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eos_token: "<|im_end|>"
"""


def translated(tmp_path: Path, text: str) -> Translated:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return translate(path)


def left_out(found: Translated) -> set[str]:
    return {dotted(problem.key) for problem in found.left_out}


def test_axolotls_qlora(tmp_path: Path) -> None:
    found = translated(tmp_path, QLORA)
    assert found.tool == AXOLOTL
    assert found.recipe == {
        "base_model": "org/model",
        "model": {"dtype": "bfloat16", "quantization": "nf4"},
        "data": {
            "train": [
                {"path": "data/mine.jsonl", "format": "alpaca"},
                {"path": "org/talks", "split": "train[:10%]", "format": "sharegpt"},
                {"path": "org/books", "format": "text", "subset": "en"},
            ],
            "val_size": 0.05,
            "max_length": 4096,
            "packing": "auto",
        },
        "method": {"type": "lora", "rank": 32, "alpha": 16, "dropout": 0.05, "targets": "all-linear"},
        "training": {
            "global_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "gradient_checkpointing": True,
            "warmup_steps": 0.1,
            "eval_steps": 0.25,
            "save_steps": 0.5,
        },
        "output_dir": "./outputs/qlora",
    }
    # What was switched off or empty is not missed; what counts otherwise here is told.
    assert left_out(found) == {"datasets.2.train_on_split", "micro_batch_size", "training.optim"}
    assert set(map(dotted, found.unneeded)) == {"model_type", "flash_attention"}
    (batch,) = (problem for problem in found.left_out if problem.key == ("micro_batch_size",))
    assert "2 a device x 4 steps is a global batch of 8" in str(batch)


def test_axolotls_trackers(tmp_path: Path) -> None:
    text = "base_model: org/model\ndatasets: [{path: a.jsonl, type: alpaca}]\n"
    found = translated(
        tmp_path, text + "wandb_project: mine\nwandb_name: first\nwandb_entity: us\nuse_tensorboard: true\n"
    )
    expected = {"report_to": ["tensorboard", "wandb"], "project": "mine", "run_name": "first"}
    assert found.recipe["training"] == expected | {"num_train_epochs": 1}
    assert left_out(found) == {"wandb_entity"}
    off = translated(tmp_path, text + "wandb_project:\nuse_wandb: false\n")
    assert off.recipe["training"] == {"num_train_epochs": 1}
    assert left_out(translated(tmp_path, text + "run_name: x\nreport_to: all\n")) == {
        "training.run_name",
        "report_to",
    }


@pytest.mark.parametrize(("adapter", "kind"), [("adapter: lora", "lora"), ("", "full"), ("adapter:", "full")])
def test_axolotls_method(adapter: str, kind: str, tmp_path: Path) -> None:
    text = "base_model: org/model\ndatasets: [{path: a.jsonl, type: alpaca}]\n"
    assert translated(tmp_path, text + adapter).recipe["method"]["type"] == kind


def test_llama_factorys_data_sets_are_looked_up(tmp_path: Path) -> None:
    info: dict[str, Any] = {
        "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},
        "talks": {"hf_hub_url": "org/talks", "formatting": "sharegpt", "columns": {"messages": "dialog"}},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    found = translated(tmp_path, FACTORY)
    assert found.tool == LLAMA_FACTORY
    mine = {"path": str(tmp_path / "data" / "mine.json"), "format": "alpaca"}
    assert found.recipe["data"] == {
        "train": [
            mine | {"columns": {"instruction": "q", "output": "a"}},
            {"path": "org/talks", "format": "sharegpt", "columns": {"conversations": "dialog"}},
        ],
        "max_length": 2048,
        "val_size": 0,
    }
    assert found.recipe["method"] == {"type": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"}
    assert found.recipe["model"] == {"dtype": "bfloat16"}
    assert found.recipe["training"] == {
        "global_batch_size": 8,
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
    }
    assert found.defaults == {
        "data.val_size": 0,
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": 0,
        "method.alpha": 16,
    }
    assert left_out(found) == {"per_device_train_batch_size", "template", "overwrite_output_dir"}


def test_nothing_is_dropped_without_a_word(tmp_path: Path) -> None:
    for text in (FACTORY.replace("stage: sft", "stage: dpo"), QLORA + "rl: dpo\n"):
        with pytest.raises(UserError, match="dpo is no supervised fine-tuning"):
            translated(tmp_path, text)
    odd = FACTORY.replace("per_device_train_batch_size: 1", "per_device_train_batch_size: many")
    assert {"per_device_train_batch_size", "gradient_accumulation_steps"} <= left_out(translated(tmp_path, odd))
    found = translated(tmp_path, "base_model: org/model\ndatasets: [org/rows]\n")
    assert found.recipe["data"]["train"] == [{"path": "org/rows"}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"other": {}, "talk": {}, "mine": {"file_name": "m.json"}}')
    with pytest.raises(UserError, match=r"does not say what talks is; did you mean talk\?"):
        translated(tmp_path, FACTORY)
    both = translated(tmp_path, FACTORY.replace("mine, talks", "mine") + "eval_dataset: mine\n")
    assert both.recipe["data"]["eval"] == both.recipe["data"]["train"]
    assert "val_size" not in both.recipe["data"]
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info\.json: is not valid JSON"):
        translated(tmp_path, FACTORY)


def test_without_the_table_of_data_sets_their_names_are_kept(tmp_path: Path) -> None:
    found = translated(tmp_path, FACTORY)
    assert found.recipe["data"]["train"] == [{"path": "mine"}, {"path": "talks"}]
    assert "dataset" in left_out(found)


def test_trls_script(tmp_path: Path) -> None:
    found = translated(tmp_path, SFT)
    assert found.tool == TRL
    assert found.recipe["data"]["train"] == [{"path": "trl-lib/Capybara", "split": "train"}]
    assert found.recipe["method"] == {"type": "full"}
    assert found.recipe["training"]["global_batch_size"] == 16
    lora = translated(tmp_path, SFT + "use_peft: true\nlora_r: 4\n")
    assert lora.recipe["method"] == {"type": "lora", "rank": 4, "alpha": 32, "dropout": 0.05}


def test_trls_defaults_are_trls() -> None:
    from trl import ModelConfig, SFTConfig

    ours = {**DEFAULTS[TRL], **LORA_DEFAULTS[TRL]}
    theirs = {one.name: one.default for config in (SFTConfig, ModelConfig) for one in fields(config)}
    names = {"method.rank": "lora_r", "method.alpha": "lora_alpha", "method.dropout": "lora_dropout"}
    names["training.global_batch_size"] = "per_device_train_batch_size"
    assert theirs["eval_strategy"] == "no"
    del ours["data.val_size"]
    assert ours == {key: theirs[names.get(key, key.partition(".")[2])] for key in ours}


def test_one_checkpoint_an_epoch_is_told(tmp_path: Path) -> None:
    text = "base_model: org/model\ndatasets: [{path: a.jsonl, type: alpaca}]\nnum_epochs: 1\nsaves_per_epoch: 1\n"
    assert "saves_per_epoch" in left_out(translated(tmp_path, text))
    with pytest.raises(UserError, match="datasets: expected a list"):
        translated(tmp_path, "base_model: org/model\ndatasets: a.json\n")


def test_what_is_not_said_of_a_batch_is_the_tools(tmp_path: Path) -> None:
    accumulated = SFT.replace("per_device_train_batch_size: 2\n", "")
    assert translated(tmp_path, accumulated).recipe["training"]["global_batch_size"] == 64
    axolotl = "base_model: org/model\ndatasets: [{path: a.jsonl, type: alpaca}]\n"
    found = translated(tmp_path, axolotl + "gradient_accumulation_steps: 4\n")
    assert found.recipe["training"]["global_batch_size"] == 4
    found = translated(tmp_path, axolotl + "max_steps: 100\nevals_per_epoch: 4\n")
    assert "evals_per_epoch" in left_out(found)
    assert "eval_steps" not in found.recipe["training"]


def test_keys_without_a_value_are_in_the_way_of_nothing(tmp_path: Path) -> None:
    text = QLORA + "lora_target_modules:\n"
    assert translated(tmp_path, text).recipe["method"]["targets"] == "all-linear"
    assert not left_out(translated(tmp_path, text)) & {"lora_target_modules", "lora_target_linear"}
    assert "lora_target_modules" in left_out(translated(tmp_path, SFT + "use_peft: true\n"))


def test_evaluations_and_checkpoints_stay_multiples_of_each_other(tmp_path: Path) -> None:
    text = "base_model: org/model\ndatasets: [{path: a.jsonl, type: alpaca}]\nval_set_size: 0.1\n"
    found = translated(tmp_path, text + "num_epochs: 3\nevals_per_epoch: 4\nsaves_per_epoch: 1\n")
    assert found.recipe["training"]["eval_steps"] == 0.0833
    assert found.recipe["training"]["save_steps"] == 4 * 0.0833
    assert left_out(found) == set()


def test_columns_of_dataset_info_that_we_have_not_are_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    columns = {"history": "past", "images": "pictures", "query": "q"}
    info = {"mine": {"file_name": "a.json", "columns": columns}, "talks": {"ms_hub_url": "org/talks"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    found = translated(tmp_path, FACTORY)
    assert found.recipe["data"]["train"][0]["columns"] == {"input": "q"}
    lost = {
        "dataset_info.json.mine.columns.images",
        "dataset_info.json.mine.columns.history",
        "dataset_info.json.talks.ms_hub_url",
    }
    assert lost <= left_out(found)


AXOLOTL_CHAT = """
base_model: org/model
datasets:
  - {path: a.jsonl, type: chat_template, roles_to_train: [assistant], train_on_eos: turn}
  - {path: b.jsonl, type: chat_template, roles_to_train: [assistant, user]}
chat_template: tokenizer_default
special_tokens: {pad_token: "<|end|>", bos_token: "<s>"}
lora_model_dir:
eval_strategy: steps
eval_steps: 10
"""


def test_what_happens_anyway_is_told_apart_from_what_is_lost(tmp_path: Path) -> None:
    found = translated(tmp_path, AXOLOTL_CHAT)
    assert left_out(found) == {"datasets.1.roles_to_train", "special_tokens"}
    assert {dotted(key) for key in found.unneeded} == {
        "datasets.0.roles_to_train",
        "datasets.0.train_on_eos",
        "chat_template",
        "special_tokens.pad_token",
        "eval_strategy",
    }
    assert "model" not in found.recipe
    assert found.recipe["method"] == {"type": "full"}


def test_templates_that_we_have_are_kept(tmp_path: Path) -> None:
    def template(name: str) -> object:
        found = translated(tmp_path, AXOLOTL_CHAT.replace("tokenizer_default", name))
        assert ("chat_template" in left_out(found)) == ("model" not in found.recipe)
        return found.recipe.get("model", {}).get("chat_template")

    assert [template(name) for name in BUILT_IN] == list(BUILT_IN)
    assert template("llama3") is None
    assert template("mine.jinja") is None
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert template("mine.jinja") == "mine.jinja"


def test_llama_factorys_rows_count_for_each_data_set(tmp_path: Path) -> None:
    found = translated(tmp_path, FACTORY + "max_samples: 7\n")
    assert [entry["max_samples"] for entry in found.recipe["data"]["train"]] == [7, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a configuration is a mapping of keys; name a YAML file"),
        ("learning_rate: 1e-4", "no recipe can be made of it: "),
        ("base_model: org/model", "no recipe can be made of it: "),
    ],
)
def test_what_is_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        translated(tmp_path, text)


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "other_tools.md").read_text("utf-8")
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert table == rows(), "python -m tests.recipe.other_tools prints it"


def test_what_is_left_is_a_recipe(tmp_path: Path) -> None:
    for text in (QLORA, FACTORY, SFT):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(translated(tmp_path, text).recipe))
        assert load_recipe(path).recipe.base_model == "org/model"
