import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from ftkit.data import encode as encode_module
from ftkit.data.encode import NO_TARGET, NO_TEXT, NO_TURN, make_encoder
from ftkit.data.types import IGNORE, Conversation, Message, Text
from ftkit.errors import UserError
from ftkit.recipe.schema import DataSection, DatasetSection
from tests.data.encoding import HI, assistant, chatml_encoder, encode, encoder_for, marked, result_of, target_text, user
from tests.data.trl_templates import tokenizer_for
from tests.tiny_models import CHATML, tiny_tokenizer

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


def test_a_row_without_a_token_to_train_on_has_a_reason() -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    result = encoder_for(tokenizer, train_on="all").encode(Conversation((user("x"),)))
    assert (result.examples, result.reason) == ([], NO_TARGET)


# --- system prompt and keywords ---

SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_the_system_prompt_stands_where_a_conversation_has_none() -> None:
    encoder = chatml_encoder(system_prompt="Be brief.")
    (example,) = encode(encoder, *HI)
    assert marked(tiny_tokenizer(), example).startswith(SYSTEM + "<|im_start|>user\nHi<|im_end|>\n")
    assert target_text(tiny_tokenizer(), example) == "Hello 👋 you<|im_end|>Bye<|im_end|>"
    (own,) = encode(encoder, Message("system", "Be long."), *HI)
    assert "Be long." in marked(tiny_tokenizer(), own)
    assert "Be brief." not in marked(tiny_tokenizer(), own)
    (welcome,) = encode(encoder, assistant("Welcome"), *HI)
    assert "Welcome" not in target_text(tiny_tokenizer(), welcome)
    prompt = encoder.encode_prompt(Conversation(HI))
    assert [*prompt, *encoder.encode_answer(Conversation(HI), "Bye")] == example.input_ids.tolist()


def test_a_template_that_takes_no_system_message_refuses_the_prompt_at_once() -> None:
    for name, reason in (("gemma", "System role not supported"), ("lfm2_template", "drops content of message 1")):
        tokenizer = tokenizer_for(name) if name == "gemma" else tiny_tokenizer(WITHOUT_SYSTEM)
        with pytest.raises(UserError, match=reason) as caught:
            encoder_for(tokenizer, system_prompt="Be brief.")
        assert caught.value.problems[0].key == ("data", "system_prompt")


WITHOUT_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_rows_keywords_come_over_the_runs() -> None:
    tokenizer = tokenizer_for("qwen3", "bytes")
    encoder = encoder_for(tokenizer, kwargs={"enable_thinking": True})
    plain = Conversation(HI[:2])
    without = replace(plain, chat_template_kwargs={"enable_thinking": False})
    targets = [target_text(tokenizer, encoder.encode(row).examples[0]) for row in (plain, without, plain)]
    thoughts = "<think>\n\n</think>\n\n"
    assert targets == [
        thoughts + "Hello 👋 you<|im_end|>",
        "Hello 👋 you<|im_end|>",
        thoughts + "Hello 👋 you<|im_end|>",
    ]
    assert tokenizer.decode(encoder.encode_prompt(without)).endswith(thoughts)
    assert tokenizer.decode(encoder.encode_answer(without, "Bye")) == "Bye<|im_end|>"
    assert encoder.template.with_kwargs(dict(without.chat_template_kwargs)) is encoder.template.with_kwargs(
        {"enable_thinking": False}
    )
    assert encoder.template.with_kwargs({}) is encoder.template


def test_keywords_that_no_template_gets_name_the_row() -> None:
    row = Conversation(HI, chat_template_kwargs={"tokenize": False})
    with pytest.raises(UserError, match=r"^rows.jsonl:7: tokenize: not a keyword of chat templates"):
        chatml_encoder().encode(row, "rows.jsonl:7")


# --- the encoder as a value ---


def test_the_recipe_chooses_everything() -> None:
    options = {
        "max_length": 99,
        "turns": "each",
        "train_on": "last_assistant",
        "train_on_reasoning": False,
        "truncation": "drop",
        "system_prompt": "Be brief.",
    }
    section = DataSection(train=(DatasetSection(path="a"),), **options)  # type: ignore[arg-type]
    encoder = make_encoder(tiny_tokenizer(), chatml_encoder().template, section)
    assert {name: getattr(encoder, name) for name in options} == options


def test_an_encoder_survives_the_way_to_another_process() -> None:
    for name in ("qwen3", "gptoss", "llama3"):
        encoder = encoder_for(tokenizer_for(name), train_on_reasoning=False, system_prompt="Be brief.")
        row = Conversation((*HI[:3], assistant("Bye", reasoning_content="They leave.")))
        if name == "llama3":
            row = Conversation(HI)
        row = replace(row, chat_template_kwargs={"key": 1})
        fresh = pickle.loads(pickle.dumps(encoder))
        expected = encoder.encode(row)
        for copy in (fresh, pickle.loads(pickle.dumps(encoder))):  # not used before, and used
            found = copy.encode(row)
            assert [(e.input_ids.tolist(), e.labels.tolist()) for e in found.examples] == [
                (e.input_ids.tolist(), e.labels.tolist()) for e in expected.examples
            ]
            assert copy.digest == encoder.digest


def test_the_digest_changes_with_all_that_changes_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    def same() -> str:
        return chatml_encoder().digest

    changed = {
        "max_length": chatml_encoder(max_length=7).digest,
        "turns": chatml_encoder(turns="each").digest,
        "train_on": chatml_encoder(train_on="all").digest,
        "train_on_reasoning": chatml_encoder(train_on_reasoning=False).digest,
        "truncation": chatml_encoder(truncation="left").digest,
        "system_prompt": chatml_encoder(system_prompt="Be brief.").digest,
        "keywords": chatml_encoder(kwargs={"key": 1}).digest,
        "value": chatml_encoder(kwargs={"key": True}).digest,
        "template": encoder_for(tiny_tokenizer(), WITHOUT_SYSTEM).digest,
        "templates": encoder_for(tokenizer_for("qwen2_5")).digest,
    }
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["abc"])
    changed["vocabulary"] = encoder_for(tokenizer).digest
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    changed["special tokens"] = encoder_for(tokenizer).digest
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    changed["BOS"] = encoder_for(tokenizer).digest
    assert len({same(), *changed.values()}) == len(changed) + 1
    assert chatml_encoder(kwargs={"a": 1, "b": 2}).digest == chatml_encoder(kwargs={"b": 2, "a": 1}).digest
    before = same()
    for library in (encode_module.tokenizers, encode_module.transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0.0.0")
            assert same() != before


def test_the_digest_does_not_change_with_use() -> None:
    tokenizer = tiny_tokenizer()
    encoder = encoder_for(tokenizer)
    before = encoder.digest
    encode(encoder, *HI)
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    encoder.template.save_to(tokenizer)
    assert encoder_for(tokenizer).digest == before


def test_a_tokenizer_without_a_backend_has_a_digest() -> None:
    def digest(*tokens: str) -> str:
        tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>", *tokens])
        return encoder_for(tokenizer, CHATML).digest

    assert digest() == digest() != digest("<|more|>")


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
