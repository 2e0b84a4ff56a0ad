"""Prompts: the ids that training has, or plain text; nothing longer than the model takes."""

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ftkit.data.chat import ChatTemplate
from ftkit.data.encode import Encoder
from ftkit.data.types import IGNORE, Conversation, Document, Example, Message, Text
from ftkit.errors import UserError
from ftkit.evaluation.items import Item
from ftkit.evaluation.metrics import Truth
from ftkit.evaluation.prompts import ChatPrompts, RawPrompts, choose_mode
from tests.tiny_models import CHATML, tiny_tokenizer

LIMIT = 500
EOS, BOS = 258, 256


def item_of(document: Document, *references: str) -> Item:
    return Item(document, Truth(references), "here:1")


def dialogue(*contents: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[index % 2], content) for index, content in enumerate(contents))  # type: ignore[arg-type]
    return Conversation((Message("system", system), *messages) if system else messages)


def chat(max_length: int = 512) -> tuple[PreTrainedTokenizerFast, Encoder, ChatPrompts]:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(
        tokenizer, ChatTemplate(tokenizer, CHATML), max_length=max_length, turns="auto", train_on="assistant"
    )
    return tokenizer, encoder, ChatPrompts(tokenizer, encoder)


def targets(example: Example) -> list[int]:
    return example.input_ids[example.labels != IGNORE].tolist()


# ------------------------------------------------------------------------------------------------------- chat


def test_a_question_is_what_a_server_feeds_and_an_answer_ends_its_turn() -> None:
    tokenizer, encoder, prompts = chat()
    item = item_of(dialogue("hi", "hello", system="be kind"), "hello")
    question = prompts.question(item, LIMIT)
    expected = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(question) == expected
    answered = prompts.answered(item, "bye", LIMIT)
    assert answered.input_ids[: len(question)].tolist() == question
    assert tokenizer.decode(targets(answered)) == "bye<|im_end|>"
    # The reference as an answer is the example that training makes of the row.
    (trained,) = encoder.encode(item.document).examples
    reference = prompts.answered(item, "hello", LIMIT)
    assert reference.input_ids.tolist() == trained.input_ids.tolist()
    assert reference.labels.tolist() == trained.labels.tolist()
    assert EOS in prompts.end_ids


def test_only_the_last_answer_is_rated_and_the_document_rates_all_turns() -> None:
    tokenizer, _, prompts = chat()
    item = item_of(dialogue("a", "b", "c", "d"), "d")
    assert tokenizer.decode(targets(prompts.answered(item, "d", LIMIT))) == "d<|im_end|>"
    (document,) = prompts.document(item, LIMIT)
    assert tokenizer.decode(targets(document)) == "b<|im_end|>d<|im_end|>"


def test_a_question_that_is_too_long_loses_its_oldest_turns_and_never_its_answer() -> None:
    tokenizer, _, prompts = chat()
    item = item_of(dialogue("old " * 40, "older", "new", "answer"), "answer")
    example = prompts.answered(item, "answer", 100)
    assert tokenizer.decode(example.input_ids) == (
        "<|im_start|>user\nnew<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>"
    )
    long = item_of(dialogue("first " + "x" * 300 + " last", "answer"), "answer")
    example = prompts.answered(long, "answer", 100)
    text = tokenizer.decode(example.input_ids)
    assert example.num_tokens <= 100
    assert text.startswith("<|im_start|>user\nfirst ")
    assert text.endswith(" last<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>")
    huge = prompts.answered(long, "y" * 200, 100)  # nothing helps: the end of the answer is kept
    assert huge.num_tokens == 100
    assert huge.num_targets == 99


def test_a_document_longer_than_the_model_takes_is_rated_in_pieces() -> None:
    _, encoder, prompts = chat()
    item = item_of(dialogue("q", "x" * 200))
    (whole,) = encoder.encode(item.document).examples
    pieces = prompts.document(item, 50)
    assert all(piece.num_tokens <= 50 for piece in pieces)
    assert [t for piece in pieces for t in targets(piece)] == targets(whole)


def test_thoughts_are_no_part_of_the_answer() -> None:
    tokenizer, _, prompts = chat()
    ids = tokenizer("<think>\nhm\n</think>\n\n42", add_special_tokens=False).input_ids
    assert prompts.decode(ids) == "42"
    assert prompts.answer_end([]) is None


# -------------------------------------------------------------------------------------------------------- raw


def test_raw_text_has_an_answer_after_a_space() -> None:
    tokenizer = tiny_tokenizer(None)
    prompts = RawPrompts(tokenizer)
    item = item_of(dialogue("Sky? ", "blue", "Grass?", "green", system="Colors."), "green")
    assert tokenizer.decode(prompts.question(item, LIMIT)) == "Colors.\n\nSky? blue\n\nGrass?"
    assert tokenizer.decode(targets(prompts.answered(item, "green", LIMIT))) == " green"
    line = item_of(dialogue("Grass:\n", "green"), "green")
    assert tokenizer.decode(prompts.answered(line, "green", LIMIT).input_ids) == "Grass:\ngreen"
    assert tokenizer.decode(targets(prompts.document(line, LIMIT)[0])) == "green"
    assert prompts.end_ids == (EOS,)


def test_raw_text_begins_with_bos_where_the_tokenizer_puts_one() -> None:
    tokenizer = tiny_tokenizer(None)
    item = item_of(dialogue("q", "a"), "a")
    text = item_of(Text("plain"))
    assert BOS not in RawPrompts(tokenizer).question(item, LIMIT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
    )
    prompts = RawPrompts(tokenizer)
    assert prompts.question(item, LIMIT)[0] == BOS
    assert prompts.answered(item, "a", LIMIT).input_ids.tolist().count(BOS) == 1
    assert tokenizer.decode(targets(prompts.document(text, LIMIT)[0])) == "plain"  # with BOS, its first letter too


def test_raw_text_that_is_too_long_loses_its_beginning() -> None:
    tokenizer = tiny_tokenizer(None)
    prompts = RawPrompts(tokenizer)
    item = item_of(dialogue("x" * 100 + "end", "answer"), "answer")
    assert tokenizer.decode(prompts.question(item, 8)) == "xxxxxend"
    example = prompts.answered(item, "answer", 12)
    assert tokenizer.decode(example.input_ids) == "xxend answer"
    assert tokenizer.decode(targets(example)) == " answer"
    text = "".join(map(chr, range(97, 117)))
    pieces = prompts.document(item_of(Text(text)), 8)
    assert [tokenizer.decode(piece.input_ids) for piece in pieces] == ["abcdefgh", "hijklmno", "opqrst"]
    assert tokenizer.decode(np.concatenate([targets(piece) for piece in pieces])) == text[1:]


def test_a_raw_answer_is_over_at_the_end_of_its_line() -> None:
    prompts = RawPrompts(tiny_tokenizer(None))
    assert prompts.answer_end([item_of(dialogue("q", "a"), "a")]) == "\n"
    assert prompts.answer_end([item_of(dialogue("q", "a"), "a", "b\nc")]) == "\n\n"


# ------------------------------------------------------------------------------------------------------- mode


def test_auto_is_chat_where_there_is_a_template() -> None:
    assert choose_mode("auto", has_template=True) == "chat"
    assert choose_mode("auto", has_template=False) == "raw"
    assert choose_mode("raw", has_template=True) == "raw"
    with pytest.raises(UserError, match="no model that is compared has a chat template"):
        choose_mode("chat", has_template=False)
