"""What other tools' values mean here, and the values of later versions of ftkit: the tables beside `foreign.py`."""

from collections.abc import Callable, Mapping
from typing import Any


def same(value: Any) -> Any:
    """The value as it is."""
    return value


def choices(meanings: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """Puts words and switches in our terms; a value that `meanings` does not know passes, for validation to refuse."""

    def convert(value: Any) -> Any:
        # 1 == True: a number must not pass for a switch.
        known = isinstance(value, str | bool) or value is None
        return meanings.get(value, value) if known else value

    return convert


def quantization_of_bits(value: Any) -> Any:
    """LLaMA-Factory says how many bits a quantised weight has."""
    return {4: "nf4", 8: "int8"}.get(value, value) if type(value) is int else value


def as_share(value: Any) -> Any:
    """A ratio of 1 is the whole run, not one step: as a float it is refused."""
    return float(value) if type(value) is int else value


def as_whole(value: Any) -> Any:
    """3.0 -> 3: other tools have fractions of epochs."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def module_names(value: Any) -> Any:
    """LLaMA-Factory's `all` and `q_proj,v_proj`."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all_linear"):
        return "all-linear"
    return [name.strip() for name in value.split(",")] if "," in value and "(" not in value else value


def tokens(value: Any) -> Any:
    """LLaMA-Factory's `<a>,<b>`."""
    return [token.strip() for token in value.split(",")] if isinstance(value, str) else value


def initialisation(value: Any) -> Any:
    """peft's `pissa_niter_4`."""
    return "pissa" if isinstance(value, str) and value.startswith("pissa_niter_") else value


def lower(value: Any) -> Any:
    """LORA -> lora."""
    return value.lower() if isinstance(value, str) else value


def non_linearity(value: Any) -> Any:
    """torch's names of classes: LeakyReLU -> leaky_relu."""
    return value.lower().replace("leakyrelu", "leaky_relu") if isinstance(value, str) else value


def trackers(value: Any) -> Any:
    """`none`, `tensorboard`, `tensorboard,wandb`: other tools have one name in place of a list."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if value in (None, ["none"]):
        return []
    return [choices({"comet": "comet_ml"})(name) for name in value] if isinstance(value, list) else value


ADAPTER_PRESETS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("bottleneck", "houlsby", "double_seq_bn")},
    **{name: {"placement": ["feed_forward"]} for name in ("pfeiffer", "seq_bn")},
    "par_bn": {"placement": ["feed_forward"], "insertion": "parallel"},
}
"""AdapterHub's names of bottleneck adapters -> where these lie in our terms; their sizes are the recipe's."""


def adapter_preset(section: Any) -> Any:
    """{type: pfeiffer} -> {type: adapter, placement: [feed_forward]}; keys that are given win."""
    name = section.get("type") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in ADAPTER_PRESETS:
        return section
    return {**ADAPTER_PRESETS[name], **section, "type": "adapter"}


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "model.dtype": choices({"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}),
    "model.quantization": choices(
        dict.fromkeys(("int4", "4bit", 4, "bnb_4bit"), "nf4") | dict.fromkeys(("8bit", 8, "bnb_8bit"), "int8")
    ),
    "model.add_tokens": tokens,
    "model.add_special_tokens": tokens,
    "model.attn_implementation": choices({"fa2": "flash_attention_2"}),
    "data.packing": choices({True: "auto", False: "off"}),
    "data.train.*.format": choices(
        {"chat_template": "messages", "openai": "messages", "chatml": "messages", "completion": "text"}
    ),
    "method": adapter_preset,
    "method.type": choices(
        dict.fromkeys(("prompt_tuning", "prompt-tuning", "soft-prompt"), "soft_prompt")
        | dict.fromkeys(("prefix_tuning", "prefix-tuning", "p_tuning_v2", "p-tuning-v2", "ptuning_v2"), "prefix")
        | dict.fromkeys(("adaption_prompt", "llama-adapter"), "llama_adapter")
    ),
    "method.non_linearity": non_linearity,
    "method.init": initialisation,
    "method.targets": choices({"all_linear": "all-linear"}),
    "training.num_train_epochs": as_whole,
    "training.optim": choices(
        dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw")
    ),
    "training.report_to": trackers,
    "training.lr_scheduler_type": choices({"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}),
}
"""Our key -> other tools' values in our terms."""

SPELT_OTHERWISE = {
    "qlora": "write lora, and set model.quantization: nf4",
    "dora": "write lora, and set method.dora: true",
    "rslora": "write lora, and set method.rank_stabilized: true",
    "pissa": "write lora, and set method.init: pissa",
    **dict.fromkeys(
        ("p_tuning", "p-tuning", "ptuning", "prompt_encoder"),
        "write soft_prompt for vectors before the text, or prefix for P-Tuning v2",
    ),
    "sft": "write lora, or full to train every weight",
}
"""Names of methods that are one of ours with another key, or under another name with a difference."""

_8BIT = "write adamw; its state takes 8 bytes a trained parameter"
LATER_VALUES: dict[str, dict[Any, str]] = {
    "method.type": {
        **dict.fromkeys(("ia3", "oft", "boft", "freeze", "adalora", "loha", "lokr", "vera", "bitfit"), "write lora"),
        **dict.fromkeys(("dpo", "orpo", "kto", "ppo", "grpo", "rm", "rlhf"), "write lora or full, to train on answers"),
    },
    "method.init": dict.fromkeys(("olora", "eva", "corda", "loftq", "orthogonal", "lora_ga"), "write kaiming or pissa"),
    "training.optim": dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit"), _8BIT),
    "training.lr_scheduler_type": {"cosine_with_min_lr": "write cosine, and set training.min_lr_ratio"},
    "training.report_to.*": {"all": "name the trackers, e.g. [tensorboard, wandb]"},
    "training.gradient_checkpointing": {int: "write true to recompute every block"},
}
"""Our key -> values (or a type of values) of later versions -> what to write instead."""
