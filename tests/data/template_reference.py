"""What a trained turn must be, found by routes that share no code with ftkit.

Prompts come from `apply_chat_template`. Targets come from the {% generation %} marks of trl's `_training` variants
where these render the same text, and from the turn's form written down by hand below.
"""

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from ftkit.data.types import Conversation, Message
from tests.data.trl_templates import training_template

PINNED = datetime.date(2026, 1, 1)
"""The day that ftkit renders."""


def server_text(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, kwargs: dict[str, Any], *, prompt: bool
) -> str:
    """The rendering of a server, on the day that ftkit pins."""
    text = tokenizer.apply_chat_template(
        [message.to_template() for message in conversation.messages],
        tools=list(conversation.tools) or None,
        add_generation_prompt=prompt,
        tokenize=False,
        **kwargs,
    )
    assert isinstance(text, str)
    return _on_pinned_day(text)


def prints_thoughts(tokenizer: PreTrainedTokenizerFast, kwargs: dict[str, Any], message: Message) -> bool:
    """Whether the template has a place for thoughts of their own in such a turn."""
    content = "" if message.tool_calls else "answer"
    thinking = replace(message, content=content, reasoning_content="7b02d5")
    try:
        return "7b02d5" in server_text(tokenizer, Conversation((Message("user", "Hi"), thinking)), kwargs, prompt=False)
    except Exception:  # whatever a template raises
        return False


def marked_turn(
    name: str, tokenizer: PreTrainedTokenizerFast, conversation: Conversation, kwargs: dict[str, Any], prompt: str
) -> str | None:
    """What trl marks of the last message, after its prompt and up to its end of turn.

    None where there is no `_training` variant, where that renders another text, or does not mark the turn from its
    prompt on.
    """
    template = training_template(name)
    if "generation" not in template:
        return None
    try:
        (text,), (marks,) = render_jinja_template(
            [[message.to_template() for message in conversation.messages]],
            tools=list(conversation.tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
            **kwargs,
        )
    except Exception:  # jinja's, and whatever a template raises
        return None
    # The pinned day has as many characters as today: places are the same.
    text = _on_pinned_day(text)
    turn = [mark for mark in marks if mark[1] > len(prompt)]
    if text != server_text(tokenizer, conversation, kwargs, prompt=False) or not turn or turn[0][0] > len(prompt):
        return None
    # What follows the end of the turn is marked too: white space, and Phi 3's end of the conversation.
    return text[len(prompt) : turn[-1][1]].rstrip().removesuffix("\n<|endoftext|>")


def _on_pinned_day(text: str) -> str:
    today = datetime.date.today()
    for form in ("%Y-%m-%d", "%d %b %Y"):
        text = text.replace(today.strftime(form), PINNED.strftime(form))
    return text


# ------------------------------------------------------------------------------------------------- by hand


@dataclass(frozen=True)
class Form:
    """How a template writes the turns of an assistant, after the generation prompt."""

    end: str
    """The end of turn."""
    opening: str = ""
    """Before the text of a turn without thoughts."""
    trim: Callable[[str], str] = str
    """What becomes of the text's white space."""
    thoughts: Callable[[str], str] | None = None
    """Thoughts with their tags, after the generation prompt and before the text."""
    call: Callable[[str, dict[str, Any]], str] | None = None
    """A tool call of this name and these arguments, before any text."""

    call_end: str | None = None
    """The end of turn after a tool call, where it is another."""
    after_tool: str = ""
    """Before all else, where a tool result is what the turn follows."""

    def turn(self, conversation: Conversation) -> str | None:
        """The last turn; None where its form was not written down."""
        message = conversation.messages[-1]
        opening = self.after_tool if conversation.messages[-2].role == "tool" else ""
        if message.reasoning_content and self.thoughts is None:
            return None
        if message.reasoning_content and self.thoughts is not None:
            opening += self.thoughts(message.reasoning_content)
        else:
            opening += self.opening
        if not message.tool_calls:
            return opening + self.trim(message.content) + self.end
        if self.call is None:
            return None
        function = message.tool_calls[0]["function"]
        call = self.call(function["name"], function["arguments"])
        return opening + call + self.trim(message.content) + (self.call_end or self.end)


def _llama_call(name: str, arguments: dict[str, Any]) -> str:
    return f'{{"name": "{name}", "parameters": {json.dumps(arguments, ensure_ascii=False)}}}'


def _gemma_call(name: str, arguments: dict[str, Any]) -> str:
    values = [
        f'{key}:<|"|>{value}<|"|>' if isinstance(value, str) else f"{key}:{value}" for key, value in arguments.items()
    ]
    return f"<|tool_call>call:{name}{{{','.join(values)}}}<tool_call|>"


def _qwen_call(name: str, arguments: dict[str, Any]) -> str:
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _qwen_3_5_call(name: str, arguments: dict[str, Any]) -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def _lfm_call(name: str, arguments: dict[str, Any]) -> str:
    values = ", ".join(
        f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}" for key, value in arguments.items()
    )
    return f"<|tool_call_start|>[{name}({values})]<|tool_call_end|>"


def _lfm_vl_call(name: str, arguments: dict[str, Any]) -> str:
    escaped = {key: value.replace("'", "\\'") if isinstance(value, str) else value for key, value in arguments.items()}
    return _lfm_call(name, escaped)


def _gemma_thoughts(thoughts: str) -> str:
    return f"<|channel>thought\n{thoughts}\n<channel|>"


def _without_newlines(text: str) -> str:
    return text.lstrip("\n")


IM_END = "<|im_end|>"
_GEMMA_4 = Form("<turn|>", trim=str.strip, thoughts=_gemma_thoughts, call=_gemma_call, call_end="<|tool_response>")
_LFM_2_5 = Form(IM_END, thoughts=lambda text: f"<think>{text}</think>", call=_lfm_call)
_QWEN_3 = Form(
    IM_END,
    "<think>\n\n</think>\n\n",
    trim=_without_newlines,
    thoughts=lambda text: f"<think>\n{text}\n</think>\n\n",
    call=_qwen_call,
)
_QWEN_3_5 = Form(
    IM_END,
    "\n</think>\n\n",
    trim=str.strip,
    thoughts=lambda text: f"{text.strip()}\n</think>\n\n",
    call=_qwen_3_5_call,
)
FORMS: dict[str, Form] = {
    "cohere": Form("<|END_OF_TURN_TOKEN|>", trim=str.strip),
    "cohere2": Form("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma": Form("<end_of_turn>", trim=str.strip),
    "gemma4": _GEMMA_4,
    "gemma4_v2": replace(_GEMMA_4, call_end=None),
    # Its generation prompt leaves the header out after a tool result, where its turn has one.
    "diffusion_gemma": replace(_GEMMA_4, after_tool="<|turn>model\n"),
    "gptoss": Form("<|return|>", "<|channel|>final<|message|>"),
    "lfm2": Form(IM_END),
    "lfm2_2_5": _LFM_2_5,
    "lfm2_2_5_vl": replace(_LFM_2_5, call=_lfm_vl_call),
    "llama3": Form("<|eot_id|>", trim=str.strip, call=_llama_call),
    "muse_glimmer": Form("<|eot|>", " to=user<|message|>"),
    "nemotron": Form(IM_END, trim=str.rstrip),
    "phi3": Form("<|end|>"),
    "qwen2_5": Form(IM_END),
    "qwen3": _QWEN_3,
    "qwen3_5": _QWEN_3_5,
    "qwen3_6": _QWEN_3_5,
    "qwen3_8": _QWEN_3_5,
    "qwen3_instruct_2507": Form(IM_END),
    "qwen3_vl": Form(IM_END),
}
"""The longest name that a template's name begins with -> its form."""


def form_of(name: str, kwargs: dict[str, Any]) -> Form:
    """The form of a template's turns under these keywords."""
    form = FORMS[max((prefix for prefix in FORMS if name.startswith(prefix)), key=len)]
    # Without thinking the prompt itself closes the thoughts.
    prompted = name == "qwen3_5_nothink" or kwargs.get("enable_thinking") is False
    return replace(form, opening="") if prompted and "</think>" in form.opening else form
