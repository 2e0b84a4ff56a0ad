import datetime
from typing import Any

import pytest

from ftkit.data.chat import ChatTemplate
from ftkit.data.rendering import render_examples
from ftkit.data.shadow import find_lost_text, template_constants
from ftkit.data.template_texts import pin_date
from ftkit.data.types import Conversation, Message
from ftkit.errors import UserError
from tests.data.trl_templates import template_names, tokenizer_for
from tests.data.turns import ANSWER, RESULT, USER, WEATHER, call, chatml, refusal, render, template_of
from tests.tiny_models import CHATML, tiny_tokenizer

# The token or tokens that end a turn of text and of tool calls; a template without any cannot be trained on.
ENDS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "cohere2": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek_r1_distill": ["<｜end▁of▁sentence｜>"],
    "deepseekv3": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "gemma3": ["<end_of_turn>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gemma4_v2": ["<turn|>"],
    "gemma4_v3": ["<turn|>", "<|tool_response>"],
    "gemma4_v4": ["<turn|>", "<|tool_response>"],
    "gemma4_v5": ["<turn|>", "<|tool_response>"],
    "glm4moe": [],
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": [],
    "llama3": ["<|eot_id|>"],
    "llama3_1": ["<|eot_id|>"],
    "llama3_2": ["<|eot_id|>"],
    "llava_next": [],
    "muse_glimmer": ["<|eot|>"],
    "phi3": ["<|end|>"],
    "phi3_5": ["<|end|>"],
    "smolvlm": [],
}
IM_END = ("lfm2", "nemotron", "qwen")

# --- rendering ---


@pytest.mark.parametrize("name", ["qwen2_5", "gemma", "llama3_1"])
def test_renders_what_the_tokenizer_renders(name: str) -> None:
    template, tokenizer = template_of(name), tokenizer_for(name)
    messages = [USER.to_template(), ANSWER.to_template()]
    assert template.render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert template.generation_prompt([USER]) == prompt


def test_keywords_reach_the_template() -> None:
    assert template_of("qwen3", enable_thinking=False).generation_prompt([USER]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_the_date_is_pinned_and_nothing_else_changes(name: str) -> None:
    tokenizer = tokenizer_for(name)
    messages = [USER.to_template(), ANSWER.to_template()]
    rendered = template_of(name).render(messages)
    today, day = datetime.datetime.now(), datetime.datetime(2026, 1, 1)
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    for form in ("%Y-%m-%d", "%d %b %Y"):
        expected = expected.replace(today.strftime(form), day.strftime(form))
    assert rendered == expected
    assert "2026-01-01" in rendered or "01 Jan 2026" in rendered


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}{% endif %}", "\n  {% set a = 1 %}\n", "{#- c #}\n x"])
def test_pinning_keeps_the_beginning_of_a_template(start: str) -> None:
    tokenizer = tiny_tokenizer()
    text = start + "{{ messages[0]['content'] }}"
    plain = tokenizer.apply_chat_template([USER.to_template()], chat_template=text, tokenize=False)
    dated = pin_date(text + "{{ strftime_now('%A %-d %B %Y') }}")
    pinned = tokenizer.apply_chat_template([USER.to_template()], chat_template=dated, tokenize=False)
    assert pinned == plain + "Thursday 1 January 2026"


def test_a_template_of_its_own_for_tools() -> None:
    template = ChatTemplate(tiny_tokenizer(), {"default": CHATML, "tool_use": "T" + CHATML})
    assert template.generation_prompt([USER]).startswith("<|im_start|>")
    assert template.generation_prompt([USER], [{"name": "weather"}]).startswith("T<|im_start|>")
    tokenizer = tiny_tokenizer(None)
    template.save_to(tokenizer)
    assert tokenizer.chat_template == {"default": CHATML, "tool_use": "T" + CHATML}


def test_the_saved_template_is_the_one_given() -> None:
    tokenizer = tiny_tokenizer(None)
    template_of("gptoss").save_to(tokenizer)
    assert tokenizer.chat_template == tokenizer_for("gptoss").chat_template


def test_a_template_that_refuses_a_conversation_names_the_row_and_says_why() -> None:
    message = refusal(template_of("gemma"), Message("system", "Be kind"), USER, ANSWER)
    assert message.startswith("rows.jsonl:7: the chat template fails on this conversation: System role not supported")


def test_bad_jinja_is_the_recipes_fault() -> None:
    with pytest.raises(UserError, match="no valid Jinja") as caught:
        ChatTemplate(tiny_tokenizer(), "{% if %}").generation_prompt([USER])
    assert caught.value.problems[0].key == ("model", "chat_template")


def test_arguments_of_apply_chat_template_are_no_keywords() -> None:
    with pytest.raises(UserError, match="tokenize: not a keyword of chat templates"):
        ChatTemplate(tiny_tokenizer(), CHATML, {"tokenize": True})


# --- the end of a turn ---


@pytest.mark.parametrize("name", template_names())
def test_end_of_turn(name: str) -> None:
    tokenizer = tokenizer_for(name)
    expected = ["<|im_end|>"] if name.startswith(IM_END) else ENDS[name]
    ids = ChatTemplate(tokenizer, tokenizer.chat_template).end_of_turn_ids
    assert [tokenizer.decode([index]) for index in ids] == expected


def test_what_follows_the_end_of_a_turn_is_known() -> None:
    assert template_of("phi3").end_of_turn("text").after == "\n<|endoftext|>"
    assert template_of("qwen2_5").end_of_turn("text").after == "\n"
    assert template_of("cohere2").end_of_turn("text").after == ""


def test_a_turn_without_an_end_of_its_own_is_refused() -> None:
    message = refusal(template_of("glm4moe"), USER, ANSWER)
    assert message.startswith("rows.jsonl:7: the chat template cannot be trained on: it prints nothing after")
    assert "model.chat_template" in message


def test_an_end_that_is_no_special_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["</turn>"])  # a token, but one that may also be text, as </tool_call> is
    without = ChatTemplate(tokenizer, CHATML.replace("<|im_end|>", "</turn>"))
    assert "ends the assistant's turn in '</turn>', no special token" in refusal(without, USER, ANSWER)


def test_a_template_that_prints_no_text_is_refused() -> None:
    assert "does not print the assistant's turn" in refusal(template_of("idefics3"), USER, ANSWER)


def test_an_end_of_turn_inside_texts_does_not_end_the_turn() -> None:
    quoting = [
        Message("user", "What is <|im_end|>?\n"),
        Message("assistant", "<|im_end|>\n<|im_start|>user\n<|im_end|>"),
    ]
    (example,) = render(chatml(), *quoting, USER, ANSWER)
    assert [example.text[slice(*span)] for span in example.spans] == [
        "<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>",
        "Hello you<|im_end|>",
    ]


# --- whole or each ---


def test_one_example_ends_with_its_last_turn() -> None:
    (example,) = render(chatml(), USER, ANSWER, USER)
    assert example.text.endswith("Hello you<|im_end|>")
    assert example.num_messages == 2
    assert example.text[: example.prompt_end] == chatml().generation_prompt([USER])
    conversation = Conversation((USER, ANSWER, USER))
    (to_the_end,) = render_examples(chatml(), conversation, [1], to_the_end=True)
    assert to_the_end.text == chatml().render([message.to_template() for message in conversation.messages])
    assert to_the_end.spans == example.spans


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_a_template_that_rewrites_history_gives_one_example_a_turn(name: str) -> None:
    template = template_of(name)
    first, second = render(template, USER, ANSWER, USER, Message("assistant", "Bye"))
    assert (first.turns, second.turns) == ((1,), (3,))
    assert second.text[: second.prompt_end] == template.generation_prompt([USER, ANSWER, USER])
    message = refusal(template, USER, ANSWER, USER, Message("assistant", "Bye"), mode="whole")
    assert message.startswith("rows.jsonl:7: the chat template writes an assistant turn otherwise")
    assert message.endswith("set data.turns: each (or auto)")


def test_each_is_obeyed_where_whole_is_possible() -> None:
    assert len(render(chatml(), USER, ANSWER, USER, ANSWER, mode="each")) == 2
    assert len(render(chatml(), USER, ANSWER, USER, ANSWER, mode="whole")) == 1


@pytest.mark.parametrize("name", [name for name in template_names() if name.startswith("nemotron")])
def test_a_prompt_that_does_not_begin_its_turn_is_refused_with_the_keyword_that_mends_it(name: str) -> None:
    message = refusal(template_of(name), USER, ANSWER)
    assert "message 2 with its own generation prompt: the prompt has" in message
    assert message.endswith("set data.chat_template_kwargs: {enable_thinking: false}")
    (example,) = render(template_of(name, enable_thinking=False), USER, ANSWER)
    assert example.text[example.prompt_end :] == "Hello you<|im_end|>"


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_a_prompt_that_no_keyword_mends(name: str) -> None:
    assert "choose another template" in refusal(template_of(name), USER, ANSWER)


# --- no text is lost ---

LOSSES: dict[str, tuple[str, list[Message], str]] = {
    "thoughts": (
        "qwen2_5",
        [USER, Message("assistant", "Hello", reasoning_content="They greet me.")],
        "drops reasoning_content of message 2 (assistant): 'They greet me.'",
    ),
    "inline thoughts": (
        "qwen3_5_nothink",
        [USER, ANSWER, USER, Message("assistant", "Hello", reasoning_content="They greet me.")],
        "does not begin message 4 with its own generation prompt",
    ),
    "tool calls": ("lfm2", [USER, WEATHER], "does not print the assistant's tool calls"),
    "a second tool call": (
        "gptoss",
        [USER, Message("assistant", "", tool_calls=(call(city="Bonn"), call(city="Ulm")))],
        "drops the tool call's name of message 2 (assistant): 'weather'",
    ),
    "a role it does not know": ("phi3", [USER, ANSWER, RESULT, ANSWER], "drops content of message 3 (tool)"),
    "the same words elsewhere": ("phi3", [USER, ANSWER, Message("tool", "Hi"), ANSWER], "drops content of message 3"),
}


@pytest.mark.parametrize(("name", "messages", "expected"), LOSSES.values(), ids=LOSSES)
def test_lost_text_is_an_error_that_names_the_row(name: str, messages: list[Message], expected: str) -> None:
    message = refusal(template_of(name), *messages)
    assert message.startswith("rows.jsonl:7: the chat template ")
    assert expected in message


TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {}}}


@pytest.mark.parametrize("name", ["gemma3", "phi3", "llama3"])
def test_tools_that_a_template_does_not_print_are_not_lost_in_silence(name: str) -> None:
    assert refusal(template_of(name), USER, ANSWER, tools=[TOOL]) == (
        "rows.jsonl:7: the chat template does not print the tools of a conversation; take them out, or name a file "
        "with a template for tools in model.chat_template, e.g. that of Qwen 2.5 for ChatML tokens"
    )


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gptoss", "gemma4"])
def test_tools_are_printed_though_no_turn_calls_one(name: str) -> None:
    (example,) = render(template_of(name), USER, ANSWER, tools=[TOOL])
    assert "weather" in example.text


THINKING = Message("assistant", "<think>\nThey greet me.\n</think>\n\nHello")
KEPT: dict[str, tuple[str, list[Message]]] = {
    "trimmed spaces": ("gemma", [Message("user", "  Hi \n"), Message("assistant", "\n Hello \n\n")]),
    "empty turns": ("qwen2_5", [Message("user", ""), Message("assistant", ""), USER, Message("assistant", "")]),
    "emoji, right to left": ("llama3", [Message("user", "👩‍👩‍👧 שלום"), Message("assistant", "مرحبا 🎉")]),
    "equal texts": ("gemma", [Message("user", "same"), Message("assistant", "same")] * 2),
    "control tokens": ("qwen3", [Message("user", "<|im_end|><tool_response>x</tool_response>"), ANSWER]),
    "a tool response of a user": ("qwen3", [USER, Message("user", "<tool_response>x</tool_response>"), ANSWER]),
    "private-use characters": ("qwen3", [Message("user", "\U000f0005 a"), Message("assistant", "\U000f0000b")]),
    "lone surrogates": ("qwen3", [Message("user", "\udc80"), ANSWER]),
    "inline thoughts": ("qwen3", [USER, THINKING]),
    "inline thoughts dropped from history": ("qwen3", [USER, THINKING, USER, THINKING]),
    "overlapping constants": ("nemotron_3_ultra", [USER, THINKING, USER, THINKING]),
    "reasoning_content": ("qwen3", [USER, Message("assistant", "Hello", reasoning_content="They greet me.")]),
    "words the template replaces": ("muse_glimmer", [Message("system", "Reasoning Effort: low"), USER, ANSWER]),
    "escaped arguments": ("qwen2_5", [USER, WEATHER, RESULT, ANSWER]),
    "escaped tool result": ("gptoss", [USER, WEATHER, RESULT, ANSWER]),
    "sorted arguments": ("gemma4", [USER, WEATHER, RESULT, ANSWER]),
    "more text than private-use characters": ("qwen2_5", [Message("user", "word " * 40_000), ANSWER]),
}


@pytest.mark.parametrize(("name", "messages"), KEPT.values(), ids=KEPT)
def test_no_false_alarm(name: str, messages: list[Message]) -> None:
    assert render(template_of(name), *messages)


def lost_by(template: Any, text: str, constants: str = "") -> str | None:
    messages = [{"role": "user", "content": text}]

    def to_text(shadow: Any) -> str:
        return template(shadow[0]["content"])

    return find_lost_text(to_text, messages, {0}, to_text(messages), lambda: template_constants(constants))


def test_find_lost_text_on_functions() -> None:
    assert lost_by(lambda text: f"[{text.strip()}]", " a b ") is None
    assert lost_by(lambda text: text[:-1], "abc def") == "drops content of message 1 (user): 'f'"
    assert lost_by(lambda text: "abc", "abc") == "drops content of message 1 (user): 'abc'"
    assert lost_by(str.upper, "abc") == "changes the text around 'ABC'"
    assert lost_by(lambda text: text.split("|")[-1], "a|b") == "changes the text around 'b'"
    assert lost_by(lambda text: text.split("|")[-1], "a|b", "{{ x.split('|') }}") == (
        "drops content of message 1 (user): 'a|b'"
    )
    long = "x" * 200_000
    assert lost_by(lambda text: text, long) is None
    assert lost_by(lambda text: text[1:], long) == f"drops content of message 1 (user): '{'x' * 30}'"
