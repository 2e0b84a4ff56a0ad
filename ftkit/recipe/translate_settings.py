"""Settings of other tools whose values decide what becomes of them: asked for anyway here, or to be carried over."""

from pathlib import Path
from typing import Any

from ftkit.errors import KeyPath, Problem

_ASSISTANT = {"assistant", "gpt", "model", "bot", "chatbot"}
"""Names that configurations have for the role that we train on by default."""

TEMPLATES = ("chatml", "plain")
"""Built in; `ftkit/data/template_choice.py` has their texts."""


_OF_TRAINER = {
    "data.val_size": 0,
    "training.num_train_epochs": 3,
    "training.global_batch_size": 8,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0,
}
"""Of transformers' Trainer, which two of the tools train with."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "axolotl": {"data.val_size": 0, "data.max_length": 512, "training.num_train_epochs": 1},
    "LLaMA-Factory": {**_OF_TRAINER, "data.max_length": 2048, "training.learning_rate": 5e-5},
    "TRL": {**_OF_TRAINER, "data.max_length": 1024, "training.learning_rate": 2e-5},
}
"""Tool -> our key -> its default, where ours is another."""
LORA_DEFAULTS: dict[str, dict[str, Any]] = {
    "LLaMA-Factory": {"method.rank": 8, "method.targets": "all-linear"},
    "TRL": {"method.rank": 16, "method.alpha": 32, "method.dropout": 0.05},
}


def fill_defaults(recipe: dict[str, Any], tool: str) -> dict[str, Any]:
    """Write what the tool does where its configuration says nothing into the recipe; our dotted keys -> values."""
    wanted = dict(DEFAULTS[tool])
    if recipe["method"]["type"] == "lora":
        wanted |= LORA_DEFAULTS.get(tool, {})
        if tool == "LLaMA-Factory":
            wanted["method.alpha"] = 2 * recipe["method"].get("rank", wanted["method.rank"])
    if recipe.get("training", {}).get("max_steps") is not None:
        wanted.pop("training.num_train_epochs")
    if recipe.get("data", {}).get("eval"):
        wanted.pop("data.val_size")
    filled = {}
    for key, value in wanted.items():
        section, _, name = key.partition(".")
        values = recipe.setdefault(section, {})
        if values.get(name) is None:
            filled[key] = values[name] = value
    return filled


def drop_what_happens_anyway(raw: dict[str, Any]) -> list[KeyPath]:
    """Take out of a configuration what has the value that is ours; the keys."""
    dropped: list[KeyPath] = []
    for often in ("eval", "save", "logging"):
        # The strategy says no more than that the number of steps counts.
        if raw.get(f"{often}_strategy") == "steps" and raw.get(f"{often}_steps") is not None:
            dropped.append(_drop(raw, f"{often}_strategy"))
    tokens = raw.get("special_tokens")
    if isinstance(tokens, dict) and "pad_token" in tokens:
        dropped.append(("special_tokens", *_drop(tokens, "pad_token")))
        if not tokens:
            del raw["special_tokens"]
    listed = raw.get("datasets")
    for index, entry in enumerate(listed if isinstance(listed, list) else ()):
        if not isinstance(entry, dict):
            continue
        roles = entry.get("roles_to_train")
        if isinstance(roles, list) and roles and _ASSISTANT.issuperset(roles):
            dropped.append(("datasets", index, *_drop(entry, "roles_to_train")))
        if entry.get("train_on_eos") in ("turn", "all"):
            dropped.append(("datasets", index, *_drop(entry, "train_on_eos")))
    if raw.get("chat_template") == "tokenizer_default":
        dropped.append(_drop(raw, "chat_template"))
    return dropped


def carry_template(raw: dict[str, Any], directory: Path, left: list[Problem]) -> None:
    """Let `chat_template` name what we have: a file, or a built-in template. LLaMA-Factory's is called `template`."""
    key = "template" if "template" in raw else "chat_template"
    name = raw.get(key)
    if not isinstance(name, str) or name in TEMPLATES or any((base / name).is_file() for base in (directory, Path())):
        return
    del raw[key]
    if name == "jinja":
        what = "a template within the configuration"
        how = "write chat_template_jinja into a file and name that in model.chat_template"
    else:
        what = f"{name}: the tokenizer's own template is used"
        how = "where it has none, name a Jinja file, chatml or plain in model.chat_template"
    left.append(Problem(what, how, key=(key,)))


def _drop(mapping: dict[str, Any], name: str) -> KeyPath:
    del mapping[name]
    return (name,)
