"""`method.init_from`: training that begins with trained weights in place of fresh ones."""

from pathlib import Path

from transformers import PreTrainedModel

from ftkit.errors import Problem, UserError
from ftkit.methods import adapter
from ftkit.methods.base import Method
from ftkit.methods.files import BOTTLENECK, LORA, bottleneck_section, lora_section, read_adapter, trained_as
from ftkit.methods.prompt_files import LLAMA_ADAPTER, PREFIX, SOFT_PROMPT
from ftkit.methods.table import method_of, section_of
from ftkit.recipe.method_schema import AdapterMethod, LlamaAdapterMethod, LoraMethod
from ftkit.recipe.section import Section

KEY = ("method", "init_from")
PROMPTS = {"soft_prompt": SOFT_PROMPT, "prefix": PREFIX, "llama_adapter": LLAMA_ADAPTER}
"""Method -> its `peft_type`."""
_DECISIVE = {
    "lora": ("rank", "alpha", "rank_pattern", "alpha_pattern", "rank_stabilized", "dora", "init"),
    "adapter": ("bottleneck", "non_linearity", "placement", "insertion", "scale", "train_norms"),
    "soft_prompt": ("num_virtual_tokens",),
    "prefix": ("num_virtual_tokens",),
    "llama_adapter": ("num_virtual_tokens", "num_layers"),
}
"""Keys that say what saved weights compute. Which modules they belong to is told by their names."""


def continue_from(model: PreTrainedModel, method: Method, section: Section, directory: Path) -> None:
    """Copy the weights of the adapter in `directory` into a model that `method` was applied to as `section` says.

    Raises:
        UserError: it is of another method, shape or scale than `section`, or of other modules.
    """
    if (theirs := method_of(directory).name) != method.name:
        how = f"set method.type: {theirs}, or name another adapter"
        raise UserError(f"{directory} was trained as {theirs}, and this is {method.name}", how=how, key=KEY)
    if isinstance(section, LoraMethod):
        config, state = read_adapter(directory, peft_type=LORA)
        _check_sections(section, trained_as(directory) or lora_section(config, directory), directory)
    elif isinstance(section, AdapterMethod):
        config, state = read_adapter(directory, peft_type=BOTTLENECK)
        trained = bottleneck_section(config, directory)
        _check_sections(adapter.sized(model, section), adapter.sized(model, trained), directory)
    else:
        _, state = read_adapter(directory, peft_type=PROMPTS[method.name])
        _check_sections(_with_layers(section, model, method), section_of(directory), directory)
    ours = method.trained_state(model)
    for kind, names in (("lacks", ours.keys() - state.keys()), ("has besides", state.keys() - ours.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{directory} {kind} {min(names)}{more}", how="train the modules that it has", key=KEY)
    method.load_state(model, state)


def _with_layers(section: Section, model: PreTrainedModel, method: Method) -> Section:
    """With the number of layers that a model's gated prompts are in, where the section leaves it out."""
    if not isinstance(section, LlamaAdapterMethod):
        return section
    gates = [name for name in method.trained_state(model) if name.endswith("gate")]
    return section.model_copy(update={"num_layers": len(gates)})


def _check_sections(section: Section, trained: Section, directory: Path) -> None:
    ours, theirs = section.model_dump(), trained.model_dump()
    problems = [
        Problem(
            f"{ours[name]}, and {directory} was trained with {theirs[name]}",
            how="set that here too, or leave method.init_from out",
            key=("method", name),
        )
        for name in _DECISIVE[ours["type"]]
        # Of what A and B started from only PiSSA's is kept: any other init goes on from any other.
        if ours[name] != theirs[name] and (name != "init" or "pissa" in (ours[name], theirs[name]))
    ]
    if problems:
        raise UserError.of(problems)
