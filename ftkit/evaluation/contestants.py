"""From targets to models that can be asked: a base and its adapter share one loaded model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftkit.data.chat import chat_template_for
from ftkit.data.encode import Encoder, make_encoder
from ftkit.errors import UserError
from ftkit.evaluation.compare import Contestant
from ftkit.evaluation.prompts import ChatPrompts, Prompts, RawPrompts, choose_mode
from ftkit.evaluation.schema import PromptMode
from ftkit.methods.files import check_base, identify, read_identity
from ftkit.methods.table import method_of
from ftkit.models.load import BaseModel, load_tokenizer, load_weights
from ftkit.models.precision import compute_in
from ftkit.recipe.schema import DataSection, ModelSection, Recipe
from ftkit.runs import Target


def load_contestants(
    targets: Sequence[Target], *, mode: PromptMode, dtype: torch.dtype, device: torch.device
) -> list[Contestant]:
    """Load what is compared, the tuned one first.

    The base of an adapter is loaded once: its own contestant is the same model with the adapter switched off.

    Raises:
        UserError: a model or adapter cannot be loaded, or its base has changed; two targets would have one label.
    """
    tokenizers = [_tokenizer(target) for target in targets]
    lead = leading_target(targets)
    in_order = [tokenizers[targets.index(lead)], *tokenizers]
    template = next((t.chat_template for t in in_order if t.chat_template), None)
    chat = choose_mode(mode, has_template=template is not None) == "chat"
    recipe = lead.recipe
    shared: dict[BaseModel, tuple[PreTrainedModel, Callable[[], AbstractContextManager[None]]]] = {}
    contestants = []
    # Adapters first: a base without one is then found loaded.
    for index in sorted(range(len(targets)), key=lambda i: targets[i].adapter is None):
        target = targets[index]
        key = replace(target.model, name="")
        if target.adapter is None and key in shared:
            model, active = shared[key]
        else:
            model, disabled = _load(target, dtype, device)
            active = nullcontext
            if disabled is not None:
                shared[key] = (model, disabled)
        prompts: Prompts = RawPrompts(tokenizers[index])
        if chat:
            prompts = _chat_prompts(tokenizers[index], template, recipe)
        contestants.append((index, Contestant(target.label, model, prompts, active)))
    return [contestant for _, contestant in sorted(contestants, key=lambda pair: pair[0])]


def leading_target(targets: Sequence[Target]) -> Target:
    """Whose template and settings all are asked with: the first target that is a run's, else that was tuned at all."""
    return min(targets, key=lambda target: (target.run is None, target.base is None))


def _load(
    target: Target, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Callable[[], AbstractContextManager[None]] | None]:
    """The model in eval mode, and what switches its adapter off, where that gives the base."""
    if target.adapter is not None and (trained_on := read_identity(target.adapter)).fingerprint is not None:
        check_base(target.adapter, trained_on, identify(target.model, remembered=True))
    model = load_weights(target.model, dtype=dtype)
    disabled = None
    if target.adapter is not None:
        method = method_of(target.adapter)
        section: Any = method.load(model, target.adapter)
        # The adapter is float32, and computes as it did in training.
        compute_in(model, dtype)
        if method.keeps_base(section):
            disabled = lambda: method.disabled(model)  # noqa: E731
    # transformers types its own `to` for quantized models only.
    nn.Module.to(model, device)
    return model.eval(), disabled


def _tokenizer(target: Target) -> PreTrainedTokenizerBase:
    if target.tokenizer is not None and (target.tokenizer / "tokenizer_config.json").is_file():
        return load_tokenizer(BaseModel(str(target.tokenizer), path=target.tokenizer))
    return load_tokenizer(target.model)


def _chat_prompts(tokenizer: PreTrainedTokenizerBase, template: str | None, recipe: Recipe | None) -> ChatPrompts:
    """Every model is asked through the tuned run's template, each with its own tokenizer."""
    tokenizer.chat_template = template
    if recipe is not None:
        chat = chat_template_for(tokenizer, ModelSection(), Path.cwd(), recipe.data.chat_template_kwargs)
        return ChatPrompts(tokenizer, make_encoder(tokenizer, chat, recipe.data))
    chat = chat_template_for(tokenizer, ModelSection(), Path.cwd(), {})
    max_length = DataSection.model_fields["max_length"].default
    return ChatPrompts(tokenizer, Encoder(tokenizer, chat, max_length=max_length))


def check_labels(targets: Sequence[Target]) -> None:
    """Raise a UserError where two targets have one label: results could not be told apart."""
    labels = [target.label for target in targets]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label} is compared with itself", how="name each target once")
