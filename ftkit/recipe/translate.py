"""Another tool's configuration as a recipe: axolotl's, LLaMA-Factory's, TRL's.

What has the same meaning under another name is moved by the tables that recipes use themselves (`foreign.py`). This
module adds what takes more than a name: lists of data sets, batches for each device, methods that are told by flags.
"""

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.errors import KeyPath, Problem, UserError, dotted
from ftkit.recipe.checks import check
from ftkit.recipe.marked_yaml import read_yaml
from ftkit.recipe.names import convert_values, is_harmless, move_aliases
from ftkit.recipe.problems import validate
from ftkit.recipe.translate_settings import DEFAULTS, carry_template, drop_what_happens_anyway, fill_defaults

MISSING: Any = object()
AXOLOTL, LLAMA_FACTORY, TRL = "axolotl", "LLaMA-Factory", "TRL"
_BATCHES = ("micro_batch_size", "per_device_train_batch_size", "batch_size", "train_batch_size")
_AXOLOTL_TYPES = {"chat_template": "messages", "chat_template.default": "messages", "completion": "text"}
_AXOLOTL_NAMES = {"name": "subset", "data_files": "path"}
_FACTORY_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}
_FACTORY_LOST = ("tags", "ranking", "script_url", "ms_hub_url", "om_hub_url", "folder")
"""Keys of an entry in dataset_info.json that we have nothing for."""
_KEPT = {"path", "format", "split", "subset", "columns", "max_samples", "name", "weight", "type"}
_KEPT |= {"field_messages", "field_instruction", "field_input", "field_output"}
"""Keys of a data set in axolotl's list that recipes have, or know as other names of theirs."""

_TRACKER_FLAGS = {f"use_{name}": name for name in ("wandb", "tensorboard", "mlflow", "swanlab", "trackio")}
_TRACKER_FLAGS |= {"use_comet": "comet_ml"}
_TRACKER_PROJECTS = {"wandb_project": "wandb", "mlflow_experiment_name": "mlflow", "swanlab_project": "swanlab"}


@dataclass(frozen=True)
class Translated:
    """What became of a configuration."""

    tool: str
    recipe: dict[str, Any]
    """Valid; keys of the configuration, none of our defaults."""
    left_out: tuple[Problem, ...]
    """Keys that could not be carried over: which, why, and what to do."""
    unneeded: tuple[KeyPath, ...]
    """Keys that ask for what happens here anyway, or for speed alone."""
    defaults: dict[str, Any]
    """Keys of the recipe of which the configuration says nothing, with the tool's own defaults."""


def translate(path: Path) -> Translated:
    """Read another tool's configuration.

    Raises:
        UserError: it is none: no base model, or no data that ftkit could read, whatever is left out.
        StorageError: the file cannot be read.
    """
    raw, _ = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError("a configuration is a mapping of keys", how="name a YAML file", where=str(path))
    # What has no value there is switched off, and in the way of nothing.
    raw = {key: value for key, value in raw.items() if value is not None}
    left: list[Problem] = []
    tool = _tool(raw)
    if raw.get("rl") or raw.get("stage", "sft") != "sft":
        key = "rl" if raw.get("rl") else "stage"
        how = "only supervised fine-tuning can be carried over; preference tuning is not in this version"
        raise UserError(f"{key}: {raw[key]} is no supervised fine-tuning", how=how, where=str(path))
    unneeded = drop_what_happens_anyway(raw)
    carry_template(raw, path.parent, left)
    datasets = _datasets(raw, tool, path, left)
    _batch(raw, tool, left)
    _method(raw, tool)
    _often(raw, left)
    _trackers(raw, left)
    if raw.pop("bf16", None) is True:
        raw.setdefault("model", {})["dtype"] = "bfloat16"
    if datasets:
        raw.setdefault("data", {})["train"] = datasets
    for name in ("load_in_4bit", "load_in_8bit"):
        if not raw.get(name, True):
            del raw[name]
    # Without the marks of a file: what is left is to be told by key.
    left += move_aliases(raw, {})
    recipe = _valid(raw, left)
    if recipe is None:
        first = next(iter(left), None)
        what = "no recipe can be made of it" + (f": {dotted(first.key)}: {first.what}" if first is not None else "")
        how = "init takes data, or a configuration of axolotl, LLaMA-Factory or TRL"
        raise UserError(what, how=how, where=str(path))
    unneeded += [problem.key for problem in left if is_harmless(problem.key)]
    left = [problem for problem in left if not is_harmless(problem.key)]
    recipe = _without_none(recipe)
    if tool == TRL and recipe["method"]["type"] == "lora" and "targets" not in recipe["method"]:
        what = "not given, so peft chooses by architecture (q_proj and v_proj for most); here all linear layers train"
        left.append(_not(("lora_target_modules",), what, "set method.targets to train the same"))
    return Translated(tool, recipe, tuple(left), tuple(unneeded), fill_defaults(recipe, tool))


def _tool(raw: Mapping[str, Any]) -> str:
    if "model_name_or_path" in raw:
        return LLAMA_FACTORY if {"dataset", "stage", "finetuning_type", "cutoff_len"} & raw.keys() else TRL
    return AXOLOTL


# ------------------------------------------------------------------------------------------------------ the parts


def _datasets(raw: dict[str, Any], tool: str, path: Path, left: list[Problem]) -> list[dict[str, Any]]:
    if tool == LLAMA_FACTORY:
        names = raw.pop("dataset", None)
        directory = Path(raw.pop("dataset_dir", "data"))
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names or ())
        held_out = raw.pop("eval_dataset", None)
        if isinstance(held_out, str):
            others = [_factory_dataset(name.strip(), directory, path, left) for name in held_out.split(",")]
            raw.setdefault("data", {})["eval"] = others
        # Theirs counts for each data set, as ours does.
        most = {"max_samples": raw.pop("max_samples")} if isinstance(raw.get("max_samples"), int) else {}
        return [_factory_dataset(name, directory, path, left) | most for name in names]
    if tool == TRL:
        moved = {"dataset_name": "path", "dataset_config": "subset", "dataset_train_split": "split"}
        found = {ours: raw.pop(theirs) for theirs, ours in moved.items() if raw.get(theirs) is not None}
        return [found] if "path" in found else []
    listed = raw.pop("datasets", None)
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise UserError("datasets: expected a list", how="write [{path: ..., type: ...}]", where=str(path))
    entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in listed]
    return [_axolotl_dataset(entry, index, left) for index, entry in enumerate(entries)]


def _axolotl_dataset(entry: Mapping[str, Any], index: int, left: list[Problem]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if entry.get("message_property_mappings") == {"role": "from", "content": "value"}:
        entry = {name: value for name, value in entry.items() if name != "message_property_mappings"}
        entry |= {"type": "sharegpt"}
    for name, value in entry.items():
        if name == "message_property_mappings" and value == {"role": "role", "content": "content"}:
            continue
        if name == "type" and isinstance(value, str):
            found["format"] = _AXOLOTL_TYPES.get(value, value.partition(".")[0])
        elif name == "data_files" and isinstance(value, list) and len(value) > 1:
            left.append(
                _not(("datasets", index, name), "several files", "write a glob in path, or list them one by one")
            )
        elif (ours := _AXOLOTL_NAMES.get(str(name), str(name))) in _KEPT:
            found[ours] = value[0] if name == "data_files" and isinstance(value, list) else value
        elif name not in ("ds_type",):
            left.append(_not(("datasets", index, str(name)), "has no counterpart", "see `columns` in the README"))
    column = {"sharegpt": "conversations", "messages": "messages"}.get(found.get("format", ""))
    if column is not None and (field := found.pop("field_messages", column)) != column:
        found["columns"] = {column: field}
    return found


def _factory_dataset(name: str, directory: Path, path: Path, left: list[Problem]) -> dict[str, Any]:
    """What dataset_info.json says of it; it lies in `dataset_dir`, which starts where their command was run."""
    places = [base / directory / "dataset_info.json" for base in (path.parent, Path.cwd())]
    info_file = next((place for place in places if place.is_file()), None)
    if info_file is None:
        how = f"put dataset_info.json into {directory}, or write the file or hub id in data.train.0.path"
        left.append(_not(("dataset",), f"there is no dataset_info.json that says what {name} is", how))
        return {"path": name}
    info = _read_info(info_file).get(name)
    if not isinstance(info, dict):
        names = sorted(_read_info(info_file))
        close = difflib.get_close_matches(name, names, n=1)
        how = f"did you mean {close[0]}?" if close else f"it has {', '.join(names[:8]) or 'none'}"
        raise UserError(f"dataset: {info_file} does not say what {name} is", how=how, where=str(path))
    found: dict[str, Any] = {"path": info.get("hf_hub_url") or str(info_file.parent / info.get("file_name", name))}
    found |= {ours: info[theirs] for theirs, ours in {"subset": "subset", "split": "split"}.items() if info.get(theirs)}
    found |= {"max_samples": info["num_samples"]} if info.get("num_samples") else {}
    columns = {
        _FACTORY_COLUMNS[key]: value for key, value in info.get("columns", {}).items() if key in _FACTORY_COLUMNS
    }
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    if (form := info.get("formatting", "alpaca")) != "alpaca" or columns:
        found["format"] = form
    if columns:
        found["columns"] = columns
    lost: list[KeyPath] = [(key,) for key in _FACTORY_LOST if info.get(key)]
    # A column that is called history is found without being told.
    named = {key: value for key, value in info.get("columns", {}).items() if (key, value) != ("history", "history")}
    lost += [("columns", key) for key in named if key not in _FACTORY_COLUMNS]
    for key in lost:
        left.append(_not(("dataset_info.json", name, *key), "has no counterpart", "see `columns` in the README"))
    return found


def _read_info(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON ({error})", how="correct it", where=str(file)) from None
    return known if isinstance(known, dict) else {}


def _batch(raw: dict[str, Any], tool: str, left: list[Problem]) -> None:
    """Per device times accumulation steps, for one device."""
    steps = raw.get("gradient_accumulation_steps") or 1
    if "gradient_accumulation_steps" in raw and not raw.keys() & set(_BATCHES):
        raw[_BATCHES[0]] = 1 if tool == AXOLOTL else DEFAULTS[tool]["training.global_batch_size"]
    name = next((name for name in _BATCHES if isinstance(raw.get(name), int)), None)
    if name is None or not isinstance(steps, int):
        return  # What is there is told as any other key that recipes have not.
    each = raw.pop(name)
    raw.pop("gradient_accumulation_steps", None)
    raw.setdefault("training", {})["global_batch_size"] = each * steps
    what = f"{each} a device x {steps} steps is a global batch of {each * steps} on one device"
    left.append(_not((name,), what, "multiply training.global_batch_size by the devices that you used"))


def _often(raw: dict[str, Any], left: list[Problem]) -> None:
    """Evaluations and checkpoints an epoch, as shares of the run."""
    if isinstance(raw.get("max_steps"), int) and {"evals_per_epoch", "saves_per_epoch"} & raw.keys():
        return  # How many epochs that is depends on the data.
    epochs = raw.get("num_epochs", raw.get("num_train_epochs", 1))
    often: dict[str, float] = {}
    for theirs, ours in {"evals_per_epoch": "eval_steps", "saves_per_epoch": "save_steps"}.items():
        number = raw.pop(theirs, None)
        # Once in the whole run is its end, where both happen anyway.
        if isinstance(number, int | float) and isinstance(epochs, int | float) and number * epochs > 1:
            often[ours] = number
            raw.setdefault("training", {})[ours] = round(1 / (number * epochs), 4)
        elif ours == "save_steps" and number:
            what = "a checkpoint at the end alone; here there is one at each evaluation, of which the last two stay"
            left.append(_not((theirs,), what, "set training.save_steps for fewer"))
    if len(often) == 2 and (times := often["eval_steps"] / often["save_steps"]) == int(times):
        # Exactly so many evaluations, whatever was rounded.
        raw["training"]["save_steps"] = round(raw["training"]["eval_steps"] * times, 8)


def _trackers(raw: dict[str, Any], left: list[Problem]) -> None:
    """axolotl names a tracker by a flag, or by the project that it is to have there."""
    if raw.get("report_to") in ("all", ["all"]):
        del raw["report_to"]
        left.append(_not(("report_to",), "all that are installed", "name them in training.report_to"))
    named = [tracker for flag, tracker in _TRACKER_FLAGS.items() if raw.get(flag) is True]
    for name in [name for name in raw if name in _TRACKER_FLAGS and isinstance(raw[name], bool)]:
        del raw[name]
    for name, tracker in _TRACKER_PROJECTS.items():
        if raw.get(name):
            named += [tracker] if tracker not in named else []
        else:
            raw.pop(name, None)
    if named:
        raw.setdefault("report_to", named)


def _method(raw: dict[str, Any], tool: str) -> None:
    """The method, where it is told by the lack of a key, or by a flag."""
    section = raw.setdefault("method", {})
    if tool == TRL:
        section["type"] = "lora" if raw.pop("use_peft", False) else "full"
    elif tool == AXOLOTL:
        section["type"] = raw.pop("adapter", None) or "full"
    else:
        section["type"] = raw.pop("finetuning_type", "lora")
        if raw.get("stage") == "sft":
            del raw["stage"]
    if section["type"] == "qlora":
        section["type"] = "lora"
        if not {"load_in_4bit", "quantization_bit"} & raw.keys():
            raw["load_in_4bit"] = True
    for name in ("do_train", "do_eval"):
        raw.pop(name, None)


# ------------------------------------------------------------------------------------------------------- the rest


def _valid(raw: dict[str, Any], left: list[Problem]) -> dict[str, Any] | None:
    """`raw` without what no recipe has, in our names; None where too little is left."""
    for _ in range(500):
        converted = convert_values(copy.deepcopy(raw))
        recipe, problems = validate({key: value for key, value in converted.items() if value != {}})
        if recipe is not None:
            problems = check(recipe)
        if not problems:
            return converted
        removed = [(problem, _remove(raw, problem.key)) for problem in problems]
        # What was switched off there is not missed here.
        left += [problem for problem, value in removed if value not in (MISSING, False, None, [], {})]
        if all(value is MISSING for _, value in removed):
            left += problems[:1]
            return None
    raise AssertionError("every round removes a key")


def _remove(container: Any, key: KeyPath) -> Any:
    """Take a key out; its value, or MISSING."""
    for part in key[:-1]:
        known = isinstance(container, list) and isinstance(part, int) and part < len(container)
        if not known and not (isinstance(container, dict) and part in container):
            return MISSING
        container = container[part]
    return container.pop(key[-1], MISSING) if key and isinstance(container, dict) else MISSING


def _without_none(value: Any) -> Any:
    """What was named with no value there is our default."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _not(key: KeyPath, what: str, how: str) -> Problem:
    return Problem(what, how, key=key)
