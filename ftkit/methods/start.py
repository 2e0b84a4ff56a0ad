"""`method.init_from`: training that begins with trained weights in place of fresh ones."""

from pathlib import Path

from transformers import PreTrainedModel

from ftkit.errors import Problem, UserError
from ftkit.methods import adapter
from ftkit.methods.base import Method
from ftkit.methods.files import BOTTLENECK, LORA, bottleneck_section, lora_section, read_adapter, trained_as
from ftkit.methods.prompt_files import LLAMA_ADAPTER, PREFIX, SOFT_PROMPT
from ftkit.recipe.method_schema import AdapterMethod, LoraMethod
from ftkit.recipe.section import Section

KEY = ("method", "init_from")
PROMPTS = {"soft_prompt": SOFT_PROMPT, "prefix": PREFIX, "llama_adapter": LLAMA_ADAPTER}
"""Method -> its `peft_type`."""
_DECISIVE = {
    "lora": ("rank", "alpha", "rank_pattern", "alpha_pattern", "rank_stabilized", "dora", "init"),
    "adapter": ("bottleneck", "non_linearity", "placement", "insertion", "scale", "train_norms"),
}
"""Keys that say what saved weights compute. Which modules they belong to is told by their names."""


def continue_from(model: PreTrainedModel, method: Method, section: Section, directory: Path) -> None:
    """Copy the weights of the adapter in `directory` into a model that `method` was applied to as `section` says.

    Raises:
        UserError: it is of another method, shape or scale than `section`, or of other modules.
    """
    if isinstance(section, LoraMethod):
        config, state = read_adapter(directory, peft_type=LORA)
        _check_sections(section, trained_as(directory) or lora_section(config, directory), directory)
    elif isinstance(section, AdapterMethod):
        config, state = read_adapter(directory, peft_type=BOTTLENECK)
        trained = bottleneck_section(config, directory)
        _check_sections(adapter.sized(model, section), adapter.sized(model, trained), directory)
    else:
        # Names and shapes of a prompt's tensors say all of it.
        _, state = read_adapter(directory, peft_type=PROMPTS[method.name])
    ours = method.trained_state(model)
    for kind, names in (("lacks", ours.keys() - state.keys()), ("has besides", state.keys() - ours.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{directory} {kind} {min(names)}{more}", how="train the modules that it has", key=KEY)
    method.load_state(model, state)


def _check_sections(section: LoraMethod | AdapterMethod, trained: LoraMethod | AdapterMethod, directory: Path) -> None:
    ours, theirs = section.model_dump(), trained.model_dump()
    problems = [
        Problem(
            f"{ours[name]}, and {directory} was trained with {theirs[name]}",
            how="set that here too, or leave method.init_from out",
            key=("method", name),
        )
        for name in _DECISIVE[section.type]
        # Of what A and B started from only PiSSA's is kept: any other init goes on from any other.
        if ours[name] != theirs[name] and (name != "init" or "pissa" in (ours[name], theirs[name]))
    ]
    if problems:
        raise UserError.of(problems)
