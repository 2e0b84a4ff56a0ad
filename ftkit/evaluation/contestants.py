"""From targets to models that can be asked: a base and all adapters of it share one loaded model's weights."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftkit.data.encode import Encoder, make_encoder
from ftkit.data.template_choice import chat_template_for
from ftkit.errors import UserError
from ftkit.evaluation.compare import Contestant
from ftkit.evaluation.prompts import ChatPrompts, Prompts, RawPrompts, choose_mode
from ftkit.evaluation.schema import PromptMode
from ftkit.methods.files import check_base, identify, read_identity
from ftkit.methods.soft_prompt import load_beside
from ftkit.methods.table import method_of, section_of
from ftkit.models.load import BaseModel, load_tokenizer, load_weights
from ftkit.models.precision import compute_in
from ftkit.recipe.schema import DataSection, ModelSection, Recipe
from ftkit.runs import Target


def load_contestants(
    targets: Sequence[Target], *, mode: PromptMode, dtype: torch.dtype, device: torch.device
) -> list[Contestant]:
    """Load what is compared, the tuned one first.

    A base is loaded once, and switching between it and its adapters moves nothing: each is a model of its own whose
    modules hold the same weights, besides those of the adapter. An adapter that changed the base's own weights (norms,
    `modules_to_save`) gets a base to itself.

    Raises:
        UserError: a model or adapter cannot be loaded, or its base has changed; two targets would have one label.
    """
    tokenizers = [tokenizer_of(target) for target in targets]
    lead = leading_target(targets)
    in_order = [tokenizers[targets.index(lead)], *tokenizers]
    template = next((t.chat_template for t in in_order if t.chat_template), None)
    chat = choose_mode(mode, has_template=template is not None) == "chat"
    recipe = lead.recipe
    shared: dict[BaseModel, PreTrainedModel] = {}
    contestants = []
    for target, tokenizer in zip(targets, tokenizers, strict=True):
        model = _load(target, shared, dtype, device)
        prompts: Prompts = _chat_prompts(tokenizer, template, recipe) if chat else RawPrompts(tokenizer)
        contestants.append(Contestant(target.label, model, prompts))
    return contestants


def leading_target(targets: Sequence[Target]) -> Target:
    """Whose template and settings all are asked with: the first target that is a run's, else that was tuned at all."""
    return min(targets, key=lambda target: (target.run is None, target.base is None))


def _load(
    target: Target, shared: dict[BaseModel, PreTrainedModel], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model in eval mode; bases that others may use too are found in `shared`, or put there."""
    if target.adapter is None:
        return _load_base(target.model, shared, dtype, device)
    if (trained_on := read_identity(target.adapter)).fingerprint is not None:
        check_base(target.adapter, trained_on, identify(target.model, remembered=True))
    method = method_of(target.adapter)
    keeps_base = method.keeps_base(section_of(target.adapter))
    model = _load_base(target.model, shared if keeps_base else {}, dtype, device)
    if keeps_base:
        model = share_weights(model)
    method.load(model, target.adapter)
    if target.prompt is not None:
        load_beside(model, target.prompt)
    # The adapter is float32, and computes as it did in training.
    compute_in(model, dtype)
    nn.Module.to(model, device)
    return model.eval()


def _load_base(
    base: BaseModel, shared: dict[BaseModel, PreTrainedModel], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    key = replace(base, name="")
    if key not in shared:
        # transformers types its own `to` for quantized models only.
        shared[key] = load_weights(base, dtype=dtype)
        nn.Module.to(shared[key], device)
    return shared[key].eval()


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same weights: modules of its own, which hold the parameters and buffers of `model`."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # What `deepcopy` finds in its memo it takes for copied.
    return deepcopy(model, kept)


def load_target(target: Target, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """One model by itself, in eval mode, with its adapter and soft prompt.

    Raises:
        UserError: a model or adapter cannot be loaded, or its base has changed.
    """
    return _load(target, {}, dtype, device)


def tokenizer_of(target: Target) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with the weights: what training left beside them, else the model's own."""
    if target.tokenizer is not None and (target.tokenizer / "tokenizer_config.json").is_file():
        return load_tokenizer(BaseModel(str(target.tokenizer), path=target.tokenizer))
    return load_tokenizer(target.model)


def _chat_prompts(tokenizer: PreTrainedTokenizerBase, template: str | None, recipe: Recipe | None) -> ChatPrompts:
    """Every model is asked through the tuned run's template, each with its own tokenizer."""
    tokenizer.chat_template = template
    return ChatPrompts(tokenizer, chat_encoder(tokenizer, recipe))


def chat_encoder(tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None, *, of_today: bool = False) -> Encoder:
    """The encoder of training: the tokenizer's template, with the keywords and options of the run's recipe.

    Args:
        of_today: print today's date, as a server does, where training pins it.
    """
    kwargs = recipe.data.chat_template_kwargs if recipe is not None else {}
    chat = chat_template_for(tokenizer, ModelSection(), Path.cwd(), kwargs)
    chat = chat.of_today() if of_today else chat
    if recipe is not None:
        return make_encoder(tokenizer, chat, recipe.data)
    return Encoder(tokenizer, chat, max_length=DataSection.model_fields["max_length"].default)


def check_labels(targets: Sequence[Target]) -> None:
    """Raise a UserError where two targets have one label: results could not be told apart."""
    labels = [target.label for target in targets]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label} is compared with itself", how="name each target once")
