"""The directory of an adapter: peft's two files, and one of ftkit's own that says which base it belongs to.

adapter_config.json         peft's for LoRA; for bottleneck adapters with "peft_type": "FTKIT_BOTTLENECK"
adapter_model.safetensors   the trained weights; the same weights give the same bytes
ftkit.json                  base, its fingerprint, ftkit's version (peft warns about keys of others in its own file)
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftkit.errors import FtkitError, Problem, UserError
from ftkit.models.files import read_json
from ftkit.models.load import BaseModel, fingerprint
from ftkit.recipe.method_schema import AdapterMethod, LoraMethod

CONFIG_NAME, WEIGHTS_NAME, IDENTITY_NAME = "adapter_config.json", "adapter_model.safetensors", "ftkit.json"
LORA, BOTTLENECK = "LORA", "FTKIT_BOTTLENECK"
"""Values of `peft_type`."""

_OF_THE_PROMPT = ("soft_prompt", "soft_prompt_learning_rate_ratio")
"""Keys of a section that say nothing of the adapter: a prompt beside it has a directory of its own."""
_TRAINED_AS, _QUANTIZATION = "method", "base_quantization"
"""Keys of ftkit.json."""
_READ = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "target_modules"}
_READ |= {"exclude_modules", "init_lora_weights", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"}
_READ |= {"modules_to_save", "target_parameters", "trainable_token_indices"}
# Neither changes what the saved weights compute: where they go is told by their own names.
_WITHOUT_EFFECT = {"task_type", "peft_version", "auto_mapping", "inference_mode", "fan_in_fan_out", "layers_pattern"}
_WITHOUT_EFFECT |= {"layers_to_transform", "loftq_config", "eva_config", "megatron_core", "qalora_group_size"}
_WITHOUT_EFFECT |= {"runtime_config", "ensure_weight_tying"}
_BASE_KEPT = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that start from the base as it is; pissa, olora, corda ... change its weights."""


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model an adapter was trained on."""

    name: str
    """Hub id or path."""
    revision: str | None = None
    """Commit of the hub repository."""
    fingerprint: str | None = None
    """Of the weight files' content; None where it is not known, as for adapters of other tools."""

    def __str__(self) -> str:
        return f"{self.name}{f' at {self.revision[:12]}' if self.revision else ''} ({self.fingerprint})"


def identify(base: BaseModel, *, remembered: bool = False) -> BaseIdentity:
    """The identity of a base model; its weights are hashed, see `fingerprint`."""
    return BaseIdentity(str(base.path or base.repo_id), base.revision, fingerprint(base, remembered=remembered))


def check_base(trained: Path, trained_on: BaseIdentity, here: BaseIdentity) -> None:
    """Check that weights meet the base that they were trained on, as far as that is known.

    Args:
        trained: where the weights lie.

    Raises:
        UserError: the base's weights are others; both are named.
    """
    if trained_on.fingerprint not in (None, here.fingerprint):
        what = f"{trained} was trained on {trained_on}, and the weights of {here} are others"
        raise UserError(what, how=f"use {trained_on.name} as it was then")


def write_adapter(
    directory: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    identity: BaseIdentity,
    *,
    base_dtype: torch.dtype,
    base_quantization: str | None = None,
    trained_as: LoraMethod | None = None,
) -> None:
    """Write the three files; `config` is what is particular to the method.

    Args:
        base_dtype: precision that the frozen base had in training, quantised layers aside.
        base_quantization: what those layers were kept in.
        trained_as: the section to go on training with, where `config` does not say all of it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = {"base_model_name_or_path": identity.name, "revision": identity.revision, "task_type": "CAUSAL_LM"}
    _write_json(directory / CONFIG_NAME, {**config, **names})
    known = {"base_model": identity.name, "revision": identity.revision, "base_fingerprint": identity.fingerprint}
    precision = str(base_dtype).removeprefix("torch.")
    own: dict[str, Any] = {"ftkit_version": _version(), **known, "base_dtype": precision}
    own |= {_QUANTIZATION: base_quantization} if base_quantization is not None else {}
    if trained_as is not None:
        own[_TRAINED_AS] = trained_as.model_dump(mode="json", exclude={"init_from", *_OF_THE_PROMPT})
    _write_json(directory / IDENTITY_NAME, own)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        on_cpu = tensor.detach().to("cpu").contiguous()
        # safetensors refuses one tensor under two names, as tied weights have them.
        twice = any(on_cpu.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = on_cpu.clone() if twice else on_cpu
    # safetensors orders tensors itself, but not metadata: a second entry would make the bytes differ.
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def read_adapter(directory: Path, *, peft_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of an adapter of the kind `peft_type`.

    Raises:
        UserError: a file is missing or damaged, holds a pickle, or the adapter is of another kind.
    """
    config, weights = _read_config(directory), directory / WEIGHTS_NAME
    if config.get("peft_type") != peft_type:
        raise UserError(
            f"is an adapter of the kind {config.get('peft_type')!r}, not {peft_type!r}",
            how="ftkit reads LoRA, prompts and prefixes of peft, and its own bottleneck adapters",
            where=str(directory / CONFIG_NAME),
        )
    if not weights.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        raise UserError(
            f"has no {WEIGHTS_NAME}" + (", only a pickle file, which ftkit never reads" if pickled else ""),
            how="load and save it once with peft, if you trust it" if pickled else "name the directory of an adapter",
            where=str(directory),
        )
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise UserError(f"is damaged ({error})", how="copy or download it again", where=str(weights)) from None


def read_identity(directory: Path) -> BaseIdentity:
    """Which base the adapter in `directory` belongs to, as far as its files say; an empty name where they do not."""
    config = _read_config(directory)
    own = directory / IDENTITY_NAME
    fingerprint = read_json(own).get("base_fingerprint") if own.is_file() else None
    return BaseIdentity(config.get("base_model_name_or_path") or "", config.get("revision"), fingerprint)


def read_quantization(directory: Path) -> Literal["nf4", "int8"] | None:
    """What the linear layers of the base were quantised to while the adapter in `directory` trained.

    Raises:
        UserError: ftkit.json says something else.
    """
    own = directory / IDENTITY_NAME
    value = read_json(own).get(_QUANTIZATION) if own.is_file() else None
    if value not in ("nf4", "int8", None):
        raise UserError(f"{_QUANTIZATION}: {value!r} is unknown", how="restore the file as it was", where=str(own))
    return value


def trained_as(directory: Path) -> LoraMethod | None:
    """The section that a LoRA of ftkit was trained with, where peft's configuration does not say all of it."""
    own = directory / IDENTITY_NAME
    values = read_json(own).get(_TRAINED_AS) if own.is_file() else None
    try:
        return None if values is None else LoraMethod.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, own) from None


def lora_config(section: LoraMethod, targets: Sequence[str], *, fan_in_fan_out: bool) -> dict[str, Any]:
    """peft's configuration of a LoRA; of a PiSSA that of a plain one, which loads on the base as it is.

    Args:
        targets: names or paths that peft matches to exactly the adapted modules.
        fan_in_fan_out: whether the weights lie transposed, as in GPT-2's Conv1D.
    """
    initial: bool | str = section.init if section.init == "gaussian" else True
    section = _plain_lora(section)
    return {
        "peft_type": LORA,
        "r": section.rank,
        "lora_alpha": _plain_number(section.alpha),
        "rank_pattern": section.rank_pattern,
        "alpha_pattern": {name: _plain_number(alpha) for name, alpha in section.alpha_pattern.items()},
        "use_rslora": section.rank_stabilized,
        "use_dora": section.dora,
        "lora_dropout": section.dropout,
        "target_modules": list(targets),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": initial,
        "inference_mode": True,
    }


def lora_section(config: Mapping[str, Any], where: Path) -> LoraMethod:
    """The section that a peft configuration says.

    Raises:
        UserError: it uses something that ftkit lacks; all of it is named.
    """
    problems = [
        Problem(f"{name}: {json.dumps(value)} is not supported", _PEFT_REMEDY, str(where / CONFIG_NAME))
        for name, value in sorted(config.items())
        if not _supported(name, value)
    ]
    if problems:
        raise UserError.of(problems)
    targets = config.get("target_modules") or "all-linear"
    exclude = config.get("exclude_modules") or ()
    values = {"type": "lora", "rank": config.get("r"), "alpha": config.get("lora_alpha")}
    values |= {"dropout": config.get("lora_dropout", 0.0), "targets": _names(targets), "exclude": _names(exclude)}
    values |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    values |= {name: tuple(config.get(name) or ()) for name in ("modules_to_save", "target_parameters")}
    values["init"] = "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming"
    values |= {"rank_stabilized": config.get("use_rslora") or False, "dora": config.get("use_dora") or False}
    try:
        return LoraMethod.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, where / CONFIG_NAME) from None


def bottleneck_config(section: AdapterMethod) -> dict[str, Any]:
    """The configuration of bottleneck adapters: the keys of their section."""
    return {"peft_type": BOTTLENECK, **section.model_dump(exclude={"type", "init_from", *_OF_THE_PROMPT})}


def bottleneck_section(config: Mapping[str, Any], where: Path) -> AdapterMethod:
    """The section that a configuration of `bottleneck_config` says.

    Raises:
        UserError: a key is missing, unknown or has a bad value.
    """
    others = {"peft_type", "base_model_name_or_path", "revision", "task_type"}
    values = {name: value for name, value in config.items() if name not in others}
    try:
        return AdapterMethod.model_validate({"type": "adapter", **values})
    except ValidationError as error:
        raise _invalid(error, where / CONFIG_NAME) from None


def _plain_lora(section: LoraMethod) -> LoraMethod:
    """The LoRA that is saved: for a PiSSA twice the rank at the same scale, since B A - B0 A0 = [B, -B0] [A; A0]."""
    if section.init != "pissa":
        return section
    growth = math.sqrt(2.0) if section.rank_stabilized else 2.0
    ranks = {name: 2 * rank for name, rank in section.rank_pattern.items()}
    alphas = {name: growth * alpha for name, alpha in section.alpha_pattern.items()}
    update = {"rank": 2 * section.rank, "alpha": growth * section.alpha, "init": "kaiming"}
    return section.model_copy(update={**update, "rank_pattern": ranks, "alpha_pattern": alphas})


_PEFT_REMEDY = "merge it into its base with peft's merge_and_unload and use the merged model"


def _supported(name: str, value: Any) -> bool:
    """Whether a key of peft's configuration is one that ftkit reads, or says nothing."""
    if name == "init_lora_weights":
        return value in _BASE_KEPT
    return name in _READ or name in _WITHOUT_EFFECT or not value or (name == "bias" and value == "none")


def _plain_number(alpha: float) -> int | float:
    """peft and vLLM declare alphas as integers; a fraction works in both all the same."""
    return int(alpha) if alpha.is_integer() else alpha


def _names(value: str | Sequence[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(sorted(value))


def _invalid(error: ValidationError, file: Path) -> FtkitError:
    how = "restore the file as it was written"
    details = [(".".join(str(part) for part in detail["loc"]), detail["msg"]) for detail in error.errors()]
    return UserError.of(Problem(f"{key}: {message}", how, str(file)) for key, message in details)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"has no {CONFIG_NAME}", how="name the directory of an adapter", where=str(directory))
    return read_json(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    # Only the outermost keys are sorted: of patterns that match the same layer, the first one counts.
    path.write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n", encoding="utf-8")


def _version() -> str:
    try:
        return metadata.version("ftkit")
    except metadata.PackageNotFoundError:
        return "unknown"
