"""Other tools' names: every key they share works, is an alias, or is refused with the reason."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from ftkit.recipe import shape
from ftkit.recipe.foreign import FOREIGN, Alias, Refusal
from ftkit.recipe.foreign_values import CONVERSIONS, LATER_VALUES
from ftkit.recipe.names import FLAT, canonical
from tests.recipe.recipes import BASE, load, problems

SHARED = (
    "adapter adapter_name_or_path add_tokens attn_implementation base_model batch_size chat_template cutoff_len",
    "dataset dataset_dir dataset_text_field datasets default_system deterministic early_stopping_patience eval_dataset",
    "enable_liger_kernel finetuning_type flash_attention flash_attn group_by_length load_in_4bit load_in_8bit",
    "lora_alpha lora_dropout lora_model_dir lora_modules_to_save lora_r lora_rank lora_target lora_target_linear",
    "lora_target_modules loraplus_lr_ratio lr_scheduler mask_history max_samples max_seq_length micro_batch_size",
    "mix_strategy model_name_or_path model_revision neat_packing num_epochs optimizer overwrite_cache",
    "overwrite_output_dir packing pad_to_sequence_len plot_loss preprocessing_num_workers quantization_bit r",
    "resize_vocab revision_of_model rl rope_scaling sample_packing save_total_limit sequence_len special_tokens stage",
    "streaming target_modules template tokenized_path tokens torch_dtype train_on_inputs train_on_prompt",
    "trust_remote_code use_dora use_rslora val_set_size val_size wandb_project warmup_ratio",
)
"""Names that axolotl and LLaMA-Factory share with each other or with Hugging Face's trainers."""

MEANINGS = {
    "model_name_or_path: org/x": ("base_model", "org/x"),
    "cutoff_len: 512": ("data.max_length", 512),
    "sequence_len: 512": ("data.max_length", 512),
    "max_seq_length: 512": ("data.max_length", 512),
    "val_set_size: 0.1": ("data.val_size", 0.1),
    "val_size: 100": ("data.val_size", 100),
    "sample_packing: true": ("data.packing", "auto"),
    "packing: false": ("data.packing", "off"),
    "train_on_inputs: true": ("data.train_on", "all"),
    "train_on_inputs: false": ("data.train_on", "assistant"),
    "mask_history: true": ("data.train_on", "last_assistant"),
    "enable_thinking: false": ("data.chat_template_kwargs.enable_thinking", False),
    "r: 8": ("method.rank", 8),
    "lora_r: 8": ("method.rank", 8),
    "lora_alpha: 16": ("method.alpha", 16.0),
    "lora_dropout: 0.1": ("method.dropout", 0.1),
    "target_modules: [q_proj]": ("method.targets", ("q_proj",)),
    "lora_target: all": ("method.targets", "all-linear"),
    "lora_target: 'q_proj, v_proj'": ("method.targets", ("q_proj", "v_proj")),
    "lora_target_linear: true": ("method.targets", "all-linear"),
    "use_rslora: true": ("method.rank_stabilized", True),
    "init_lora_weights: true": ("method.init", "kaiming"),
    "init_lora_weights: pissa_niter_4": ("method.init", "pissa"),
    "additional_target: 'embed_tokens,lm_head'": ("method.modules_to_save", ("embed_tokens", "lm_head")),
    "adapter_name_or_path: runs/a": ("method.init_from", "runs/a"),
    "lora_model_dir: runs/a": ("method.init_from", "runs/a"),
    "use_dora: true": ("method.dora", True),
    "loraplus_lr_ratio: 16": ("method.learning_rate_ratio", 16.0),
    "pissa_init: true": ("method.init", "pissa"),
    "rank_pattern: {q_proj: 8}": ("method.rank_pattern.q_proj", 8),
    "exclude_modules: [k_proj]": ("method.exclude", ("k_proj",)),
    "num_epochs: 3.0": ("training.num_train_epochs", 3),
    "num_train_epochs: 4.0": ("training.num_train_epochs", 4),
    "learning_rate: 1.0e-5": ("training.learning_rate", 1e-5),
    "lr: 1e-5": ("training.learning_rate", 1e-5),
    "warmup_ratio: 0.1": ("training.warmup_steps", 0.1),
    "warmup_ratio: 0": ("training.warmup_steps", 0.0),
    "warmup_steps: 10": ("training.warmup_steps", 10),
    "optimizer: adamw_torch_fused": ("training.optim", "adamw"),
    "lr_scheduler: constant_with_warmup": ("training.lr_scheduler_type", "constant"),
    "load_best_model_at_end: false": ("training.final", "last"),
    "activation_checkpointing: true": ("training.gradient_checkpointing", True),
    "load_in_4bit: true": ("model.quantization", "nf4"),
    "load_in_8bit: true": ("model.quantization", "int8"),
    "load_in_4bit: false": ("model.quantization", None),
    "quantization_bit: 4": ("model.quantization", "nf4"),
    "quantization_bit: 8": ("model.quantization", "int8"),
    "tokens: [<a>, <b>]": ("model.add_tokens", ("<a>", "<b>")),
    "add_special_tokens: '<a>,<b>'": ("model.add_special_tokens", ("<a>", "<b>")),
    "torch_dtype: bfloat16": ("model.dtype", "bfloat16"),
    "dtype: bf16": ("model.dtype", "bfloat16"),
    "model: {model_name_or_path: org/x}": ("base_model", "org/x"),
    "method: {type: lora, r: 4, lora_alpha: 9}": ("method.rank", 4),
    "method: {type: houlsby}": ("method.placement", ("attention", "feed_forward")),
    "method: {type: pfeiffer}": ("method.placement", ("feed_forward",)),
    "method: {type: seq_bn, placement: [attention]}": ("method.placement", ("attention",)),
    "method: {type: par_bn}": ("method.insertion", "parallel"),
    "method: {type: adapter, is_parallel: true}": ("method.scale", 4.0),
    "method: {type: adapter, parallel: false}": ("method.insertion", "sequential"),
    "method: {type: adapter, parallel: true, scaling: 2}": ("method.scale", 2.0),
    "method: {type: adapter, adapter_size: 8}": ("method.bottleneck", 8),
    "method: {type: adapter, reduction_factor: 16}": ("method.reduction_factor", 16.0),
    "method: {type: adapter, non_linearity: LeakyReLU}": ("method.non_linearity", "leaky_relu"),
    "method: {type: adapter, adapter_dropout: 0.1}": ("method.dropout", 0.1),
    "report_to: wandb": ("training.report_to", ("wandb",)),
    "report_to: none": ("training.report_to", ()),
    "training: {report_to: [wandb], wandb_project: a}": ("training.project", "a"),
    "training: {report_to: [wandb], wandb_name: a}": ("training.run_name", "a"),
    "training: {lr: 1}": ("training.learning_rate", 1.0),
    "data: {train: [{file_name: a.json, formatting: sharegpt}]}": ("data.train.0.format", "sharegpt"),
    "data: {train: [{path: a, type: chat_template, field_messages: turns}]}": (
        "data.train.0.columns.messages",
        "turns",
    ),
    "train: [{path: b}]": ("data.train.0.path", "b"),
}


def _value(value: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(value, tuple):
            value = value[int(part)]
        else:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _without(text: str, names: set[str]) -> str:
    kept, skipping = "", False
    for line in text.splitlines(keepends=True):
        skipping = line.split(":")[0] in names if not line.startswith(" ") else skipping
        kept += "" if skipping else line
    return kept


@pytest.mark.parametrize(("line", "meaning"), MEANINGS.items(), ids=MEANINGS)
def test_names_that_mean_the_same(tmp_path: Path, line: str, meaning: tuple[str, Any]) -> None:
    key, expected = meaning
    replaced = {line.split(":")[0]}
    replaced |= {"base_model"} if key == "base_model" else set()
    replaced |= {"data"} if "train:" in line else set()
    value = _value(load(tmp_path, _without(BASE, replaced) + line + "\n").recipe, key)
    assert value == expected
    assert type(value) is type(expected)


def test_every_key_that_the_trainers_share_is_known() -> None:
    names = [field.name for field in dataclasses.fields(TrainingArguments)] + " ".join(SHARED).split()
    assert len(names) > 150
    assert [name for name in names if not (name in FLAT or name in FOREIGN or shape.at((name,)) is not None)] == []


def test_every_alias_leads_to_a_key_of_ours() -> None:
    aliases = {name: entry for name, entry in FOREIGN.items() if isinstance(entry, Alias)}
    assert len(aliases) > 50
    for name, entry in aliases.items():
        path = tuple(int(part) if part == "*" else part for part in name.replace("*", "0").split("."))
        path = tuple(int(part) if part == "0" else part for part in path)
        found = canonical(path)
        assert found is not None, name
        assert shape.at(found[0]) is not None, f"{name} -> {entry.key}"


def test_no_name_of_ours_is_refused_where_it_works() -> None:
    for name in FOREIGN:
        path = tuple(0 if part == "*" else part for part in name.split("."))
        assert shape.at(path) is None, f"{name} is a key of ours"
        assert name not in FLAT, f"{name} is a key of ours"


def _recipe_with(name: str) -> str:
    """BASE with one foreign key in its place."""
    key = name.rpartition(".")[2]
    datasets = {
        "data.train.*.columns.": f"data: {{train: [{{columns: {{{key}: 1}}, path: a}}]}}\n",
        "data.train.*.": f"data: {{train: [{{{key}: 1, path: a}}]}}\n",
        "data.mixing.": f"data: {{train: [{{path: a}}], mixing: {{{key}: 1}}}}\n",
    }
    for prefix, text in datasets.items():
        if name.startswith(prefix):
            return _without(BASE, {"data"}) + text
    return BASE + f"{name}: 1\n"


def test_every_refusal_is_one_line_with_the_reason(tmp_path: Path) -> None:
    refusals = {name: entry for name, entry in FOREIGN.items() if isinstance(entry, Refusal)}
    assert len(refusals) > 150
    for name, entry in refusals.items():
        (found,) = problems(tmp_path, _recipe_with(name))
        assert found.split(": ", 1)[1] == f"{name.replace('*', '0')}: {entry.what}; {entry.how}"


@pytest.mark.parametrize("section", ["model", "data", "method", "training"])
def test_a_refusal_holds_in_every_section(tmp_path: Path, section: str) -> None:
    (found,) = problems(tmp_path, BASE, f"{section}.bf16=true")
    assert found.startswith(f"command line: {section}.bf16: another tool's key; set model.dtype")


def test_a_key_under_two_names_is_an_error(tmp_path: Path) -> None:
    text = BASE + "  rank: 8\n  r: 16\nlora_r: 4\nlearning_rate: 1\ntraining:\n  lr: 2\n"
    assert problems(tmp_path, text) == [
        "recipe.yaml:8: method.r: means the same as method.rank, which is given too; keep one of them",
        "recipe.yaml:9: lora_r: means the same as method.rank, which is given too; keep one of them",
        "recipe.yaml:12: training.lr: means the same as training.learning_rate, which is given too; keep one of them",
    ]


def test_a_name_in_the_wrong_section_says_where_it_belongs(tmp_path: Path) -> None:
    text = BASE + "training: {max_length: 5, lora_r: 8}\nmodel: {lr: 1}\n"
    assert problems(tmp_path, text) == [
        "recipe.yaml:7: training.max_length: unknown key; it belongs to data.max_length",
        "recipe.yaml:7: training.lora_r: unknown key; it belongs to method.rank",
        "recipe.yaml:8: model.lr: unknown key; it belongs to training.learning_rate",
    ]


def test_values_under_another_name_are_checked_where_they_were_written(tmp_path: Path) -> None:
    assert problems(tmp_path, BASE + "lora_alpha: x\nwarmup_ratio: 1\n") == [
        "recipe.yaml:7: method.alpha: expected a number above 0, got the text 'x'",
        "recipe.yaml:8: training.warmup_steps: expected a whole number of at least 0 or a number of at least 0 and"
        " below 1, got the number 1.0; write 1",
    ]


def test_tables_name_keys_of_ours() -> None:
    for pattern in (*CONVERSIONS, *LATER_VALUES):
        path = tuple(0 if part == "*" else part for part in pattern.split("."))
        assert shape.at(path) is not None, pattern


def test_values_of_later_versions(tmp_path: Path) -> None:
    for key, values in LATER_VALUES.items():
        for value, instead in values.items():
            (found,) = problems(tmp_path, BASE, f"{key.removesuffix('.*')}={value if isinstance(value, str) else 4}")
            assert "not in this version" in found
            assert instead in found


def test_keys_of_adapterhub_that_ftkit_chooses_itself(tmp_path: Path) -> None:
    text = BASE.replace("type: lora", "type: adapter") + "  mh_adapter: true\n  ln_before: false\n"
    assert problems(tmp_path, text + "  original_ln_before: true\n") == [
        "recipe.yaml:7: method.mh_adapter: another tool's key; set method.placement: [attention, feed_forward], or one"
        " of them",
        "recipe.yaml:8: method.ln_before: not in this version; leave it out; method.insertion, scale and dropout can be"
        " chosen",
        "recipe.yaml:9: method.original_ln_before: bottleneck adapters come before the residual sum and before a norm"
        " that follows it; remove it",
    ]


def test_a_flat_configuration_of_another_tool(tmp_path: Path) -> None:
    """What does not work of LLaMA-Factory's example, and nothing else, is reported."""
    text = """\
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity
template: llama3
cutoff_len: 2048
output_dir: saves/lora
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_steps: 500
"""
    lines = [line.split(": ")[:2] for line in problems(tmp_path, text)]
    assert lines == [
        ["recipe.yaml", "data.train"],
        ["recipe.yaml:2", "stage"],
        ["recipe.yaml:3", "do_train"],
        ["recipe.yaml:7", "dataset"],
        ["recipe.yaml:8", "template"],
        ["recipe.yaml:13", "per_device_train_batch_size"],
        ["recipe.yaml:14", "gradient_accumulation_steps"],
        ["recipe.yaml:19", "bf16"],
    ]
