"""`prefix`: trained keys and values before those of every layer (P-Tuning v2, Liu et al. 2022,
https://arxiv.org/abs/2110.07602; prefix-tuning, Li and Liang 2021, https://arxiv.org/abs/2101.00190).

2 N K D parameters a layer, for N virtual tokens and K key and value heads of width D; `models/attention_prompts.py`
says how they get in. They train as they are, as in P-Tuning v2, not through a network that is thrown away afterwards.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods.base import Delta, Gather, check_fits, freeze, gathered, seeded_generator, switched_off
from ftkit.methods.files import CONFIG_NAME, BaseIdentity, read_adapter, write_adapter
from ftkit.methods.prompt_files import PREFIX, ROWS, prefix_config, prompt_section
from ftkit.models.architecture import block_parts, describe, key_value_shape
from ftkit.models.attention import attend_to_prompts
from ftkit.models.attention_prompts import PREFIX as CHILD
from ftkit.models.attention_prompts import Prefix, shift_positions
from ftkit.models.quantization import quantization_of
from ftkit.recipe.method_schema import PrefixMethod

ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
"""Values of a configuration's `layer_types` that have keys and values for each token."""

name = "prefix"
merge_refusal: str | None = (
    "a prefix cannot be merged: it changes no weight, every layer looks at it beside the tokens; serve it with peft "
    "and the base model, or give `ftkit export --format adapter` to whoever does"
)


def apply(model: PreTrainedModel, section: PrefixMethod, *, seed: int) -> None:
    """Freeze the model and give every attention layer its prefix."""
    rows, std = section.num_virtual_tokens, section.init_std
    _insert(model, rows, lambda path, shape: torch.randn(shape, generator=seeded_generator(seed, path)) * std)


def trained_state(model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """All keys and values, [N, layers * 2 * K * D], as peft keeps them."""
    parts = [part for prefix in _prefixes(model) for part in prefix.parts()]
    whole = gathered({str(index): part for index, part in enumerate(parts)}, gather)
    return {ROWS: torch.stack(list(whole.values()), dim=1).flatten(1)}


@torch.no_grad()
def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy keys and values back."""
    check_fits(trained_state(model), state)
    own = [part for prefix in _prefixes(model) for part in prefix.parts()]
    for part, saved in zip(own, state[ROWS].unflatten(1, (len(own), *own[0].shape[1:])).unbind(1), strict=True):
        part.copy_(saved)


def save(
    model: PreTrainedModel,
    section: PrefixMethod,
    directory: Path,
    identity: BaseIdentity,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what peft's `PeftModel.from_pretrained` reads."""
    state = trained_state(model) if state is None else state
    config, dtype = prefix_config(model, len(state[ROWS])), describe(model).embeddings.get_parameter("weight").dtype
    quantization = quantization_of(model)
    write_adapter(directory, config, state, identity, base_dtype=dtype, base_quantization=quantization)


def load(model: PreTrainedModel, directory: Path) -> PrefixMethod:
    """Load a prefix of ftkit or peft."""
    config, state = read_adapter(directory, peft_type=PREFIX)
    section = prompt_section(PrefixMethod, config, directory)
    heads, width = key_value_shape(model.config)
    theirs = (config.get("num_attention_heads"), config.get("token_dim"))
    if theirs not in ((heads, heads * width), (None, None)):
        raise UserError(
            f"has {theirs[0]} heads of keys and values, {theirs[1]} numbers in all, and this model {heads} with "
            f"{heads * width}",
            how="load it on the base model it was trained on",
            where=str(directory / CONFIG_NAME),
        )
    _insert(model, section.num_virtual_tokens, lambda path, shape: torch.zeros(shape))
    load_state(model, state)
    return section


def deltas(model: PreTrainedModel, state: Mapping[str, Tensor], section: PrefixMethod) -> Iterator[Delta]:
    """Refused: see `merge_refusal`."""
    raise AssertionError(merge_refusal)


def learning_rate_factor(name: str, section: PrefixMethod) -> float:
    """All learn at the recipe's rate."""
    return 1.0


def places(model: PreTrainedModel) -> tuple[str, ...]:
    """In every layer."""
    prefixes = list(_prefixes(model))
    rows, heads, width = prefixes[0].prefix_keys.shape
    return (f"{rows} keys and values ({heads} heads of {width}) in each of {len(prefixes)} layers",)


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """None."""
    return ()


def keeps_base(section: PrefixMethod) -> bool:
    """Yes."""
    return True


def disabled(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The base model, while inside."""
    return switched_off(_prefixes(model))


def _insert(model: PreTrainedModel, rows: int, initial: Callable[[str, tuple[int, int, int]], Tensor]) -> None:
    """Give every layer a prefix of so many keys and values, which start from `initial(path, shape)`.

    Raises:
        UserError: some layers have no keys and values of each token, or layers share theirs.
    """
    assert not any(True for _ in _prefixes(model)), "the model has prefixes already"
    _check(model)
    freeze(model)
    heads, width = key_value_shape(model.config)
    for part in (block.attention for block in block_parts(describe(model))):
        device = next(part.module.parameters()).device
        keys, values = (initial(f"{part.path}.{kind}", (rows, heads, width)).to(device) for kind in ("keys", "values"))
        part.module.add_module(CHILD, Prefix(keys, values))
    shift_positions(model, rows)
    attend_to_prompts(model)


def _check(model: PreTrainedModel) -> None:
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ()
    others = [index for index, kind in enumerate(kinds) if kind not in ATTENTION_LAYERS]
    why = None
    if others:
        why = f"its layer {others[0]} ({kinds[others[0]]}) keeps no keys and values of its tokens"
    elif getattr(text, "kv_lora_rank", None):
        why = "its layers compress keys and values"
    elif getattr(text, "num_kv_shared_layers", None) or getattr(text, "global_head_dim", None):
        why = "its layers have keys and values of several shapes, or share them"
    if why is not None:
        raise UserError(
            f"{type(model).__name__} takes no prefix: {why}", how="set method.type: soft_prompt", key=("method", "type")
        )


def _prefixes(model: PreTrainedModel) -> Iterator[Prefix]:
    return (module for module in model.modules() if isinstance(module, Prefix))
