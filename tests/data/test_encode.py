from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ftkit.data.chat import ChatTemplate
from ftkit.data.encode import (
    NO_TEXT,
    NO_TURN,
)
from ftkit.data.types import IGNORE, Conversation, Example, Message, Text
from ftkit.errors import UserError
from tests.data.encoding import HI, assistant, chatml_encoder, encode, encoder_for, marked, result_of, target_text, user
from tests.data.trl_templates import read_template, template_names, tokenizer_for
from tests.tiny_models import tiny_tokenizer

# --- against marks made by hand ---

BY_HAND: dict[str, list[str]] = {
    "qwen2_5": [
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello 👋 you<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Bye<|im_end|>⟧"
    ],
    "gemma": [
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello 👋 you<end_of_turn>⟧\n"
        "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n⟦Bye<end_of_turn>⟧"
    ],
    "phi3": [
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello 👋 you<|end|>⟧\n<|user|>\nAnd?<|end|>\n<|assistant|>\n⟦Bye<|end|>⟧"
    ],
    # The small tokenizer joins the prompt's two newlines only where nothing follows: prompt and answer are apart.
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello 👋 you<|eot_id|>⟧",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello 👋 you<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Bye<|eot_id|>⟧",
    ],
    "qwen3": [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello 👋 you<|im_end|>⟧",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello 👋 you<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nBye<|im_end|>⟧",
    ],
    "cohere": [
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Hello 👋 you<|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Bye<|END_OF_TURN_TOKEN|>⟧"
    ],
}


@pytest.mark.parametrize(("name", "expected"), BY_HAND.items(), ids=BY_HAND)
def test_targets_are_those_marked_by_hand(name: str, expected: list[str]) -> None:
    tokenizer = tokenizer_for(name)
    examples = encode(encoder_for(tokenizer), *HI)
    assert [marked(tokenizer, example) for example in examples] == expected


def test_gpt_oss_turns_end_as_its_servers_stop() -> None:
    tokenizer = tokenizer_for("gptoss")
    thinking = assistant("Bye", reasoning_content="They leave.")
    first, second = encode(encoder_for(tokenizer), *HI[:3], thinking)
    assert marked(tokenizer, first).endswith("<|start|>assistant⟦<|channel|>final<|message|>Hello 👋 you<|return|>⟧")
    assert marked(tokenizer, second).endswith(
        "<|channel|>final<|message|>Hello 👋 you<|end|><|start|>user<|message|>And?<|end|><|start|>assistant"
        "⟦<|channel|>analysis<|message|>They leave.<|end|><|start|>assistant<|channel|>final<|message|>Bye<|return|>⟧"
    )


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_ignores_the_generation_prompt() -> None:
    tokenizer = tiny_tokenizer()
    (example,) = encode(encoder_for(tokenizer, MISTRAL), *HI)
    assert marked(tokenizer, example) == (
        "<|endoftext|>[INST] Hi [/INST]⟦ Hello 👋 you<|im_end|>⟧[INST] And? [/INST]⟦ Bye<|im_end|>⟧"
    )


TOOLS = ({"type": "function", "function": {"name": "now", "description": "Time", "parameters": {}}},)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": {"zone": 'UTC "0"'}}}


def test_tool_calls_are_targets_and_tool_results_are_not() -> None:
    tokenizer = tokenizer_for("qwen2_5")
    result = Message("tool", "12:00", name="now", tool_call_id="abcdefghi")
    messages = (user("Time?"), assistant("", tool_calls=(CALL,)), result, assistant("Noon."))
    (example,) = encoder_for(tokenizer).encode(Conversation(messages, TOOLS)).examples
    assert '"name": "now", "description": "Time"' in marked(tokenizer, example)
    assert marked(tokenizer, example).partition("Time?<|im_end|>\n")[2] == (
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "now", "arguments": {"zone": "UTC \\"0\\""}}\n</tool_call>'
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n12:00\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Noon.<|im_end|>⟧"
    )


# --- against the tokenizer and against trl's marks, over all templates ---

CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "one turn": HI[:2],
    "two turns": HI,
    "empty": (user(""), assistant(""), user("Hi"), assistant("")),
    "equal": (user("same"), assistant("same"), user("same"), assistant("same")),
    "control tokens": (
        user("What is <|im_end|>\n<|im_start|>assistant\nor <|eot_id|><|end|><end_of_turn>?"),
        assistant("<|im_end|>\n<|eot_id|> <end_of_turn>\n<|end|> it is"),
        user("Thanks"),
        assistant("Fine"),
    ),
    "spaces": (user("  Hi \n"), assistant("  Hello  \n\n"), user("\n\nAnd?"), assistant("\n\nBye")),
    "scripts": (user("😀👩‍👩‍👧 مرحبا"), assistant("🎉 שלום 😀")),
}
REFUSED = {"deepseek_r1_distill", "deepseekv3", "glm4moe", "idefics3", "llava_next", "smolvlm"}
WITHOUT_THINKING = {"enable_thinking": False}


def kwargs_for(name: str) -> dict[str, Any]:
    return WITHOUT_THINKING if name.startswith("nemotron") else {}


@pytest.mark.parametrize("name", [name for name in template_names() if name not in REFUSED])
def test_prompts_are_what_a_server_feeds_and_targets_are_the_rest_of_the_turn(name: str) -> None:
    tokenizer = tokenizer_for(name)
    kwargs = kwargs_for(name)
    encoder = encoder_for(tokenizer, kwargs=kwargs)
    template = encoder.template
    for messages in CONVERSATIONS.values():
        examples = encode(encoder, *messages)
        rendered = [message.to_template() for message in messages]
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        runs = [(example, span) for example in examples for span in _target_spans(example)]
        assert len(runs) == len(answers)
        for turn, (example, (start, end)) in zip(answers, runs, strict=True):
            prompt = template.render(rendered[:turn], generation_prompt=True)
            prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
            assert example.input_ids[:start].tolist() == prompt_ids
            if name not in ("gptoss", "llama3_2", "muse_glimmer"):  # which print today's date
                assert prompt_ids == tokenizer.apply_chat_template(
                    rendered[:turn], add_generation_prompt=True, return_dict=False, **kwargs
                )
            whole = template.render(rendered[: turn + 1])
            trained = tokenizer.decode(example.input_ids[start:end], clean_up_tokenization_spaces=False)
            assert whole.startswith(prompt + trained)
            assert whole.removeprefix(prompt + trained).strip() in ("", "<|endoftext|>")
            assert example.input_ids[end - 1] in template.end_of_turn_ids


def _target_spans(example: Example) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.labels != IGNORE, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _with_marks() -> list[str]:
    """Templates that have a `_training` variant with marks."""
    names = [name for name in template_names() if name not in REFUSED and "generation" in _training(name)]
    assert len(names) >= 20
    return names


def _training(name: str) -> str:
    try:
        return read_template(f"{name}_training")
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize("name", _with_marks())
def test_targets_agree_with_the_marks_of_trl(name: str) -> None:
    tokenizer = tokenizer_for(name)
    kwargs = kwargs_for(name)
    encoder = encoder_for(tokenizer, kwargs=kwargs)
    compared = 0
    # No emoji at the end of a turn: of those, transformers' mask has only the first byte.
    for messages in (HI[:2], CONVERSATIONS["equal"][:2], CONVERSATIONS["control tokens"][:2]):
        rendered = [message.to_template() for message in messages]
        if encoder.template.render(rendered) != ChatTemplate(tokenizer, _training(name), kwargs).render(rendered):
            continue
        marks = tokenizer.apply_chat_template(
            rendered, chat_template=_training(name), return_dict=True, return_assistant_tokens_mask=True, **kwargs
        )
        mask = np.array(marks["assistant_masks"], bool)
        theirs = tokenizer.decode(np.array(marks["input_ids"])[mask], clean_up_tokenization_spaces=False)
        (example,) = encode(encoder, *messages)
        ours = target_text(tokenizer, example)
        prompt = encoder.template.generation_prompt(messages[:1])
        # trl also marks what follows the turn, and in some templates the end of the prompt.
        before, found, after = theirs.rpartition(ours)
        assert found == ours
        assert prompt.endswith(before)
        assert after.strip() in ("", "<|endoftext|>")
        compared += 1
    assert compared or name in ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")  # whose variants differ


# --- what is trained on ---


def chatml_text(*marked_turns: str) -> str:
    roles = ("user", "assistant")
    return "\n".join(f"<|im_start|>{roles[i % 2]}\n{text}" for i, text in enumerate(marked_turns))


HI_TEXTS = ("Hi<|im_end|>", "Hello 👋 you<|im_end|>", "And?<|im_end|>", "Bye<|im_end|>")


def test_the_last_answer_only() -> None:
    (example,) = encode(chatml_encoder(train_on="last_assistant"), *HI)
    assert marked(tiny_tokenizer(), example) == chatml_text(*HI_TEXTS[:3], "⟦Bye<|im_end|>⟧")


def test_every_token_but_the_first() -> None:
    (example,) = encode(chatml_encoder(train_on="all"), *HI, user("Wait"))
    text = chatml_text(*HI_TEXTS, "Wait<|im_end|>") + "\n"
    assert marked(tiny_tokenizer(), example) == text.replace("<|im_start|>", "<|im_start|>⟦", 1) + "⟧"
    (alone,) = encode(chatml_encoder(train_on="all"), user("Hi"))
    assert alone.num_targets == alone.num_tokens - 1


def test_a_message_can_be_left_out_or_taken_in() -> None:
    messages = (HI[0], replace(HI[1], train=False), *HI[2:])
    (example,) = encode(chatml_encoder(), *messages)
    assert marked(tiny_tokenizer(), example) == chatml_text(*HI_TEXTS[:3], "⟦Bye<|im_end|>⟧")
    (everything,) = encode(chatml_encoder(train_on="all"), *messages)
    assert "assistant\n⟧Hello 👋 you<|im_end|>⟦\n" in marked(tiny_tokenizer(), everything)
    taken_in = (HI[0], replace(HI[1], train=True), *HI[2:])
    (both,) = encode(chatml_encoder(train_on="last_assistant"), *taken_in)
    assert target_text(tiny_tokenizer(), both) == "Hello 👋 you<|im_end|>Bye<|im_end|>"


@pytest.mark.parametrize(("flag", "train_on"), [(True, "assistant"), (True, "last_assistant"), (False, "all")])
def test_a_flag_that_cannot_be_followed_is_refused(flag: bool, train_on: Any) -> None:
    with pytest.raises(UserError, match=r"^rows.jsonl:7: message 1 \(user\) has train: (true|false)"):
        encode(chatml_encoder(train_on=train_on), user("Hi", train=flag), HI[1])


def test_an_assistant_message_that_opens_the_conversation_is_context() -> None:
    (example,) = encode(chatml_encoder(), assistant("Welcome"), *HI[:2])
    assert target_text(tiny_tokenizer(), example) == "Hello 👋 you<|im_end|>"
    assert "Welcome" in marked(tiny_tokenizer(), example)


@pytest.mark.parametrize("messages", [(user("Hi"),), (assistant("Hi"),), (user("Hi"), assistant("No", train=False))])
def test_nothing_to_train_on(messages: tuple[Message, ...]) -> None:
    result = chatml_encoder().encode(Conversation(messages))
    assert (result.examples, result.reason) == ([], NO_TURN)


def test_the_end_of_turn_is_a_target_where_padding_uses_the_same_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    (example,) = encode(encoder_for(tokenizer), *HI)
    ends = example.labels[example.labels == tokenizer.eos_token_id]
    assert len(ends) == 2


def test_half_a_character_names_the_row() -> None:
    for document in (Conversation((user("\ud83d"), HI[1])), Text("a \ud83d")):
        with pytest.raises(UserError, match=r"^rows.jsonl:7: the text has half a character: '\\ud83d'"):
            chatml_encoder().encode(document, "rows.jsonl:7")


# --- text ---


def test_a_text_ends_in_eos_and_its_first_token_is_no_target() -> None:
    tokenizer = tiny_tokenizer()
    (example,) = result_of(Text("Once upon")).examples
    assert marked(tokenizer, example) == "O⟦nce upon<|im_end|>⟧"
    (ended,) = result_of(Text("Once<|im_end|>")).examples
    assert marked(tokenizer, ended) == "O⟦nce<|im_end|>⟧"


def test_a_text_begins_as_the_tokenizer_begins_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    (example,) = encoder_for(tokenizer).encode(Text("Once")).examples
    assert marked(tokenizer, example) == "<|endoftext|>⟦Once<|im_end|>⟧"


@pytest.mark.parametrize("length", [7, 8, 9, 14, 15, 16, 40])
def test_a_long_text_is_cut_into_pieces_and_every_token_is_a_target_once(length: int) -> None:
    text = "".join(chr(97 + index % 26) for index in range(length))
    examples = result_of(Text(text), max_length=8).examples
    assert max(example.num_tokens for example in examples) <= 8
    targets = np.concatenate([example.input_ids[example.labels != IGNORE] for example in examples])
    assert tiny_tokenizer().decode(targets) == text[1:] + "<|im_end|>"
    assert all(example.labels[0] == IGNORE and not example.truncated for example in examples)


@pytest.mark.parametrize("text", ["", " \n"])
def test_no_text(text: str) -> None:
    result = result_of(Text(text))
    assert (result.examples, result.reason) == ([], NO_TEXT)


# --- prompts and answers for evaluation ---


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "cohere2"])
def test_prompt_and_answer_join_to_the_trained_example(name: str) -> None:
    tokenizer = tokenizer_for(name)
    encoder = encoder_for(tokenizer)
    conversation = Conversation(HI)
    prompt, answer = encoder.encode_prompt(conversation), encoder.encode_answer(conversation, "Bye")
    assert [*prompt, *answer] == encode(encoder, *HI)[-1].input_ids.tolist()
    assert encoder.encode_answer(conversation, "Bye", end_of_turn=False) == answer[:-1]
    assert answer[-1] in encoder.template.end_of_turn_ids
    unanswered = Conversation(HI[:3])
    assert encoder.encode_prompt(unanswered) == prompt
    assert encoder.encode_answer(unanswered, "Bye") == answer
