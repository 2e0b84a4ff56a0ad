from pathlib import Path

import pytest

from ftkit.data.template_choice import chat_template_for
from ftkit.data.template_texts import BUILT_IN
from ftkit.data.types import Message
from ftkit.errors import UserError
from ftkit.recipe.schema import ModelSection
from tests.data.trl_templates import tokenizer_for
from tests.data.turns import ANSWER, RESULT, USER, refusal, render
from tests.tiny_models import CHATML, tiny_tokenizer


def test_the_tokenizers_own_template_is_the_default() -> None:
    template = chat_template_for(tiny_tokenizer(), ModelSection(), Path(), {"key": 1})
    assert (template.templates, template.kwargs, template.warning) == ({"default": CHATML}, {"key": 1}, None)


def test_a_base_model_without_template_gets_one_that_ends_in_its_own_eos() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = "<|endoftext|>"
    template = chat_template_for(tokenizer, ModelSection(), Path(), {})
    assert "no chat template" in str(template.warning)
    assert template.end_of_turn_ids == (tokenizer.eos_token_id,)
    (example,) = render(template, Message("system", "Be kind."), USER, ANSWER, USER, ANSWER)
    assert example.text == (
        "Be kind.\n\n### User:\nHi there\n\n### Assistant:\nHello you<|endoftext|>\n\n"
        "### User:\nHi there\n\n### Assistant:\nHello you<|endoftext|>"
    )
    assert [example.text[slice(*span)] for span in example.spans] == ["Hello you<|endoftext|>"] * 2
    assert "drops content of message 2 (tool)" in refusal(template, USER, RESULT, ANSWER)


def test_the_plain_template_prints_bos_where_the_tokenizer_adds_one() -> None:
    tokenizer = tiny_tokenizer(None)
    assert "bos_token" not in chat_template_for(tokenizer, ModelSection(), Path(), {}).templates["default"]
    tokenizer.add_bos_token = True
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    template = chat_template_for(tokenizer, ModelSection(), Path(), {})
    assert template.generation_prompt([USER]).startswith("<|endoftext|>### User:\n")


def test_a_template_file_is_relative_to_the_recipe(tmp_path: Path) -> None:
    text = CHATML.replace("'\\n'", "'!'") + "{# mine #}"
    (tmp_path / "mine.jinja").write_text(text, encoding="utf-8")
    template = chat_template_for(tiny_tokenizer(), ModelSection(chat_template="mine.jinja"), tmp_path, {})
    assert template.templates["default"] == text


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name: str) -> None:
    template = chat_template_for(tiny_tokenizer(None), ModelSection(chat_template=name), Path(), {})
    (example,) = render(template, USER, ANSWER, USER, ANSWER)
    assert [example.text[slice(*span)] for span in example.spans] == ["Hello you<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "needs tokens that the tokenizer lacks: <|im_start|>, <|im_end|>"),
        (
            "nothing.jinja",
            "/nothing.jinja, and no built-in template nothing.jinja; give a Jinja file or one of chatml, plain",
        ),
        ("latin.jinja", "cannot read"),
    ],
)
def test_refused_choices(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe\xfa")
    tokenizer = tokenizer_for("gemma")
    with pytest.raises(UserError) as caught:
        chat_template_for(tokenizer, ModelSection(chat_template=name), tmp_path, {})
    assert expected in str(caught.value)
    assert caught.value.problems[0].key == ("model", "chat_template")


def test_no_template_and_no_eos_is_refused() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a chat template nor an EOS token"):
        chat_template_for(tokenizer, ModelSection(), Path(), {})
