"""What people write who know another tool, or YAML from hearsay: each slip is one line that says how to mend it."""

from pathlib import Path

import pytest

from ftkit.errors import UserError
from ftkit.recipe.foreign_values import LATER_VALUES, SPELT_OTHERWISE
from ftkit.recipe.load import load_recipe
from tests.recipe.recipes import BASE, problems, write

OTHERS = BASE.replace("  type: lora\n", "")

SLIPS = {
    # Text that YAML reads as a mapping, or cannot read.
    "train: [{path: a, template: {text}}]": "data.train.0.template: expected text, got a mapping; put text that starts"
    ' with a brace in quotes: "{text}", on the command line twice: \'"{text}"\'',
    "train: [{path: a, template: {a: {b: c}}}]": 'got a mapping; put text that starts with a brace in quotes: "{...}"',
    "train:\n  - path: a\n    template: {text} is it good?": "recipe.yaml:8: the text goes on after the bracket that"
    " closes it; put text that starts with a bracket or brace in quotes",
    "train:\n  - path: a\n    template: [INST] {text}": "recipe.yaml:8: the text goes on after the bracket that closes",
    "train:\n  - path: a\n    template: Review: {text}": "recipe.yaml:8: a colon where no key can stand; check the"
    " indentation, and put text that holds ': ' in quotes",
    "train:\n\t- path: a": "recipe.yaml:7: a tab where YAML allows only spaces; indent with spaces",
    # Lists and sections.
    "train: a.jsonl": "data.train: expected a list of mappings (at least one), got the text 'a.jsonl'; write [{path:"
    " a.jsonl}]",
    "train: {path: a.jsonl}": "got a mapping; start each entry with a dash",
    "method: {type: lora, targets: q_proj, v_proj}": "method.v_proj: unknown key; write a list in brackets: [...,"
    " v_proj]",
    "method: {type: lora, soft_prompt: {num_virtual_tokens: 8}}": "method.soft_prompt: expected a whole number above 0,"
    " got a mapping; write soft_prompt: 8",
    "method: {type: lora, num_virtual_tokens: 8}": "method.num_virtual_tokens: no key of this method; it belongs to"
    " soft_prompt, prefix and llama_adapter; set method.soft_prompt to their number to train a soft prompt besides, or"
    " change method.type",
    "method: {type: full, num_virtual_tokens: 8}": "and llama_adapter; remove it, or change method.type",
    # Numbers.
    "num_train_epochs: 0.5": "expected a whole number above 0, got the number 0.5; set training.max_steps for a part of"
    " an epoch",
    "learning_rate: -1e-4": "expected a number above 0, got the number -0.0001",
    "val_size: 5%": "write 0.05",
}


@pytest.mark.parametrize("lines", SLIPS)
def test_slips(tmp_path: Path, lines: str) -> None:
    text = {"train": "base_model: a\nmethod:\n  type: lora\nmodel:\ndata:\n  ", "metho": BASE.partition("method:")[0]}
    indented = lines.replace("\n", "\n  ") if lines.startswith("train") else lines
    (found,) = problems(tmp_path, text.get(lines[:5], BASE) + indented + "\n")
    assert SLIPS[lines] in found


ARGUMENTS = {
    "method={type:": "method: a bracket or brace is not closed; put the whole argument in quotes: 'method=...'; text",
    "v_proj]": "'v_proj]' sets no key; write it as key=value, e.g. training.learning_rate=1e-4, and one with spaces in"
    " quotes: 'key=[a, b]'",
    "data.train.0.template={text} good?": "data.train.0.template: the text goes on after the bracket that closes it;"
    " text that starts with a bracket or quote is quoted twice: data.train.0.template='\"...\"'",
    "data.train.0.template={text}": "expected text, got a mapping; put text that starts with a brace in quotes",
    "data.train=a.jsonl": "got the text 'a.jsonl'; write [{path: a.jsonl}]",
    "method.soft_prompt.num_virtual_tokens=8": "method.soft_prompt.num_virtual_tokens: method.soft_prompt has no keys;"
    " set method.soft_prompt to a whole number above 0",
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_slips_on_the_command_line(tmp_path: Path, argument: str) -> None:
    (found,) = problems(tmp_path, BASE, argument)
    assert found.startswith("command line: ")
    assert ARGUMENTS[argument] in found


@pytest.mark.parametrize("name", [*SPELT_OTHERWISE, *LATER_VALUES["method.type"]])
def test_names_of_other_methods_say_what_to_write(tmp_path: Path, name: str) -> None:
    (found,) = problems(tmp_path, OTHERS + f"  type: {name}\n")
    assert found.startswith("recipe.yaml:6: method.type: ")
    assert "; write " in found


def test_p_tuning_is_one_of_two_here(tmp_path: Path) -> None:
    expected = "recipe.yaml:6: method.type: p_tuning is no method of its own here; write soft_prompt for vectors before"
    expected += " the text, or prefix for P-Tuning v2"
    assert problems(tmp_path, OTHERS + "  type: p_tuning\n") == [expected]


def test_files_that_are_not_there_or_no_recipe(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"recipes\.yaml: no such file; did you mean .*/recipe\.yaml\?"):
        load_recipe(tmp_path / "recipes.yaml")
    rows = write(tmp_path, "{}\n", "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl: is data, not a recipe; make a recipe of it: ftkit init .*rows"):
        load_recipe(rows)
