"""`soft_prompt`: trained vectors before the first token (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

N x C parameters at width C, of a model that is frozen otherwise; `models/soft_prompt.py` says how they get in. It also
stands beside a LoRA or bottleneck adapters (`beside.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.methods.base import Delta, Gather, copy_strictly, freeze, gathered, seeded_generator, switched_off
from ftkit.methods.files import BaseIdentity, read_adapter, write_adapter
from ftkit.methods.prompt_files import ROWS, SOFT_PROMPT, prompt_section, soft_prompt_config
from ftkit.models.architecture import describe
from ftkit.models.quantization import quantization_of
from ftkit.models.soft_prompt import CHILD, SoftPrompt, insert_soft_prompt, looked_up
from ftkit.models.soft_prompt import soft_prompt as find_prompt
from ftkit.recipe.method_schema import SoftPromptMethod

COMMON_TOKENS = 5000
"""Tokenizers number tokens by how common they are, after special ones and bytes; as in the paper, section 3.2."""

name = "soft_prompt"
merge_refusal: str | None = (
    "a soft prompt cannot be merged: it changes no weight, it comes before the tokens; serve it with peft and the base "
    "model, or give `ftkit export --format adapter` to whoever does"
)


def apply(model: PreTrainedModel, section: SoftPromptMethod, *, seed: int) -> None:
    """Freeze the model and put a prompt before its tokens."""
    freeze(model)
    insert(model, section.num_virtual_tokens, seed=seed, init=section.init)


def insert(model: PreTrainedModel, rows: int, *, seed: int, init: str = "vocabulary") -> None:
    """Give the model a prompt of so many rows beside whatever else trains.

    Args:
        init: `vocabulary`, embeddings of common tokens, each another one; or `random`, uniform from -0.5 to 0.5.
    """
    generator, embeddings = seeded_generator(seed, CHILD), describe(model).embeddings
    weight = next(embeddings.parameters())
    if init == "vocabulary":
        known = min(COMMON_TOKENS, weight.shape[0])
        order = torch.randperm(known, generator=generator).repeat(-(-rows // known))
        insert_soft_prompt(model, looked_up(model, order[:rows]))
    else:
        drawn = torch.empty(rows, _width(model)).uniform_(-0.5, 0.5, generator=generator)
        insert_soft_prompt(model, drawn.to(weight.device))


def start_from_text(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Let the prompt begin as the embeddings of these tokens, of which there is one, repeated or cut to its length."""
    rows = _prompt(model).prompt_embeddings
    repeated = [ids[row % len(ids)] for row in range(len(rows))]
    rows.data = looked_up(model, torch.tensor(repeated))


def trained_state(model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """The prompt's rows, under peft's name."""
    return gathered({ROWS: _prompt(model).prompt_embeddings}, gather)


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy the rows back."""
    copy_strictly(trained_state(model), state)


def save(
    model: PreTrainedModel,
    section: object,
    directory: Path,
    identity: BaseIdentity,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what peft's `PeftModel.from_pretrained` reads."""
    state = trained_state(model) if state is None else state
    config, quantization = soft_prompt_config(model, *state[ROWS].shape), quantization_of(model)
    dtype = describe(model).embeddings.get_parameter("weight").dtype
    write_adapter(directory, config, state, identity, base_dtype=dtype, base_quantization=quantization)


def load(model: PreTrainedModel, directory: Path) -> SoftPromptMethod:
    """Load a prompt of ftkit or peft."""
    freeze(model)
    return load_beside(model, directory)


def load_beside(model: PreTrainedModel, directory: Path) -> SoftPromptMethod:
    """Load a prompt into a model in which other things train too.

    Raises:
        UserError: it is none, is damaged, or of a model of another width.
    """
    config, state = read_adapter(directory, peft_type=SOFT_PROMPT)
    section = prompt_section(SoftPromptMethod, config, directory)
    device = next(describe(model).embeddings.parameters()).device
    insert_soft_prompt(model, torch.zeros(section.num_virtual_tokens, _width(model), device=device))
    load_state(model, state)
    return section


def deltas(model: PreTrainedModel, state: Mapping[str, Tensor], section: SoftPromptMethod) -> Iterator[Delta]:
    """Refused: see `merge_refusal`."""
    raise AssertionError(merge_refusal)


def learning_rate_factor(name: str, section: SoftPromptMethod) -> float:
    """All rows learn at the recipe's rate."""
    return 1.0


def places(model: PreTrainedModel) -> tuple[str, ...]:
    """Before the tokens."""
    return (f"{len(_prompt(model).prompt_embeddings)} vectors before the first token of every document",)


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """None."""
    return ()


def keeps_base(section: SoftPromptMethod) -> bool:
    """Yes."""
    return True


def disabled(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The base model, while inside; its input then holds no ids of the prompt (`prompt_ids` says none)."""
    return switched_off([_prompt(model)])


def _prompt(model: PreTrainedModel) -> SoftPrompt:
    prompt = find_prompt(model)
    assert prompt is not None, "the method was applied"
    return prompt


def _width(model: PreTrainedModel) -> int:
    """Of what the first layer reads: OPT's embeddings may be narrower than its layers."""
    width: int = describe(model).embeddings.get_parameter("weight").shape[1]
    return width
