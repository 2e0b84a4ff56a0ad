"""Which chat template a run gets: the recipe's, the tokenizer's own, or a plain one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data.chat import ChatTemplate
from ftkit.data.end_of_turn import QUESTION
from ftkit.data.template_texts import BUILT_IN, PLAIN
from ftkit.errors import UserError
from ftkit.recipe.schema import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What looks like a control token: <|im_end|>, <turn|>, <|turn>, <｜User｜>, <start_of_turn>.
_CONTROL_TOKEN = re.compile(r"<[|｜][^<>\s]{1,40}>|<[^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_\w+>")


def chat_template_for(
    tokenizer: "PreTrainedTokenizerBase", section: ModelSection, base: Path, kwargs: Mapping[str, Any]
) -> ChatTemplate:
    """The recipe's chat template, else the tokenizer's own, else a plain one that ends in the tokenizer's EOS.

    Args:
        tokenizer: of the base model.
        section: the recipe's model section.
        base: directory of the recipe, which a template file is relative to.
        kwargs: `data.chat_template_kwargs`.

    Raises:
        UserError: the file is missing; the template needs tokens that the tokenizer lacks; there is no EOS.
    """
    if section.chat_template is not None:
        template = ChatTemplate(tokenizer, _read(section.chat_template, base, tokenizer), kwargs)
        _check_tokens(template, tokenizer)
        return template
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer, tokenizer.chat_template, kwargs)
    return ChatTemplate(
        tokenizer,
        _plain(tokenizer),
        kwargs,
        warning=f"the base model has no chat template: it gets a plain one whose answers end in {tokenizer.eos_token}, "
        "saved with the tuned model (model.chat_template chooses another)",
    )


def _read(name: str, base: Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    path = base / Path(name).expanduser()
    key = ("model", "chat_template")
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}", how="give a readable UTF-8 file", key=key) from None
    if name not in BUILT_IN:
        how = f"give a Jinja file or one of {', '.join(BUILT_IN)}"
        raise UserError(f"no such file: {path.absolute()}, and no built-in template {name}", how=how, key=key)
    return _plain(tokenizer) if name == "plain" else BUILT_IN[name]


def _plain(tokenizer: "PreTrainedTokenizerBase") -> str:
    """`PLAIN`, with BOS where the tokenizer begins a text with it: a chat's text is encoded without adding any."""
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has neither a chat template nor an EOS token",
            how="give a template file whose answers end in a special token of the tokenizer",
            key=("model", "chat_template"),
        )
    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + PLAIN if begins_with_bos else PLAIN


def _check_tokens(template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a template whose control tokens the tokenizer would take apart into pieces of text."""
    probe = [QUESTION, {"role": "assistant", "content": "answer"}]
    rendered = template.render(probe) + template.render(probe[:1], generation_prompt=True)
    tokens = dict.fromkeys(_CONTROL_TOKEN.findall(rendered))
    if lacking := [token for token in tokens if len(tokenizer(token, add_special_tokens=False).input_ids) != 1]:
        raise UserError(
            f"the chat template needs tokens that the tokenizer lacks: {', '.join(lacking)}",
            how="leave the key out, or give a template made of the tokenizer's own special tokens, e.g. plain",
            key=("model", "chat_template"),
        )
