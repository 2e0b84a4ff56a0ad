"""What to paste after an export or a merge: commands for the tools that serve models, or why they cannot."""

import shlex
from pathlib import Path

from ftkit.methods.files import BOTTLENECK, LORA, read_quantization
from ftkit.models.files import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, TEMPLATE_NAME, read_json
from ftkit.models.load import TOKENIZER_FILES, local_directory
from ftkit.runs import EXPORT, MERGED, VALIDATION, Target, find_target

VLLM_URL, LLAMA_CPP_URL = "http://localhost:8000", "http://localhost:8080"
"""Where the servers listen unless told otherwise."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that its --max-lora-rank takes."""
_HELLO = "[{'role': 'user', 'content': 'Hello'}]"
_BOTTLENECK = "it is a bottleneck adapter, which only ftkit computes; train method.type: lora for a server"
_BEYOND_LORA = {
    "use_dora": "DoRA's lengths",
    "modules_to_save": "modules that trained in full",
    "trainable_token_indices": "rows of new tokens",
    "target_parameters": "updates of stacked experts",
    # It reads one rank and one alpha, and would scale all updates alike.
    "rank_pattern": "a rank of its own for some layers",
    "alpha_pattern": "an alpha of its own for some layers",
}
"""Keys of peft's configuration that vLLM refuses or does not read."""


def after_export(target: Target, output: Path, format: str) -> list[str]:
    """The lines to show once `output` is written: commands, indented, and notes.

    Args:
        format: a key of `EXPORTERS`.
    """
    if format == "gguf":
        (file,) = output.glob("*.gguf")
        verify = _verify(target, output, LLAMA_CPP_URL, exported=file) if _has_template(target) else []
        return [f"  llama-server --jinja -m {_quoted(file)}", *verify]
    return _after_adapter(target, output) if format == "adapter" else after_model(target, output)


def after_model(target: Target | None, output: Path) -> list[str]:
    """The lines to show once a model directory is written.

    Args:
        target: what it was made of; None where that is no single run or adapter.
    """
    if target is None:
        target = find_target(str(output), offline=True)
    has_template = (output / TEMPLATE_NAME).is_file()
    question = _HELLO if has_template else "'Hello'"
    code = f"from transformers import pipeline; print(pipeline('text-generation', {str(output)!r})({question}))"
    evaluate = [f"  ftkit eval {_quoted(output)}"] if _held_rows_back(target, output) else []
    verify = _verify(target, output, VLLM_URL, exported=output) if has_template else []
    remote = " --trust-remote-code" if target.model.trust_remote_code else ""
    return [*evaluate, f"  vllm serve {_quoted(output)}{remote}", *verify, _python(code)]


def _after_adapter(target: Target, output: Path) -> list[str]:
    assert target.adapter is not None, "exported just now"
    config = read_json(output / ADAPTER_CONFIG_NAME)
    base, label = str(config["base_model_name_or_path"]), _quoted(target.label)
    if config.get("peft_type") == BOTTLENECK:
        return [f"note: vLLM does not load it: {_BOTTLENECK}"]
    code = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM as M; "
        f"print(PeftModel.from_pretrained(M.from_pretrained({_arguments(base, config)}), {str(output)!r}))"
    )
    peft = [] if config.get("trainable_token_indices") else [_python(code)]
    if (hindrance := _hindrance(target, config)) is not None:
        mergeable = config.get("peft_type") == LORA and target.prompt is None
        merge = [f"  ftkit merge {label}"] if mergeable else []
        return [f"note: vLLM does not load it: {hindrance}", *merge, *peft]
    serve = ["vllm serve", _quoted(base), "--enable-lora", f"--max-lora-rank {_served_rank(config)}"]
    if config.get("revision"):
        serve.append(f"--revision {config['revision']}")
    if target.model.trust_remote_code:
        serve.append("--trust-remote-code")
    serve += [f"--lora-modules tuned={_quoted(output)}", *_unlike_base(target, output)]
    verify = _verify(target, output, VLLM_URL, exported=None) if _has_template(target) else []
    return [f"  {' '.join(serve)}", *verify, *peft]


def _hindrance(target: Target, config: dict[str, object]) -> str | None:
    """Why a server that knows LoRA does not load the adapter, or would compute something else with it."""
    if config.get("peft_type") != LORA:
        return "it is no LoRA; peft does"
    if int(str(config.get("r") or 0)) > max(VLLM_RANKS):
        return f"its rank is above {max(VLLM_RANKS)}; a merged model has the update"
    if target.prompt is not None:
        return "it trained with the soft prompt in prompt/; only ftkit puts both together"
    if target.adapter is not None and (form := read_quantization(target.adapter)) is not None:
        return f"it trained on the base in {form}, which a merge keeps"
    return next(
        (f"it has {what}; a merged model has them" for key, what in _BEYOND_LORA.items() if config.get(key)), None
    )


def _served_rank(config: dict[str, object]) -> int:
    """The rank that vLLM is to make room for: it knows certain sizes, and refuses adapters that are larger."""
    rank = int(str(config.get("r") or 0))
    return next((size for size in VLLM_RANKS if size >= rank), rank)


def _unlike_base(target: Target, output: Path) -> list[str]:
    """What vLLM takes from the base's directory unless it is told to take it from the adapter's."""
    base = local_directory(target.model, weights=False)
    options = []
    if _template(base) != _template(output) and (output / TEMPLATE_NAME).is_file():
        options.append(f"--chat-template {_quoted(output / TEMPLATE_NAME)}")
    if not _ends(output) <= _ends(base):
        options.append(f"--generation-config {_quoted(output)}")
    return options


def _template(directory: Path) -> str | None:
    """The chat template of a directory, in the file of its own or in the tokenizer's configuration."""
    if (path := directory / TEMPLATE_NAME).is_file():
        return path.read_text(encoding="utf-8")
    path = directory / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None


def _ends(directory: Path) -> set[int]:
    """Tokens at which generation ends, as a directory's files say."""
    path = next(
        (directory / name for name in (GENERATION_CONFIG_NAME, CONFIG_NAME) if (directory / name).is_file()), None
    )
    ends = read_json(path).get("eos_token_id") if path is not None else None
    return {ends} if isinstance(ends, int) else set(ends or ())


def _has_template(target: Target) -> bool:
    places = [target.tokenizer, local_directory(target.model, weights=False)]
    place = next(
        (one for one in places if one is not None and any((one / name).is_file() for name in TOKENIZER_FILES)), None
    )
    return place is not None and _template(place) is not None


def _held_rows_back(target: Target, output: Path) -> bool:
    """Whether `ftkit eval` of what lies there knows rows to measure."""
    run = target.run
    return (
        run is not None
        and output.absolute().parent == run.absolute()
        and (run / VALIDATION).is_file()
        and any(read_json(run / VALIDATION).values())
    )


def _verify(target: Target, output: Path, url: str, *, exported: Path | None) -> list[str]:
    """The comparison of what was trained with what is served, and with the files where these are not in the run."""
    label = _quoted(target.label)
    code = " --trust-remote-code" if target.model.trust_remote_code else ""
    lines = [f"  ftkit verify {label} --endpoint {url}{code}"]
    own = target.adapter or target.tokenizer
    # Of a checkpoint `verify` does not look for what was made.
    is_result = target.run is not None and own is not None and own.resolve().parent == target.run.resolve()
    inside = target.run is not None and output.absolute() in [
        (target.run / name).absolute() for name in (MERGED, EXPORT)
    ]
    if inside and is_result:
        return [f"  ftkit verify {label}{code}", *lines]
    # What is compared with itself says nothing.
    other = exported is not None and exported.absolute() != Path(target.label).absolute()
    return ([f"  ftkit verify {label} --exported {_quoted(str(exported))}{code}"] if other else []) + lines


def _arguments(base: str, config: dict[str, object]) -> str:
    return repr(base) + (f", revision={config['revision']!r}" if config.get("revision") else "")


def _python(code: str) -> str:
    """A command that runs `code`; in double quotes, as people write it, where no character in it is the shell's."""
    return f'  python -c "{code}"' if not set(code) & set('"$`\\!') else f"  python -c {shlex.quote(code)}"


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))
