"""The tokenizer of a recipe: the base model's own, or the one that `model.tokenizer` names."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AddedToken, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftkit.errors import FtkitError, KeyPath, UserError
from ftkit.models.hub import fetch_tokenizer
from ftkit.models.load import HUB_PREFIX, BaseModel, load_tokenizer, looks_like_path
from ftkit.models.token_rows import owners
from ftkit.recipe.schema import ModelSection

TOKENIZER_KEY: KeyPath = ("model", "tokenizer")


def add_tokens(tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> tuple[int, ...]:
    """Give the tokenizer the tokens that the recipe names, in place; returns their ids, ascending.

    Raises:
        UserError: it has one of them already.
    """
    before = tokenizer.get_vocab()
    names = (("add_tokens", section.add_tokens, False), ("add_special_tokens", section.add_special_tokens, True))
    for key, tokens, special in names:
        if known := [token for token in tokens if token in before]:
            what = f"{known[0]} is a token of the base already (id {before[known[0]]})"
            raise UserError(what, how="leave it out; its rows train with modules_to_save", key=("model", key))
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])
    after = tokenizer.get_vocab()
    return tuple(sorted(after[token] for _, tokens, _ in names for token in tokens))


def recipe_tokenizer(
    section: ModelSection, base: BaseModel, config: PreTrainedConfig, *, directory: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer that template, encoding and result have.

    Args:
        section: the recipe's model section.
        base: the base model.
        config: its configuration.
        directory: what a relative path is relative to.

    Raises:
        UserError: there is no such tokenizer, or it has tokens that the base model has no embeddings for.
        NetworkError: the hub cannot be reached.
    """
    if section.tokenizer is None:
        return load_tokenizer(base)
    try:
        tokenizer = load_tokenizer(_find(section.tokenizer, base, directory))
    except FtkitError as error:
        raise type(error).of(replace(problem, key=TOKENIZER_KEY) for problem in error.problems) from None
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    num_embeddings = config.get_text_config().vocab_size
    if num_tokens > num_embeddings:
        raise UserError(
            f"{section.tokenizer} has {num_tokens} tokens, {base.name} has embeddings for {num_embeddings}",
            how="choose a tokenizer of the base model's family, or leave the key out",
            key=TOKENIZER_KEY,
        )
    return tokenizer


@torch.no_grad()
def untrained_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]
) -> tuple[str, ...]:
    """What to say of tokens whose embedding is another token's too: reserved rows that no training has touched yet.

    A frozen one stays so: a model cannot tell it from the others, and learns to end its turns in any of them.

    Args:
        token_ids: those that the run depends on, such as the ends of turns.
    """
    weight_VD = model.get_input_embeddings().weight
    assert isinstance(weight_VD, torch.Tensor)
    notes = []
    # Those of new tokens train, and may lie beyond the table.
    new = {int(token_id) for _, owner in owners(model) for token_id in owner.token_ids}
    for token_id in token_ids:
        if token_id in new:
            continue
        same = int(torch.eq(weight_VD, weight_VD[token_id]).all(dim=1).sum())
        if same > 1:
            token = tokenizer.convert_ids_to_tokens(token_id)
            notes.append(
                f"the embedding of {token} is that of {same - 1} other tokens too: the base was never trained on it. "
                "Choose a chat template of tokens that it knows (model.chat_template: plain), or train every weight"
            )
    return tuple(notes)


def _find(name: str, base: BaseModel, directory: Path) -> BaseModel:
    """Where the tokenizer's files are; a path that exists wins over a hub id."""
    path = (directory / Path(name).expanduser()).absolute()
    on_hub = name.startswith(HUB_PREFIX)
    if path.is_dir() and not on_hub:
        return BaseModel(name, path=path, trust_remote_code=base.trust_remote_code)
    if path.exists() and not on_hub:
        raise UserError(f"{path} is a file", how="name the directory that it is in")
    if looks_like_path(name) and not on_hub:
        raise UserError(f"no such directory: {path}", how="name a directory with a tokenizer, or a hub id")
    path = fetch_tokenizer(name.removeprefix(HUB_PREFIX), code=base.trust_remote_code, offline=base.offline)
    return BaseModel(name, path=path, trust_remote_code=base.trust_remote_code)
