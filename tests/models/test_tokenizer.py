"""`model.tokenizer`: found like a base model, checked against its embeddings."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from ftkit.errors import UserError
from ftkit.models.load import BaseModel, load_config
from ftkit.models.tokenizer import recipe_tokenizer
from ftkit.recipe.schema import ModelSection
from tests.tiny_models import VOCAB_SIZE, save_tiny, tiny_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A recipe's directory, with a base model and another tokenizer beside it."""
    save_tiny(tmp_path / "base")
    other = tiny_tokenizer("other template")
    other.add_tokens(["abcdef"])
    other.save_pretrained(tmp_path / "other")
    return tmp_path


def tokenizer_of(directory: Path, name: str | None) -> PreTrainedTokenizerBase:
    base = BaseModel("base", path=directory / "base", offline=True)
    return recipe_tokenizer(ModelSection(tokenizer=name), base, load_config(base), directory=directory)


def test_the_base_models_own_is_the_default(directory: Path) -> None:
    assert tokenizer_of(directory, None).chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("absolute", [False, True])
def test_another_ones_tokens_and_template(directory: Path, absolute: bool) -> None:
    tokenizer = tokenizer_of(directory, str(directory / "other") if absolute else "other")
    assert tokenizer.chat_template == "other template"
    assert len(tokenizer("abcdef").input_ids) == 1


def test_a_vocabulary_that_fills_the_embeddings(directory: Path) -> None:
    tokenizer = tiny_tokenizer()
    more = [f"<{index}>" for index in range(VOCAB_SIZE - len(tokenizer))]
    tokenizer.add_tokens(more)
    tokenizer.save_pretrained(directory / "full")
    assert len(tokenizer_of(directory, "full")) == VOCAB_SIZE
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(directory / "more")
    assert refusal(directory, "more").startswith(
        f"more has {VOCAB_SIZE + 1} tokens, base has embeddings for {VOCAB_SIZE}; choose a tokenizer of"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "no such directory: "),
        ("base/config.json", "config.json is a file; name the directory that it is in"),
        ("empty", "empty has no tokenizer (tokenizer.json)"),
        ("org/missing", "not (wholly) in the cache, and the network is off"),
        ("hf://other", "other is not (wholly) in the cache"),
    ],
)
def test_refusals_name_the_key(directory: Path, name: str, expected: str) -> None:
    (directory / "empty").mkdir()
    assert expected in refusal(directory, name)


def refusal(directory: Path, name: str) -> str:
    with pytest.raises(UserError) as caught:
        tokenizer_of(directory, name)
    (problem,) = caught.value.problems
    assert problem.key == ("model", "tokenizer")
    assert "\n" not in str(problem)
    return str(problem)
