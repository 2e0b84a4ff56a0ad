from dataclasses import replace

import pytest

from ftkit.data.encode import ANSWER_TOO_LONG, PROMPT_TOO_LONG, TOO_LONG
from ftkit.data.types import IGNORE, Conversation, Message, Text
from ftkit.errors import UserError
from tests.data.encoding import HI, assistant, chatml_encoder, encode, encoder_for, marked, result_of, target_text, user
from tests.tiny_models import tiny_tokenizer


def test_a_conversation_that_just_fits_is_left_alone() -> None:
    (example,) = encode(chatml_encoder(), *HI)
    (same,) = result_of(Conversation(HI), max_length=example.num_tokens).examples
    assert not same.truncated
    assert same.input_ids.tolist() == example.input_ids.tolist()


def test_the_oldest_exchanges_go_first_and_system_stays() -> None:
    system = Message("system", "Be kind.")
    long = (user("x" * 100), assistant("y" * 100))
    middle = (user("Where?"), assistant("", tool_calls=()), Message("tool", "z" * 20), assistant("There"))
    conversation = Conversation((system, *long, *middle, *HI[2:]))
    (example,) = result_of(conversation, max_length=230).examples
    assert example.truncated
    assert example.num_tokens <= 230
    text = marked(tiny_tokenizer(), example)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\n⟦Bye<|im_end|>⟧")
    (shorter,) = result_of(conversation, max_length=80).examples
    assert marked(tiny_tokenizer(), shorter) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Bye<|im_end|>⟧"
    )


def test_then_the_middle_of_the_first_user_message_goes() -> None:
    question = "First, " + "words " * 50 + "and last?"
    (example,) = result_of(Conversation((*HI[:2], user(question), assistant("Bye"))), max_length=60).examples
    assert example.truncated
    assert example.num_tokens == 60
    text = marked(tiny_tokenizer(), example)
    assert text.startswith("<|im_start|>user\nFirst, ")
    assert " ... " in text
    assert text.endswith("and last?<|im_end|>\n<|im_start|>assistant\n⟦Bye<|im_end|>⟧")


def test_the_answer_is_never_cut() -> None:
    answer = assistant("y" * 100)
    result = result_of(Conversation((user("Hi"), answer)), max_length=101)
    assert (result.examples, result.reason) == ([], ANSWER_TOO_LONG)
    crowded = Conversation((Message("system", "s" * 100), user("Hi there"), answer))
    assert result_of(crowded, max_length=150).reason == PROMPT_TOO_LONG
    assert result_of(replace(crowded, messages=crowded.messages[1:]), max_length=150).reason is None
    assert result_of(Conversation((Message("system", "s" * 100), HI[1])), max_length=50).reason == PROMPT_TOO_LONG


def test_one_example_a_turn_is_shortened_turn_by_turn() -> None:
    result = result_of(Conversation((*HI[:2], user("x" * 100), assistant("y" * 100))), turns="each", max_length=80)
    assert [target_text(tiny_tokenizer(), example) for example in result.examples] == ["Hello 👋 you<|im_end|>"]
    assert result.reason == ANSWER_TOO_LONG
    fitting = result_of(Conversation((*HI[:2], user("x" * 100), assistant("Bye"))), turns="each", max_length=50)
    assert [example.truncated for example in fitting.examples] == [False, True]
    assert max(example.num_tokens for example in fitting.examples) == 50


def test_everything_trained_is_shortened_too() -> None:
    (example,) = result_of(Conversation((*HI, *HI)), train_on="all", max_length=70).examples
    assert example.truncated
    assert example.num_tokens <= 70
    (alone,) = result_of(Conversation((user("x" * 100),)), train_on="all", max_length=50).examples
    assert alone.num_tokens == 50


# --- the other ways ---


def test_left_takes_tokens_from_the_beginning_of_the_prompt() -> None:
    (whole,) = encode(chatml_encoder(), *HI)
    answer = len(b"Bye") + 1
    for max_length in (whole.num_tokens - 1, 30, answer + 1):
        (example,) = result_of(Conversation(HI), truncation="left", max_length=max_length).examples
        assert example.truncated
        assert example.input_ids.tolist() == whole.input_ids[-max_length:].tolist()
        assert example.labels.tolist() == [IGNORE, *whole.labels[1 - max_length :].tolist()]
        assert target_text(tiny_tokenizer(), example).endswith("Bye<|im_end|>")
    result = result_of(Conversation(HI), truncation="left", max_length=answer)
    assert (result.examples, result.reason) == ([], ANSWER_TOO_LONG)


def test_left_keeps_bos() -> None:
    encoder = encoder_for(tiny_tokenizer(), "{{ bos_token }}" + tiny_tokenizer().chat_template, truncation="left")
    (whole,) = encode(encoder, *HI)
    encoder.max_length = 30
    (example,) = encode(encoder, *HI)
    assert example.input_ids.tolist() == [whole.input_ids[0], *whole.input_ids[-29:]]
    encoder.max_length = 5
    (barely,) = encode(encoder, *HI)
    assert marked(tiny_tokenizer(), barely) == "<|endoftext|>⟦Bye<|im_end|>⟧"


def test_left_keeps_no_token_that_opens_every_turn() -> None:
    """SmolLM2 calls <|im_start|> its BOS: left before half a text, it would open a turn that has no role."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    encoder = encoder_for(tokenizer, truncation="left")
    (whole,) = encode(encoder, *HI)
    encoder.max_length = 30
    (example,) = encode(encoder, *HI)
    assert example.input_ids.tolist() == whole.input_ids[-30:].tolist()


def test_left_never_cuts_the_last_answer_that_is_trained() -> None:
    messages = (*HI[:2], user("And?"), assistant("Bye", train=False))
    (example,) = result_of(Conversation(messages), truncation="left", max_length=25).examples
    assert marked(tiny_tokenizer(), example) == "assistant\n⟦Hello 👋 you<|im_end|>⟧"
    everything = {"truncation": "left", "train_on": "all"}
    assert result_of(Conversation(messages), **everything, max_length=25).reason == ANSWER_TOO_LONG
    (alone,) = result_of(Conversation((user("x" * 100),)), **everything, max_length=50).examples
    assert alone.num_tokens == 50


def test_drop_and_error() -> None:
    (whole,) = encode(chatml_encoder(), *HI)
    length = whole.num_tokens
    for truncation in ("drop", "error"):
        assert len(result_of(Conversation(HI), truncation=truncation, max_length=length).examples) == 1
    result = result_of(Conversation(HI), truncation="drop", max_length=length - 1)
    assert (result.examples, result.reason) == ([], TOO_LONG)
    each = result_of(Conversation(HI), truncation="drop", max_length=length - 1, turns="each")
    assert [target_text(tiny_tokenizer(), e) for e in each.examples] == ["Hello 👋 you<|im_end|>"]
    assert each.reason == TOO_LONG
    with pytest.raises(UserError) as caught:
        result_of(Conversation(HI), truncation="error", max_length=length - 1)
    assert str(caught.value).startswith(f"rows.jsonl:7: {length} tokens are more than data.max_length: {length - 1}; ")


@pytest.mark.parametrize("truncation", ["oldest_turns", "left", "drop"])
def test_the_length_before_anything_was_cut_is_known(truncation: str) -> None:
    whole = result_of(Conversation(HI))
    assert whole.uncut == whole.examples[0].num_tokens
    for max_length in (8, 30, 200):
        assert result_of(Conversation(HI), truncation=truncation, max_length=max_length).uncut == whole.uncut
    each = result_of(Conversation(HI), turns="each")
    assert each.uncut == max(example.num_tokens for example in each.examples) == whole.uncut
    assert result_of(Text("x" * 100), max_length=60).uncut == 60
    assert result_of(Conversation(HI[:1])).uncut == 0


def test_the_system_prompt_stays_where_turns_go() -> None:
    (example,) = result_of(Conversation(HI), system_prompt="Be kind.", max_length=80).examples
    assert example.truncated
    assert marked(tiny_tokenizer(), example) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Bye<|im_end|>⟧"
    )
