"""Everything about a run that needs no weights: base, tokenizer, template, plan. What `plan` and `train` share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_flash_attn_2_available

from ftkit.console import Console, human_count, make_table
from ftkit.data.chat import ChatTemplate
from ftkit.data.encode import make_encoder
from ftkit.data.plan import Plan, make_plan
from ftkit.data.problems import count_rows, list_rows
from ftkit.data.template_choice import chat_template_for
from ftkit.errors import UserError
from ftkit.methods.beside import DIRECTORY as PROMPT
from ftkit.methods.beside import insert_beside
from ftkit.methods.files import read_quantization
from ftkit.methods.soft_prompt import start_from_text
from ftkit.methods.start import KEY as INIT_FROM_KEY
from ftkit.methods.start import continue_from
from ftkit.methods.table import METHODS
from ftkit.models.files import ADAPTER_CONFIG_NAME
from ftkit.models.isolation import FLASH
from ftkit.models.load import BaseModel, find_base, load_config, stored_quantization
from ftkit.models.token_rows import train_rows
from ftkit.models.tokenizer import add_tokens, recipe_tokenizer
from ftkit.recipe.load import LoadedRecipe
from ftkit.recipe.schema import Recipe
from ftkit.runs import ADAPTER, MODEL


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model and what is to train in it, before any weight is loaded."""

    recipe: Recipe
    base: BaseModel
    config: PreTrainedConfig
    new_token_ids: tuple[int, ...] = ()
    """Of the tokens that the recipe added."""
    init_from: Path | None = None
    """Directory of the adapter that training begins with."""
    prompt_text_ids: tuple[int, ...] = ()
    """Tokens of the text that a soft prompt starts from."""

    @property
    def title(self) -> str:
        """Name, commit and architecture of the base."""
        commit = f" at {self.base.revision[:12]}" if self.base.revision else ""
        return f"{self.base.name}{commit} ({self.config.model_type})"


@dataclass(frozen=True, kw_only=True)
class Prepared(PreparedModel):
    """A run that is planned to the last step."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    plan: Plan
    unused_tokens: tuple[str, ...] = ()
    """New ones that no planned example has."""

    def print(self, console: Console) -> None:
        """What the run is made of: base, mixture, steps."""
        plan = self.plan
        console.line(f"base       {self.title}")
        console.table(mixture_table(plan))
        for counts in plan.counts:
            for why, rows in counts.dropped.items():
                console.line(f"dropped    {counts.name}: {count_rows(len(rows))}, {why} ({list_rows(rows)})")
        validation = ", ".join(f"{name} {len(examples)}" for name, examples in plan.validation.items()) or "none"
        console.line(f"validation {validation}")
        console.line(
            f"plan       {len(plan.steps)} steps of {self.recipe.training.global_batch_size} examples, "
            f"{human_count(plan.num_tokens)} tokens, {human_count(sum(plan.targets_per_step))} of them trained on"
        )
        for warning in self.warnings:
            console.warning(warning)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the run."""
        own = [self.template.warning] if self.template.warning else []
        if self.unused_tokens:
            tokens = ", ".join(self.unused_tokens[:4]) + (", ..." if len(self.unused_tokens) > 4 else "")
            own.append(f"of the new tokens {len(self.unused_tokens)} occur nowhere in what is trained on ({tokens})")
        return [*own, *self._quantization_warnings, *self.plan.warnings]

    @property
    def _quantization_warnings(self) -> list[str]:
        if self.init_from is None:
            return []
        trained_on, now = read_quantization(self.init_from), self.base.quantization or stored_quantization(self.config)
        if trained_on == now:
            return []
        forms = [form or "its own precision" for form in (trained_on, now)]
        return [f"{self.init_from} was trained on the base in {forms[0]}, and goes on with it in {forms[1]}"]


def mixture_table(plan: Plan) -> Table:
    """What became of every data set, over the whole run."""
    right = ("rows", "used", "examples", "tokens", "trained", "share", "epochs", "truncated", "dropped")
    table = make_table("mixture", [("data set", "left"), *((name, "right") for name in right)])
    for counts in plan.counts:
        dropped = sum(len(rows) for rows in counts.dropped.values())
        table.add_row(
            counts.name,
            *map(human_count, (counts.rows, counts.rows_used, counts.examples, counts.tokens, counts.target_tokens)),
            f"{100 * counts.share:.1f}%",
            f"{counts.epochs:.2f}",
            human_count(counts.truncated),
            human_count(dropped),
        )
    return table


def prepare(
    loaded: LoadedRecipe,
    console: Console,
    *,
    offline: bool,
    trust_remote_code: bool,
    begins: bool = True,
    first_rows: int | None = None,
) -> Prepared:
    """Find the base, then read, phrase, encode and deal the data.

    Args:
        begins: whether a run begins with it; one that has begun needs `method.init_from` no more.
        first_rows: read no more of each data set (`make_plan`).

    Raises:
        FtkitError: the base cannot be had (before any data is read), the data is bad or empty, the template is refused.
    """
    recipe = loaded.recipe
    base = _find_base(loaded, offline=offline, trust_remote_code=trust_remote_code)
    config, init_from = load_config(base), _initial_adapter(loaded, needed=begins)
    tokenizer = recipe_tokenizer(recipe.model, base, config, directory=loaded.directory(("model", "tokenizer")))
    new_token_ids = add_tokens(tokenizer, recipe.model)
    template_directory = loaded.directory(("model", "chat_template"))
    template = chat_template_for(tokenizer, recipe.model, template_directory, recipe.data.chat_template_kwargs)
    encoder = make_encoder(tokenizer, template, recipe.data)
    with console.progress("preparing data", total=1) as bar:
        plan = make_plan(recipe, encoder, directory=loaded.directory, progress=bar.show, first_rows=first_rows)
    _check_metric(recipe, plan)
    text = recipe.method.init_text if recipe.method.type == "soft_prompt" else None
    text_ids = () if text is None else tuple(tokenizer.encode(text, add_special_tokens=False))
    measured = [int(examples.num_tokens.max(initial=0)) for examples in plan.validation.values()]
    _check_positions(recipe, config, max(int(plan.examples.num_tokens.max()), *measured, 0))
    return Prepared(
        recipe=recipe,
        base=base,
        config=config,
        new_token_ids=new_token_ids,
        init_from=init_from,
        prompt_text_ids=text_ids,
        tokenizer=tokenizer,
        template=template,
        plan=plan,
        unused_tokens=tuple(tokenizer.convert_ids_to_tokens(_unused(new_token_ids, plan))),
    )


def prepare_model(loaded: LoadedRecipe, *, offline: bool, trust_remote_code: bool) -> PreparedModel:
    """What can be known of a run without its data and without the base's weights, which need not be there.

    Raises:
        FtkitError: the base's configuration cannot be had, or its tokenizer, where the recipe adds tokens.
    """
    recipe = loaded.recipe
    base = _find_base(loaded, offline=offline, trust_remote_code=trust_remote_code, weights=False)
    config, init_from = load_config(base), _initial_adapter(loaded, needed=True)
    added: tuple[int, ...] = ()
    if recipe.model.add_tokens or recipe.model.add_special_tokens:
        tokenizer = recipe_tokenizer(recipe.model, base, config, directory=loaded.directory(("model", "tokenizer")))
        added = add_tokens(tokenizer, recipe.model)
    _check_positions(recipe, config, longest=1)
    return PreparedModel(recipe=recipe, base=base, config=config, new_token_ids=added, init_from=init_from)


def apply_method(model: PreTrainedModel, prepared: PreparedModel) -> None:
    """Let train what the recipe says, from fresh weights or from those of `method.init_from`.

    Raises:
        UserError: the method finds no place in the model; what it is to begin with does not fit.
    """
    section = prepared.recipe.method
    method = METHODS[section.type]
    method.apply(model, section, seed=prepared.recipe.seed)
    if prepared.new_token_ids:
        train_rows(model, prepared.new_token_ids)
    if prepared.prompt_text_ids:
        start_from_text(model, prepared.prompt_text_ids)
    if section.type != "full" and section.init_from is not None:
        if prepared.init_from is None:
            raise _no_adapter(section.init_from, Path(section.init_from))
        continue_from(model, method, section, prepared.init_from)
    insert_beside(model, section, seed=prepared.recipe.seed, begin=prepared.init_from)


def _find_base(loaded: LoadedRecipe, *, offline: bool, trust_remote_code: bool, weights: bool = True) -> BaseModel:
    if loaded.recipe.model.attn_implementation == FLASH and not is_flash_attn_2_available():
        what = f"{FLASH} needs an NVIDIA GPU and the package flash-attn, which are not both here"
        how = "set it to auto: ftkit's attention keeps documents apart without it"
        raise UserError(what, how=how, key=("model", "attn_implementation"))
    return find_base(
        loaded.recipe.base_model,
        loaded.recipe.model,
        base=loaded.directory(("base_model",)),
        offline=offline,
        trust_remote_code=trust_remote_code,
        weights=weights,
    )


def _initial_adapter(loaded: LoadedRecipe, *, needed: bool) -> Path | None:
    name = loaded.recipe.method.init_from if loaded.recipe.method.type != "full" else None
    if name is None:
        return None
    path = loaded.directory(INIT_FROM_KEY) / Path(name).expanduser()
    first = path / PROMPT if loaded.recipe.method.type == "soft_prompt" else path / ADAPTER
    places = (first, path / ADAPTER, path)
    found = next((place for place in places if (place / ADAPTER_CONFIG_NAME).is_file()), None)
    if found is None and needed:
        raise _no_adapter(name, path)
    return found


def _no_adapter(name: str, path: Path) -> UserError:
    if (path / MODEL).is_dir():
        how = f"name it as base_model: {path / MODEL}"
        return UserError(f"{name} trained in full: there is no adapter to begin with", key=INIT_FROM_KEY, how=how)
    how = "name a directory with one of them"
    return UserError(f"{name} is neither a run nor an adapter", key=INIT_FROM_KEY, how=how)


def _unused(token_ids: tuple[int, ...], plan: Plan) -> list[int]:
    """Those that occur in no example of any step."""
    missing = set(token_ids)
    for index in (index for step in plan.steps for index in step):
        if not missing:
            break
        missing -= set(plan.examples[index].example.input_ids.tolist())
    return sorted(missing)


def _check_metric(recipe: Recipe, plan: Plan) -> None:
    """The metric for the best model is one that will be measured; default names are known only now."""
    metric, known = recipe.training.metric_for_best_model, ["eval_loss", *(f"eval_loss_{n}" for n in plan.validation)]
    if plan.validation and metric not in known:
        raise UserError(
            f"{metric} is not measured", key=("training", "metric_for_best_model"), how=f"choose {' or '.join(known)}"
        )


def _check_positions(recipe: Recipe, config: PreTrainedConfig, longest: int) -> None:
    """A model without rotary positions has so many and no more; a prompt's tokens take some of them."""
    text, method = config.get_text_config(decoder=True), recipe.method
    known = getattr(text, "max_position_embeddings", None)
    if known is None or getattr(text, "rope_parameters", None) is not None:
        return
    rows = {"soft_prompt": "num_virtual_tokens", "prefix": "num_virtual_tokens"}.get(method.type, "soft_prompt")
    before: int = getattr(method, rows, None) or 0
    if before + longest <= known:
        return
    what = f"examples of up to {longest} tokens do not fit into the model's {known} positions"
    if before:
        what = f"{before} virtual tokens and {what}"
    if before > known // 2:
        room = f"{known - longest}" if longest < known else f"{known // 8}, and data.max_length to {known - known // 8}"
        raise UserError(what, key=("method", rows), how=f"set it to {room}")
    raise UserError(what, key=("data", "max_length"), how=f"set it to {known - before}")


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill padded rows with; any will do, since padding is masked by length and never by id."""
    candidates: list[Any] = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return next(int(token) for token in candidates if token is not None)
