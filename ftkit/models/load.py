"""From the recipe's `base_model` to configuration, tokenizer and weights.

`find_base` looks up where the model lies and checks that it can be had, before any data is read. The weights of a hub
model are downloaded when `load_weights` or `fingerprint` first need them.
"""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ftkit.errors import NetworkError, UserError
from ftkit.models.files import CONFIG_NAME, check_model_directory, read_json, stored_dtype, weight_files
from ftkit.models.gguf import convert_gguf
from ftkit.models.hashes import hash_once
from ftkit.models.hub import BASE_KEY, REVISION_KEY, UnknownModelError, fetch, resolve_commit
from ftkit.models.multimodal import auto_class, is_multimodal, multimodal_refusal
from ftkit.models.precision import cast_parameters
from ftkit.models.quantization import KEY as QUANTIZATION_KEY
from ftkit.models.quantization import check_available, quantize, take_over
from ftkit.models.quiet import quiet_transformers
from ftkit.recipe.schema import ModelSection

HUB_PREFIX = "hf://"
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
ATTENTION_KEY = ("model", "attn_implementation")
DTYPE_KEY = ("model", "dtype")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Where a model's files are: a local directory, or a commit of a hub repository."""

    name: str
    """`base_model` as the recipe has it."""
    path: Path | None = None
    """The local directory; None for a hub model."""
    repo_id: str | None = None
    revision: str | None = None
    """The commit of a hub model."""
    offline: bool = False
    trust_remote_code: bool = False
    quantization: str | None = None
    """What its frozen linear layers are loaded in, see `models/quantization.py`; None: as they are stored."""


def find_base(
    base_model: str,
    section: ModelSection,
    *,
    base: Path,
    offline: bool = False,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> BaseModel:
    """Find the base model and check that its configuration and, unless told otherwise, its weights can be had.

    A path that exists (relative to `base`, the recipe's directory) wins over a hub id; `hf://org/name` forces the hub.
    A .gguf file is converted into the user's cache and is a directory from then on.

    Raises:
        UserError: no such path or hub model, files missing, pickled weights only, gated, refused token, or a package
            that `model.quantization` needs is missing.
        NetworkError: the hub cannot be reached.
    """
    if weights:
        check_available(section.quantization)
    path = (base / Path(base_model).expanduser()).absolute()
    if base_model.startswith(HUB_PREFIX) or not path.exists():
        if not base_model.startswith(HUB_PREFIX) and looks_like_path(base_model):
            raise UserError(f"no such model: {path}", how=_similar(path), key=BASE_KEY)
        repo_id = base_model.removeprefix(HUB_PREFIX)
        try:
            revision = resolve_commit(repo_id, section.revision, offline=offline, weights=weights)
        except (UnknownModelError, NetworkError) as error:
            if base_model.startswith(HUB_PREFIX):
                raise
            meant = how if (how := _similar(path)) and how.startswith("did you mean") else None
            nor_a_path = (
                replace(p, what=f"{p.what}, and there is no {path}", how=meant or p.how) for p in error.problems
            )
            raise type(error).of(nor_a_path) from None
        return BaseModel(
            base_model,
            repo_id=repo_id,
            revision=revision,
            offline=offline,
            trust_remote_code=trust_remote_code,
            quantization=section.quantization,
        )
    if section.revision is not None:
        what = f"a revision belongs to a hub model, and {base_model} is a local path"
        raise UserError(what, how=f"remove it, or write {HUB_PREFIX}{base_model}", key=REVISION_KEY)
    if path.is_file():
        if path.suffix != ".gguf":
            how = "name its directory, or a .gguf file"
            raise UserError(f"{path} is a file, not a model directory", how=how, key=BASE_KEY)
        path = convert_gguf(path, key=BASE_KEY)
    check_model_directory(path, key=BASE_KEY, weights=weights)
    return BaseModel(base_model, path=path, trust_remote_code=trust_remote_code, quantization=section.quantization)


def local_directory(base: BaseModel, *, weights: bool) -> Path:
    """The directory that holds the model's files, downloading what is missing; its weights only when asked for."""
    if base.path is not None:
        return base.path
    assert base.repo_id is not None, "a model without a directory is on the hub"
    assert base.revision is not None, "and pinned"
    return fetch(base.repo_id, base.revision, weights=weights, code=base.trust_remote_code, offline=base.offline)


def load_config(base: BaseModel) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        UserError: unknown architecture, remote code that was not allowed, or a model that ftkit does not train:
            encoder-decoder, without a language-model head, quantized in a way that ftkit does not read, or of a
            multimodal kind that cannot be tuned.
    """
    quiet_transformers()
    directory = local_directory(base, weights=False)
    raw = read_json(directory / CONFIG_NAME)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=base.trust_remote_code, local_files_only=True)
    except (ValueError, OSError, ImportError, TypeError) as error:
        if "auto_map" in raw and not base.trust_remote_code:
            what = f"{base.name} brings its own Python code, which does not run unless you allow it"
            how = "--trust-remote-code, if you trust its authors"
        else:
            what = f"{base.name}: {CONFIG_NAME} cannot be read: {_first_line(error)}"
            how = "check its model_type, or upgrade transformers"
        raise UserError(what, how=how, key=BASE_KEY) from None
    if (stored := stored_quantization(config)) is not None:
        # transformers needs bitsandbytes to read 8-bit weights too.
        check_available("nf4", key=BASE_KEY)
        if base.quantization not in (None, stored):
            what = f"{base.name} is stored in {stored}, which {base.quantization} cannot be made of"
            raise UserError(what, how="leave it out, or choose the unquantized model", key=QUANTIZATION_KEY)
    if (reason := _unsupported(config)) is not None:
        how = (
            "choose a causal language model, text-only or the language layers of one like Gemma 3, Qwen 3.5, Mistral 3"
        )
        raise UserError(f"{base.name} {reason}", how=how, key=BASE_KEY)
    return config


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: its files are missing or damaged.
    """
    quiet_transformers()
    directory = local_directory(base, weights=False)
    # Without this check transformers makes up an empty tokenizer for some architectures.
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        what = f"{base.name} has no tokenizer (tokenizer.json)"
        raise UserError(what, how="copy one into its directory", key=BASE_KEY)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=base.trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises the base class itself
        what = f"{base.name}: the tokenizer cannot be read: {_first_line(error)}"
        raise UserError(what, how="restore or download its files again", key=BASE_KEY) from None


def load_weights(base: BaseModel, *, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model on the CPU in evaluation mode, every parameter read from the files and cast to `dtype`.

    Rotary and other buffers keep the precision that the model computes them in (float32). What `base.quantization` says
    is quantised from the values in the files, not from their cast; what lies there quantised stays it.

    Args:
        attn_implementation: transformers' name of the attention function; None leaves the model's default.

    Raises:
        UserError: damaged files, or names and shapes that do not agree with the configuration: a weight that the
            files lack would be random, one that the model lacks would be lost.
    """
    config = load_config(base)
    directory = local_directory(base, weights=True)
    keywords: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    stored, first_dtype = stored_quantization(config), dtype
    if stored is not None:
        keywords["device_map"] = {"": "cpu"}
    elif base.quantization is not None and dtype != torch.float32:
        first_dtype = stored_dtype(directory)
    try:
        loaded: Any = auto_class(config).from_pretrained(
            directory,
            config=config,
            dtype=first_dtype,
            use_safetensors=True,
            # Reported below in our own words, all at once.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=base.trust_remote_code,
            local_files_only=True,
            **keywords,
        )
    except SafetensorError as error:
        what = f"{base.name}: a weight file is damaged: {_first_line(error)}"
        raise UserError(what, how="download or copy it again", key=BASE_KEY) from None
    except (ImportError, ValueError) as error:
        if attn_implementation is None:
            raise UserError(f"{base.name} cannot be loaded: {_first_line(error)}", key=BASE_KEY) from None
        what = f"{base.name} cannot use attention {attn_implementation}: {_first_line(error)}"
        raise UserError(what, how="attn_implementation: auto", key=ATTENTION_KEY) from None
    model, info = loaded
    _check_complete(base, info)
    if stored is not None:
        take_over(model)
    elif base.quantization is not None:
        quantize(model, base.quantization)
        cast_parameters(model, dtype)
    return model


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """What a model's files hold its linear layers in: a value of `model.quantization`, or None for plain numbers.

    None too for what ftkit does not read, which `load_config` refuses.
    """
    values = _quantization_config(config)
    if values.get("quant_method") != "bitsandbytes":
        return None
    return "nf4" if values.get("load_in_4bit") else "int8"


def fingerprint(base: BaseModel, *, remembered: bool = False) -> str:
    """ "sha256:HEX" over the bytes of the weight files in the order of their names, wherever they lie.

    A hub model's is that of its commit; the same files in a directory have the same fingerprint.

    Args:
        remembered: a large model that does not look changed since it was hashed is not read again.
    """
    return hash_once(weight_files(local_directory(base, weights=True), key=BASE_KEY), remembered=remembered)


def choose_compute_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype that activations have, and the reason in words for the run's header.

    Args:
        requested: `model.dtype` of the recipe.

    Raises:
        UserError: float16, which needs loss scaling.
    """
    if requested == "float16":
        what = "float16 needs loss scaling: not in this version"
        raise UserError(what, how="model.dtype: auto, bfloat16 or float32", key=DTYPE_KEY)
    fast, reason = _bfloat16_support(device)
    if requested == "auto":
        return (torch.bfloat16 if fast else torch.float32), reason
    if requested == "bfloat16" and not fast:
        return torch.bfloat16, f"the recipe asks for it; {reason}, float32 may be much faster"
    return (torch.bfloat16 if requested == "bfloat16" else torch.float32), "the recipe asks for it"


def _bfloat16_support(device: torch.device) -> tuple[bool, str]:
    """Whether a device computes fast in bfloat16, and a few words about it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm{major}{minor})"
        if major >= 8:
            return True, f"{name} is fast in bfloat16"
        return False, f"{name} has no fast bfloat16, and float16 needs loss scaling"
    if device.type == "cpu":
        # On CPUs without these instructions bfloat16 was 17 times slower than float32.
        if torch.cpu._is_amx_tile_supported():
            return True, "this CPU has AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return True, "this CPU has AVX512-BF16"
        return False, "this CPU has neither AVX512-BF16 nor AMX"
    return False, f"float32 is the safe choice on {device.type}"


def _check_complete(base: BaseModel, info: dict[str, Any]) -> None:
    shapes = [f"{name} {list(here)}, not {list(there)}" for name, here, there in sorted(info["mismatched_keys"])]
    problems = (
        ("lack weights of the model", sorted(info["missing_keys"])),
        ("hold weights that the model does not have", sorted(info["unexpected_keys"])),
        ("hold weights of another shape", shapes),
    )
    found = [f"{what} ({len(names)}, e.g. {names[0]})" for what, names in problems if names]
    if found:
        what = f"{base.name}: its weight files {' and '.join(found)}"
        raise UserError(what, how=f"check that {CONFIG_NAME} and the weights belong together", key=BASE_KEY)


def _unsupported(config: PreTrainedConfig) -> str | None:
    """Why ftkit does not train this kind of model; None if it does."""
    if config.is_encoder_decoder:
        return f"is an encoder-decoder ({config.model_type}), not a causal language model"
    if (quantization := _quantization_config(config)) and stored_quantization(config) is None:
        return f"holds quantized weights ({quantization.get('quant_method')}): not in this version"
    if is_multimodal(config):
        return multimodal_refusal(config)
    architectures = config.architectures or []
    if architectures and not any(name.endswith(CAUSAL_SUFFIXES) for name in architectures):
        return f"is a {architectures[0]}, not a causal language model"
    return None


def _quantization_config(config: PreTrainedConfig) -> dict[str, Any]:
    values = getattr(config, "quantization_config", None) or {}
    return values if isinstance(values, dict) else dict(values.to_dict())


def looks_like_path(name: str) -> bool:
    """Whether a name that is no path here was meant as one, not as a hub id."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def _similar(path: Path) -> str:
    """A directory or .gguf file nearby with a similar name, as a hint."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no directory {folder}"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    if matches := difflib.get_close_matches(path.name, names, n=3):
        return f"did you mean {' or '.join(str(folder / name) for name in matches)}?"
    return f"in {folder} there is {', '.join(sorted(names)[:5]) or 'no model'}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
