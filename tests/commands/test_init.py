"""`ftkit init`: recipes from data and from configurations, which train as they stand."""

import json
from pathlib import Path

import pytest

from ftkit.commands.init import init
from ftkit.commands.train import train
from ftkit.errors import UserError
from ftkit.estimate import Estimator, Place
from ftkit.recipe.load import load_recipe
from ftkit.training.prepare import prepare_model
from tests.test_fit import least
from tests.tiny_models import save_tiny
from tests.tiny_runs import losses, write_rows

KEYS = {"offline": True, "trust_remote_code": False}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a model and 150 rows, six of which repeat another."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 145).read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, *rows[:5]]) + "\n")
    return tmp_path


@pytest.mark.parametrize("method", ["lora", "full", "adapter", "soft_prompt", "prefix", "llama_adapter"])
def test_a_recipe_from_data_trains_as_it_stands(method, place, capsys):
    init("rows.jsonl", model="base", method=method)
    shown = capsys.readouterr().out
    assert "144 rows: conversations, one answer each" in shown
    assert "6 rows say the same as another" in shown
    assert "ftkit train recipe.yaml" in shown
    recipe = load_recipe(place / "recipe.yaml").recipe
    assert (recipe.base_model, recipe.data.train[0].path) == ("base", "rows.jsonl")
    assert (recipe.method.type, recipe.data.deduplicate, recipe.data.val_size) == (method, True, 20)
    assert recipe.data.max_length == 128
    assert recipe.training.global_batch_size == 8
    if method != "llama_adapter":  # two layers are too few for it
        train(place / "recipe.yaml", ["training.max_steps=2"])
        assert len(losses(place / "runs" / "recipe-1")) == 2


def test_the_comments_say_what_the_data_is_like(place):
    init("rows.jsonl", model="base", output=place / "mine.yaml")
    text = (place / "mine.yaml").read_text()
    assert "# Made by `ftkit init` from 144 rows: conversations, one answer each." in text
    assert "# keeps 99% of the rows whole" in text
    assert "# 6 rows say the same as another" in text
    assert "global_batch_size: 8" in text
    recipe = load_recipe(place / "mine.yaml").recipe
    (steps,) = (line for line in text.splitlines() if "num_train_epochs" in line)
    assert f"{recipe.training.num_train_epochs * -(-124 // 8)} steps" in steps


def test_max_length_keeps_all_but_one_in_a_hundred(place):
    rows = [{"instruction": "a" * length, "output": "b"} for length in (1500, *range(2, 201))]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init("rows.jsonl", model="base")
    recipe = load_recipe(place / "recipe.yaml").recipe
    # 199 characters at most in all rows but one, around which the template puts some tokens.
    assert recipe.data.max_length == 256


def test_few_rows_are_all_trained_on(place):
    write_rows(place / "rows.jsonl", 30)
    init("rows.jsonl", model="base")
    recipe = load_recipe(place / "recipe.yaml").recipe
    assert (recipe.data.val_size, recipe.training.global_batch_size) == (0, 4)


def test_columns_of_other_names_are_mapped(place):
    rows = [{"question": f"Say {n}.", "context": "", "response": str(n)} for n in range(30)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init("rows.jsonl", model="base")
    dataset = load_recipe(place / "recipe.yaml").recipe.data.train[0]
    assert dataset.format == "alpaca"
    columns = dataset.columns.model_dump(exclude_none=True)
    assert columns == {"instruction": "question", "input": "context", "output": "response"}
    assert "# by their names: check them" in (place / "recipe.yaml").read_text()
    (place / "rows.jsonl").write_text(json.dumps({"zzz": 1, "yyy": 2}) + "\n")
    with pytest.raises(UserError, match="fits no format"):
        init("rows.jsonl", model="base", overwrite=True)


def test_turns_and_systems_are_counted(place, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{"role": "system", "content": "s"}, *turns]}, {"messages": turns * 3}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init("rows.jsonl", model="base")
    assert "2 rows: conversations, 2.0 answers each, 3 at most, 50% with a system prompt" in capsys.readouterr().out
    (place / "texts.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    init("texts.jsonl", model="base", output=place / "t.yaml")
    assert "1 rows: texts" in capsys.readouterr().out


def test_a_model_that_does_not_fit_is_told(place, monkeypatch, capsys):
    monkeypatch.setattr("ftkit.draft.free_memory", lambda device: 100_000)
    init("rows.jsonl", model="base", method="full")
    shown = " ".join(capsys.readouterr().out.split())
    assert "choose a smaller --model, or --method lora" in shown


def test_what_fits_in_four_bits_only_is_kept_in_four_bits(place, monkeypatch, capsys):
    init("rows.jsonl", model="base", output=place / "plain.yaml")
    plain = load_recipe(place / "plain.yaml")
    whole, quantized = (
        least(Estimator(prepared := prepare_model(loaded, **KEYS), Place.here(prepared)))
        for loaded in (plain, load_recipe(place / "plain.yaml", ["model.quantization=nf4"]))
    )
    assert quantized < whole
    monkeypatch.setattr("ftkit.draft.free_memory", lambda device: (whole + quantized) // 2)
    capsys.readouterr()
    init("rows.jsonl", model="base")
    assert "choose a smaller" not in capsys.readouterr().out
    assert load_recipe(place / "recipe.yaml").recipe.model.quantization == "nf4"
    train(place / "recipe.yaml", ["training.max_steps=2"])
    assert len(losses(place / "runs" / "recipe-1")) == 2


def test_a_configuration_becomes_a_recipe_that_trains(place, capsys):
    (place / "configs").mkdir()
    (place / "configs" / "axolotl.yaml").write_text(
        "base_model: base\ndatasets: [{path: rows.jsonl, type: alpaca}]\nadapter: lora\nlora_r: 4\n"
        "micro_batch_size: 2\ngradient_accumulation_steps: 2\nnum_epochs: 1\nmax_steps: 2\nsequence_len: 128\n"
        "flash_attention: true\n"
    )
    init("configs/axolotl.yaml", output=place / "configs" / "recipe.yaml")
    shown = capsys.readouterr().out
    assert "configs/axolotl.yaml is a configuration of axolotl" in shown
    assert "differs    micro_batch_size: 2 a device x 2 steps" in shown
    assert "not needed flash_attention\n" in shown
    text = (place / "configs" / "recipe.yaml").read_text()
    assert "#   micro_batch_size: 2 a device" in text
    assert "# Not needed here: flash_attention\n" in text
    recipe = load_recipe(place / "configs" / "recipe.yaml").recipe
    assert (recipe.base_model, recipe.data.train[0].path) == ("../base", "../rows.jsonl")
    train(place / "configs" / "recipe.yaml", [f"output_dir={place / 'run'}"])
    assert len(losses(place / "run")) == 2


def test_another_method_or_base_takes_what_belonged_to_the_old_one_along(place, capsys):
    (place / "axolotl.yaml").write_text(
        "base_model: org/old\nrevision_of_model: abc\ndatasets: [{path: rows.jsonl, type: alpaca}]\nadapter: qlora\n"
        "lora_r: 4\nlearning_rate: 0.0002\nnum_epochs: 1\nmax_steps: 2\nsequence_len: 128\n"
    )
    init("axolotl.yaml", model="base", method="full")
    recipe = load_recipe(place / "recipe.yaml").recipe
    assert (recipe.model.quantization, recipe.model.revision, recipe.method.type) == (None, None, "full")
    shown = capsys.readouterr().out
    for key in ("model.revision", "model.quantization", "training.learning_rate"):
        assert f"differs    {key}: belonged to what the command line replaced" in shown
    train(place / "recipe.yaml", [])


def test_a_glob_starts_from_where_it_was_written(place):
    (place / "conf").mkdir()
    init("rows*.jsonl", model="base", output=place / "conf" / "recipe.yaml")
    assert load_recipe(place / "conf" / "recipe.yaml").recipe.data.train[0].path == "../rows*.jsonl"


def test_printed_commands_can_be_pasted(place, capsys):
    init("rows.jsonl", model="base", output=Path("my recipe.yaml"))
    assert "  ftkit train 'my recipe.yaml'\n" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(place):
    (place / "recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"recipe\.yaml exists; choose another --output, or give --overwrite"):
        init("rows.jsonl", model="base")
    init("rows.jsonl", model="base", overwrite=True)
    assert (place / "recipe.yaml.old-1").read_text() == "mine"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("rows.jsonl", {"method": "lorra"}, "--method lorra: there is no such method; choose one of full, lora"),
        ("nothing.jsonl", {}, "no such file: .*nothing.jsonl"),
        ("rows.jsonl", {"model": "./nothing"}, "no such model: .*nothing"),
        ("nothing.yaml", {}, "nothing.yaml"),
    ],
)
def test_what_cannot_be_had(source, options, message, place):
    with pytest.raises(UserError, match=message):
        init(source, **{"model": "base"} | options)
    assert not (place / "recipe.yaml").exists()
    assert not list(place.glob(".ftkit-init-*"))


def test_columns_that_are_guessed_are_told(place, capsys):
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init("pairs.jsonl", model="base", output=place / "pairs.yaml")
    shown = " ".join(capsys.readouterr().out.split())
    assert "columns are taken by their names (completion: chosen): check them" in shown
    assert "rejected ones ignored: ftkit does supervised tuning" in shown


def test_files_of_a_configuration_that_are_not_there_are_told(place, capsys):
    (place / "axolotl.yaml").write_text(
        "base_model: base\ndatasets:\n  - {path: rows.jsonl, type: alpaca}\n  - {path: gone.jsonl, type: alpaca}\n"
        "num_epochs: two\n"
    )
    init("axolotl.yaml", output=place / "recipe.yaml")
    shown = capsys.readouterr().out
    assert "differs    data.train.1.path: there is no file gone.jsonl; put it there" in shown
    assert "data.train.0.path" not in shown
    assert "got the text 'two'\n" in shown
