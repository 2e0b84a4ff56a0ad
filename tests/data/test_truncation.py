from dataclasses import replace

from ftkit.data.encode import (
    ANSWER_TOO_LONG,
    PROMPT_TOO_LONG,
)
from ftkit.data.types import Conversation, Message
from tests.data.encoding import HI, assistant, chatml_encoder, encode, marked, result_of, target_text, user
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
