"""What training leaves behind: weights and what belongs to them, in a checkpoint and as the run's result."""

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ftkit.console import human_bytes
from ftkit.errors import StorageError
from ftkit.methods.base import Method
from ftkit.methods.beside import DIRECTORY as PROMPT
from ftkit.methods.beside import prompt_beside, save_beside
from ftkit.methods.files import BaseIdentity
from ftkit.models.files import (
    CONFIG_NAME,
    INDEX_NAME,
    PROCESSOR_PATTERNS,
    TensorFiles,
    copy_matching,
    flush,
    flush_entry,
    read_json,
    storage_errors,
    stored_dtype,
    weight_files,
)
from ftkit.models.load import load_tokenizer, local_directory
from ftkit.runs import ADAPTER, CHECKPOINTS, MODEL, write_json
from ftkit.training.checkpoint import checkpoint_name, find_damage
from ftkit.training.prepare import Prepared
from ftkit.training.state import LoopState

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Result:
    """The published weights."""

    path: Path
    step: int
    """Of the checkpoint that they are from."""
    text: str
    """One line for the terminal."""
    next_commands: tuple[str, ...]
    """What to paste next."""


def result_name(method: Method) -> str:
    """Name of the directory that holds a method's weights, in a run and in its checkpoints."""
    return MODEL if method.name == "full" else ADAPTER


def write_weights(
    parent: Path,
    model: PreTrainedModel,
    method: Method,
    prepared: Prepared,
    identity: BaseIdentity,
    state: Mapping[str, Tensor],
    prompt: Mapping[str, Tensor],
) -> None:
    """Write `parent/adapter` or `parent/model`: weights, tokenizer, chat template and generation config.

    A whole model gets its base's processors besides. A soft prompt beside the adapter gets a directory like it.

    Args:
        state: `method.trained_state`, whole and on the CPU.
        prompt: `state_beside`, likewise.
    """
    directories = [parent / result_name(method)]
    method.save(model, prepared.recipe.method, directories[0], identity, state=state)
    if prompt:
        directories.append(save_beside(model, parent, identity, prompt))
    prepared.template.save_to(prepared.tokenizer)
    for directory in directories:
        prepared.tokenizer.save_pretrained(directory)
        write_json(directory / GENERATION_CONFIG, _generation_config(prepared))
    if prompt and prepared.new_token_ids and prepared.recipe.model.tokenizer is None:
        # By itself a prompt meets a base without rows for new tokens.
        _write_base_tokenizer(prepared, directories[1])
    if method.name == "full":
        copy_matching(local_directory(prepared.base, weights=False), directories[0], PROCESSOR_PATTERNS)


def _write_base_tokenizer(prepared: Prepared, directory: Path) -> None:
    """Put the base's tokenizer in the place of the one with new tokens; the chat template stays."""
    for path in directory.glob("*token*"):
        path.unlink()
    tokenizer = load_tokenizer(prepared.base)
    tokenizer.chat_template = prepared.tokenizer.chat_template
    tokenizer.save_pretrained(directory)


def _generation_config(prepared: Prepared) -> dict[str, Any]:
    """The base's, stopping at every token that ends a trained turn: else the tuned model would not stop.

    As plain JSON: transformers refuses to save what many models ship, such as a temperature without sampling.
    """
    path = local_directory(prepared.base, weights=False) / GENERATION_CONFIG
    config = read_json(path) if path.is_file() else GenerationConfig.from_model_config(prepared.config).to_diff_dict()
    known = config.get("eos_token_id")
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    return config | {"eos_token_id": list(dict.fromkeys([*prepared.template.end_of_turn_ids, *known]))}


def publish_result(
    run: Path, state: LoopState, *, prepared: Prepared, method: Method, model: PreTrainedModel
) -> Result:
    """Copy the weights of the best or the last checkpoint to RUN/adapter or RUN/model, under a temporary name first.

    A prompt beside an adapter comes first: with the adapter the result is whole. A full model is cast from its float32
    masters to the precision that the base is stored in.

    Args:
        model: that was trained; tells what its class does not load.

    Raises:
        StorageError: the checkpoint is damaged, or the disk is full; nothing was changed.
    """
    final = prepared.recipe.training.final
    step = state.best_step if final == "best" and state.best_step is not None else state.step
    source = run / CHECKPOINTS / checkpoint_name(step) / result_name(method)
    target = run / result_name(method)
    if (damage := find_damage(source.parent)) is not None:
        raise StorageError(
            f"the checkpoint to publish is damaged: {damage}",
            where=str(source.parent),
            how="go on from another with --from",
        )
    prompt = prompt_beside(source)
    how = "free some space and go on with --resume; the checkpoints are intact"
    with storage_errors("cannot write the run's result", how=how, where=str(target)):
        if prompt is not None:
            with _publishing(prompt, run):
                pass
        with _publishing(source, run) as staging:
            if method.name == "full":
                base = local_directory(prepared.base, weights=True)
                _finish_model(staging, base, model._keys_to_ignore_on_load_unexpected)
    which = "the last step"
    if state.best_step == step:
        which = f"the best evaluation (step {step}, loss {state.best_metric:.4f})"
    size = human_bytes(sum(path.stat().st_size for path in target.glob("*.safetensors")))
    beside = f"; {run / PROMPT} the soft prompt" if prompt is not None else ""
    name = shlex.quote(str(run))
    # Without rows that were held back there is nothing to measure by itself.
    commands = [f"ftkit eval {name}"] if prepared.plan.validation_documents else []
    if method.merge_refusal is None and prompt is None:
        commands += [f"ftkit merge {name}"]
    commands += [f"ftkit export {name} --format {'hf' if method.name == 'full' else 'adapter'}"]
    return Result(target, step, f"{target} holds the weights of {which}, {size}{beside}", tuple(commands))


@contextmanager
def _publishing(source: Path, run: Path) -> Iterator[Path]:
    """A copy of `source` under a temporary name in the run's directory, which gets its own name at the end."""
    staging, target = run / f".staging-{source.name}", run / source.name
    try:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(source, staging)
        yield staging
        flush(staging)
        if target.exists():
            # Only a run that was interrupted between this rename and its end has one already.
            shutil.rmtree(target)
        staging.rename(target)
        flush_entry(run)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _finish_model(directory: Path, base: Path, not_loaded: Iterable[str] | None) -> None:
    """Give every weight of a model directory the precision that the base's files have it in, file by file.

    What those hold and transformers does not load, such as heads that predict several tokens at once, is copied.

    Args:
        not_loaded: expressions that match the beginnings of such names.
    """
    dtype, index = stored_dtype(base), directory / INDEX_NAME
    files = weight_files(directory)
    with TensorFiles(directory) as written, TensorFiles(base) as stored:
        others = [name for name in stored.names if name not in written]
    added = [name for name in others if any(re.search(one, name) for one in not_loaded or ())]
    with TensorFiles(base) as stored:
        for path in files:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kept = {name: stored[name].dtype if name in stored else dtype for name in tensors}
            cast = {name: t.to(kept[name]) if t.is_floating_point() else t for name, t in tensors.items()}
            if path == files[-1]:
                cast |= {name: stored[name] for name in added}
            save_file(cast, path, metadata=metadata)
    config = read_json(directory / CONFIG_NAME) | {"dtype": str(dtype).removeprefix("torch.")}
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if index.is_file():
        values = read_json(index)
        values.get("metadata", {}).pop("total_size", None)
        values["weight_map"] |= dict.fromkeys(added, files[-1].name)
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
