"""A soft prompt beside a LoRA or bottleneck adapters: trained together, saved in directories of their own.

RUN/adapter/   the LoRA or the bottleneck adapters
RUN/prompt/    the prompt, in the files of `type: soft_prompt`; each of the two can be loaded alone
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods import soft_prompt
from ftkit.methods.base import Gather
from ftkit.methods.files import CONFIG_NAME, BaseIdentity, read_adapter
from ftkit.methods.prompt_files import ROWS, SOFT_PROMPT
from ftkit.recipe.method_schema import AdapterMethod, LoraMethod
from ftkit.recipe.section import Section

DIRECTORY = "prompt"
KEY = ("method", "soft_prompt")


def prompt_length(section: Section) -> int | None:
    """How long a prompt the method is to have beside it; None: it has none."""
    return section.soft_prompt if isinstance(section, LoraMethod | AdapterMethod) else None


def insert_beside(model: PreTrainedModel, section: Section, *, seed: int, begin: Path | None) -> None:
    """Give a model, whose method is applied, the prompt that its section asks for.

    Args:
        begin: the adapter that training begins with, whose prompt lies beside it.

    Raises:
        UserError: one has a prompt and the other has none, or one of another length.
    """
    length = prompt_length(section)
    before = prompt_beside(begin) if begin is not None else None
    if length is None:
        if before is not None:
            raise UserError(f"{begin} was trained with the prompt {before}", how="set its length here", key=KEY)
        return
    soft_prompt.insert(model, length, seed=seed)
    if before is not None:
        _, state = read_adapter(before, peft_type=SOFT_PROMPT)
        if len(state[ROWS]) != length:
            raise UserError(f"{length}, and {before} has {len(state[ROWS])}", how="set that here too", key=KEY)
        soft_prompt.load_state(model, state)


def state_beside(model: PreTrainedModel, section: Section, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """What is saved of the prompt; nothing where there is none. Where `gather` is given, a collective."""
    return soft_prompt.trained_state(model, gather=gather) if prompt_length(section) is not None else {}


def notes_beside(section: Section) -> tuple[str, ...]:
    """What the user should know of the prompt."""
    if not isinstance(section, LoraMethod | AdapterMethod) or section.soft_prompt is None:
        return ()
    ratio = section.soft_prompt_learning_rate_ratio
    return (f"a soft prompt of {section.soft_prompt} vectors trains besides, at {ratio:g} times the learning rate",)


def save_beside(model: PreTrainedModel, parent: Path, identity: BaseIdentity, state: Mapping[str, Tensor]) -> Path:
    """Write `state_beside` to `parent/prompt`, which is returned."""
    directory = parent / DIRECTORY
    soft_prompt.save(model, None, directory, identity, state=state)
    return directory


def prompt_beside(adapter: Path) -> Path | None:
    """The prompt that lies beside an adapter, in a run or a checkpoint, or inside its directory, in an export."""
    sibling = adapter.with_name(DIRECTORY)
    return prompt_inside(adapter) or (sibling if sibling != adapter and (sibling / CONFIG_NAME).is_file() else None)


def prompt_inside(adapter: Path) -> Path | None:
    """The prompt in the directory of an adapter that was exported with it."""
    return adapter / DIRECTORY if (adapter / DIRECTORY / CONFIG_NAME).is_file() else None
