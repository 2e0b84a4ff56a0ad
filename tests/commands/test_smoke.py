"""`ftkit train RECIPE --smoke`, through the command line: what it checks, and that each seeded fault ends it."""

import errno
import json
import os
import tempfile

import pytest
import torch
import yaml

from ftkit.cli import run as ftkit
from ftkit.data import draws
from ftkit.models.quantization import check_available
from ftkit.smoke import base as smoke_base
from ftkit.smoke import checks
from ftkit.training import build, trackers
from tests.models.fake_hub import COMMIT, serve
from tests.models.test_gguf import write_gguf
from tests.tiny_models import CHATML, save_tiny, tiny_model, tiny_tokenizer
from tests.tiny_multimodal import multimodal_config
from tests.tiny_runs import METHODS, PROMPTS, run_cli, write_recipe, write_rows

CHECKS = [
    "output_dir",
    "base",
    "method",
    "data",
    "train",
    "gradients",
    "evaluation",
    "save",
    "resume",
    "merge",
    "reload",
]
MORE_METHODS = {
    "soft_prompt": {"type": "soft_prompt", "num_virtual_tokens": 5},
    "dora": {"type": "lora", "rank": 4, "alpha": 8, "dora": True, "dropout": 0.1},
}
MERGED = ("lora", "dora")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A recipe whose base is wider than a copy may be and has no weights; temporary files go to `tmp_path/tmp`."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base-llama", hidden_size=96, intermediate_size=192)
    recipe = write_recipe(tmp_path)
    (tmp_path / "base-llama" / "model.safetensors").unlink()
    return recipe


def change(recipe, **sections):
    """Write other sections, or keys of them, into a recipe."""
    values = yaml.safe_load(recipe.read_text())
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) and name != "method" else value
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))


def names_below(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def smoke(recipe, capsys, *arguments, code=0):
    """The JSON line of a smoke run that leaves nothing behind, and what it wrote to standard error."""
    before, cache = names_below(recipe.parent), os.environ["FTKIT_CACHE"]
    capsys.readouterr()
    assert ftkit(["train", str(recipe), "--smoke", *map(str, arguments)]) == code
    output = capsys.readouterr()
    assert names_below(recipe.parent) == before
    assert os.environ["FTKIT_CACHE"] == cache
    return json.loads(output.out.splitlines()[-1]), output.err


def line_of(recipe, text):
    """Number of the line of a recipe that holds a text."""
    return next(number for number, line in enumerate(recipe.read_text().splitlines(), 1) if text in line)


def outcomes(found):
    return {check["name"]: check["outcome"] for check in found["checks"]}


def fails(recipe, capsys, *arguments, code):
    """The check that failed, and the one line that says why."""
    found, err = smoke(recipe, capsys, *arguments, code=code)
    assert (found["status"], found["exit_code"]) == ("failed", code)
    (line,) = err.splitlines()
    assert line == f"ftkit: error: {found['error']}"
    assert "ftkit-smoke-" not in line
    *passed, last = found["checks"]
    assert {check["outcome"] for check in passed} <= {"passed", "none"}
    assert last["outcome"] == "failed"
    return last["name"], found["error"]


@pytest.mark.parametrize("method", [*METHODS, *PROMPTS, *MORE_METHODS])
def test_every_method_goes_all_the_way(method, tiny, capsys):
    change(tiny, method=(METHODS | PROMPTS | MORE_METHODS)[method])
    found, err = smoke(tiny, capsys)
    assert err == ""
    assert [check["name"] for check in found["checks"]] == CHECKS
    expected = dict.fromkeys(CHECKS, "passed") | {"merge": "passed" if method in MERGED else "refused"}
    assert outcomes(found) == expected
    assert found["status"] == "passed"
    assert found["copy"]["layers"] == 1
    assert found["copy"]["hidden_size"] == 64
    # Those of the whole model, which the method was applied to as well.
    assert found["parameters"] >= found["trainable_parameters"] > 0
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert [line["step"] for line in found["evaluations"]] == [0, 1, 2]
    assert found["mixture"][0]["rows_used"] == 6
    assert found["versions"]["torch"] == torch.__version__
    details = {check["name"]: check["detail"] for check in found["checks"]}
    assert details["resume"] == "from step 1 on: the same data, losses and weights, bit for bit"
    assert "equal logits" in details["reload"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_in_few_bits(quantization, tiny, capsys, monkeypatch):
    change(tiny, model={"quantization": quantization})
    found, _ = smoke(tiny, capsys)
    assert outcomes(found)["merge"] == "passed"
    assert found["changed"] == []
    if quantization == "nf4":

        def without_package(wanted, **_):
            with monkeypatch.context() as patch:
                patch.setattr("ftkit.models.quantization.find_spec", lambda name: None)
                check_available(wanted)

        monkeypatch.setattr(smoke_base, "check_available", without_package)
        found, _ = smoke(tiny, capsys)
        (changed,) = found["changed"]
        assert changed.startswith("int8 in place of nf4: ")
        assert "bitsandbytes" in changed


def test_a_base_that_is_stored_in_few_bits_is_taken_for_one_that_is_quantized(tiny, capsys):
    config = tiny.parent / "base-llama" / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": stored}))
    found, _ = smoke(tiny, capsys)
    merge = next(check for check in found["checks"] if check["name"] == "merge")
    assert merge["outcome"] == "refused"
    assert "stored in nf4" in merge["detail"]


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen3_5"])
def test_a_multimodal_base(kind, tiny, capsys):
    multimodal_config(kind).save_pretrained(tiny.parent / "multimodal")
    tiny_tokenizer().save_pretrained(tiny.parent / "multimodal")
    found, _ = smoke(tiny, capsys, "--smoke-model", "multimodal")
    assert found["architecture"] == kind
    assert outcomes(found)["merge"] == "passed"


def test_weights_are_never_read(tiny, capsys):
    (tiny.parent / "base-llama" / "model.safetensors").write_text("no weights")
    assert smoke(tiny, capsys)[0]["status"] == "passed"


def test_a_gguf_base_gives_configuration_and_tokenizer(tiny, capsys, monkeypatch):
    write_gguf(tiny.parent / "base.gguf", tiny_model(hidden_size=96, intermediate_size=192, tie_word_embeddings=True))
    monkeypatch.setattr("ftkit.models.load.convert_gguf", lambda *_, **__: pytest.fail("the weights were converted"))
    template = tiny.parent / "chatml.jinja"
    template.write_text(CHATML)
    found, _ = smoke(tiny, capsys, f"base_model={tiny.parent / 'base.gguf'}", f"model.chat_template={template}")
    assert found["base_model"].endswith("base.gguf")
    assert found["copy"]["hidden_size"] == 64
    assert found["status"] == "passed"


def test_smoke_model_takes_the_place_of_a_hub_id(tiny, capsys):
    name, error = fails(tiny, capsys, "base_model=org/good", code=2)
    assert (name, "the network is off" in error) == ("base", True)
    found, _ = smoke(tiny, capsys, "base_model=org/good", "model.revision=main", "--smoke-model", "base-llama")
    assert (found["status"], found["base_model"]) == ("passed", "org/good")
    name, error = fails(tiny, capsys, "--smoke-model", "nowhere", code=2)
    assert (name, error) == ("base", "no such directory: nowhere; name one with config.json and tokenizer.json")


@pytest.mark.slow
def test_of_a_hub_model_only_configuration_and_tokenizer_are_fetched(tmp_path):
    recipe = write_recipe(tmp_path)
    with serve(tmp_path / "base-llama") as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        result = run_cli("train", recipe, "--smoke", "base_model=org/good", cwd=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        assert any(path.endswith("tokenizer.json") for path in hub.paths)
        assert not [path for path in hub.paths if "safetensors" in path]
    # What a job's cache has kept is enough for the next one, without any network.
    again = run_cli(
        "train", recipe, "--smoke", "--offline", "base_model=org/good", cwd=tmp_path, HF_HOME=str(tmp_path / "cache")
    )
    assert again.returncode == 0, again.stderr
    assert COMMIT not in again.stderr


def test_a_mixture_with_validation_data_of_its_own(tiny, capsys):
    directory = tiny.parent
    reviews = [{"text": f"review {n}", "label": n % 2} for n in range(30)]
    (directory / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    write_rows(directory / "eval.jsonl", 20, seed=1)
    train = [
        {"path": "rows.jsonl", "repeat": 1},
        {"path": "reviews.jsonl", "templates": "sst2", "columns": {"sentence": "text"}, "few_shot": 0.5},
    ]
    change(tiny, data={"train": train, "eval": [{"path": "eval.jsonl"}], "mixing": {"strategy": "proportional"}})
    found, _ = smoke(tiny, capsys)
    assert [counts["name"] for counts in found["mixture"]] == ["rows", "reviews"]
    assert all(counts["rows_used"] <= 8 for counts in found["mixture"])
    assert set(found["evaluations"][0]) >= {"eval_loss", "eval_loss_eval"}
    change(tiny, data={"eval": [], "val_size": 0})
    found, _ = smoke(tiny, capsys)
    assert outcomes(found)["evaluation"] == "none"


def test_no_more_than_the_first_rows_are_read(tiny, capsys):
    write_rows(tiny.parent / "rows.jsonl", 1200)
    with (tiny.parent / "rows.jsonl").open("a") as file:
        file.write("no row\n")
    assert smoke(tiny, capsys)[0]["mixture"][0]["rows"] == 1000


def test_what_a_section_says_of_layers_that_the_copy_lacks(tiny, capsys):
    """Layers by number, more ranks and layers than there are: right for the whole model, fitted to the copy."""
    pattern = r".*layers\.1\.self_attn\.[qv]_proj"
    change(
        tiny,
        method={"type": "lora", "rank": 48, "init": "pissa", "targets": pattern, "rank_pattern": {"layers.1.*": 8}},
    )
    found, _ = smoke(tiny, capsys)
    assert found["changed"] == [
        f"method.targets: [q_proj, v_proj] in place of {pattern}",
        "method.rank_pattern: {} in place of {'layers.1.*': 8}",
        "method.rank: 32 in place of 48",
    ]
    change(tiny, method={"type": "llama_adapter"})
    assert smoke(tiny, capsys, "base_model=base-llama")[1] == ""


# ------------------------------------------------------------------------------------------------- seeded faults


def test_fault_a_mask_without_a_target(tiny, capsys):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", "train": False}]
    (tiny.parent / "rows.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 12)
    name, error = fails(tiny, capsys, code=2)
    assert name == "data"
    assert "no token to train on" in error


def test_fault_targets_that_match_nothing(tiny, capsys):
    change(tiny, method={"type": "lora", "targets": ["q_porj"]})
    name, error = fails(tiny, capsys, code=2)
    assert name == "method"
    assert error.startswith(f"{tiny}:")
    assert "method.targets: q_porj matches no linear layer of the decoder blocks" in error
    assert "did you mean q_proj?" in error


def test_fault_a_row_that_is_not_a_number(tiny, capsys):
    """As pandas writes a missing text."""
    rows = (tiny.parent / "rows.jsonl").read_text().splitlines()
    rows[5] = '{"instruction": "Say abc.", "input": "", "output": NaN}'
    (tiny.parent / "rows.jsonl").write_text("\n".join(rows) + "\n")
    name, error = fails(tiny, capsys, code=2)
    assert name == "data"
    assert error.startswith("rows.jsonl:6: ")


def test_fault_a_loss_that_is_not_a_number(tiny, capsys, monkeypatch):
    """A row that the model makes no number of: its first token's embedding is none."""
    load = build.load_weights

    def damaged(*arguments, **keywords):
        model = load(*arguments, **keywords)
        model.get_input_embeddings().weight.data[tiny_tokenizer().convert_tokens_to_ids("S")] = float("nan")
        return model

    monkeypatch.setattr(build, "load_weights", damaged)
    change(tiny, data={"val_size": 0})
    name, error = fails(tiny, capsys, code=3)
    assert name == "train"
    assert "the loss of step 1 is not finite (rows rows:" in error


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}{{ m.content", "template"),
        ("{% for m in messages %}{{ m['role'] }}\n{% endfor %}", "template"),
        (CHATML.replace("m['content']", "m['content'].no_such_thing.here"), "template"),
    ],
    ids=["broken", "without answers", "cannot render"],
)
def test_fault_a_wrong_template(template, what, tiny, capsys):
    (tiny.parent / "wrong.jinja").write_text(template)
    change(tiny, model={"chat_template": "wrong.jinja"})
    name, error = fails(tiny, capsys, code=2)
    assert name == "data"
    assert what in error


def test_fault_an_output_that_cannot_be_written(tiny, capsys):
    (tiny.parent / "taken").write_text("a file")
    name, error = fails(tiny, capsys, "output_dir=taken/run", code=2)
    assert (name, error) == (
        "output_dir",
        f"command line: output_dir: {tiny.parent}/taken is a file; choose another output_dir",
    )
    name, error = fails(tiny, capsys, "output_dir=/proc/runs/{name}-{n}", code=5)
    assert name == "output_dir"
    assert error.startswith("command line: output_dir: cannot write to /proc/runs: ")


def test_fault_a_resume_that_reshuffles(tiny, capsys, monkeypatch):
    deal, calls = draws._deal_steps, []

    def reshuffling(*arguments):
        """The third plan of the run, the resume's, deals what follows the first step in another order."""
        steps, passed = deal(*arguments)
        calls.append(steps)
        if len(calls) == 3:
            first = steps.bounds[1]
            steps.order[first:] = steps.order[first:][::-1].copy()
        return steps, passed

    monkeypatch.setattr(draws, "_deal_steps", reshuffling)
    name, error = fails(tiny, capsys, code=6)
    assert len(calls) == 3
    assert name == "resume"
    assert error.startswith("after the resume step 2 trained on other data than in the run without interruption; ")


def test_fault_a_resume_that_forgets_the_optimizer(tiny, capsys, monkeypatch):
    monkeypatch.setattr(build, "load_optimizer", lambda *_: None)
    name, error = fails(tiny, capsys, code=6)
    assert name == "resume"
    assert "without interruption" in error


def test_fault_a_tensor_without_a_gradient(tiny, capsys, monkeypatch):
    apply_method = build.apply_method

    def with_another(model, prepared):
        apply_method(model, prepared)
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))

    monkeypatch.setattr(build, "apply_method", with_another)
    name, error = fails(tiny, capsys, code=6)
    assert name == "gradients"
    assert error.startswith("1 of 15 trained tensors get no gradient: unused; ")


def test_fault_a_result_that_is_not_what_trained(tiny, capsys, monkeypatch):
    load = checks.load_contestants

    def disturbed(*arguments, **keywords):
        (contestant,) = load(*arguments, **keywords)
        with torch.no_grad():
            next(p for name, p in contestant.model.named_parameters() if "lora_B" in name).add_(1e-3)
        return [contestant]

    monkeypatch.setattr(checks, "load_contestants", disturbed)
    name, error = fails(tiny, capsys, code=6)
    assert name == "reload"
    assert error.startswith("the result, loaded again, gives other logits than the trained model (off by ")


def test_fault_a_merge_that_is_not_refused(tiny, capsys, monkeypatch):
    monkeypatch.setattr("ftkit.methods.lora.merge_refusal", "cannot be merged, says this test")
    name, error = fails(tiny, capsys, code=6)
    assert (name, error) == (
        "merge",
        f"{tiny}:{line_of(tiny, 'type: lora')}: method.type: a merge of lora was not refused",
    )


def test_fault_a_tokenizer_of_another_model(tiny, capsys):
    config = tiny.parent / "base-llama" / "config.json"
    special = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 257, **special}))
    name, error = fails(tiny, capsys, code=2)
    assert name == "data"
    assert "has the id 258, and the base has embeddings for 257 tokens" in error


def test_a_bug_has_its_line_too(tiny, capsys, monkeypatch):
    monkeypatch.setattr("ftkit.smoke.checks.read_finished", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ftkit(["train", str(tiny), "--smoke"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["status"], found["exit_code"]) == ("failed", None)
    assert found["error"] == "ZeroDivisionError: division by zero"
    assert names_below(tiny.parent / "tmp") == []


# ------------------------------------------------------------------------------------------------- the command line


def test_it_goes_alone(tiny, capsys, monkeypatch):
    own = "ftkit: error: --smoke is a whole run of its own, in one process and a temporary directory"
    assert ftkit(["train", str(tiny), "--smoke", "--resume", "--num-processes", "2"]) == 2
    assert capsys.readouterr().err == f"{own}; leave out --resume, --num-processes\n"
    assert ftkit(["train", str(tiny), "--smoke-model", "base-llama"]) == 2
    assert capsys.readouterr().err == "ftkit: error: --smoke-model says what --smoke is tried on; add --smoke\n"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ftkit(["train", str(tiny), "--smoke"]) == 2
    assert capsys.readouterr().err == f"{own}; start it without a launcher\n"


def test_a_job_of_github_actions(tiny, capsys, monkeypatch):
    """Tables in the summary, and what is wrong at its line; the JSON line stays the last one."""
    summary = tiny.parent.parent / f"{tiny.parent.name}.md"
    for name, value in {"ACTIONS": "true", "WORKSPACE": str(tiny.parent), "STEP_SUMMARY": str(summary)}.items():
        monkeypatch.setenv(f"GITHUB_{name}", value)
    smoke(tiny, capsys)
    text = summary.read_text()
    assert "**mixture**\n\n| data set | rows | used |" in text
    assert "**smoke**\n\n| check | outcome | seconds |  |\n| - | - | - | - |\n| output_dir | passed |" in text
    change(tiny, method={"type": "lora", "targets": ["q_porj"]})
    capsys.readouterr()
    assert ftkit(["train", str(tiny), "--smoke"]) == 2
    output = capsys.readouterr()
    last = output.out.splitlines()[-1]
    error, annotation = output.err.splitlines()
    assert annotation.startswith(f"::error file=recipe.yaml,line={line_of(tiny, 'targets')},title=ftkit::")
    assert json.loads(last)["error"] == error.removeprefix("ftkit: error: ")
    assert "| method | failed |" in summary.read_text()


def test_a_recipe_that_cannot_be_read_ends_in_the_json_line_too(tiny, capsys):
    values, error = smoke(tiny, capsys, "training.lerning=1", code=2)
    assert values["status"] == "failed"
    assert values["exit_code"] == 2
    assert "did you mean learning_rate?" in error


def test_a_failure_of_the_machine_has_its_exit_code_in_the_json_line(tiny, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(checks, "check_saved", full)
    values, _ = smoke(tiny, capsys, code=5)
    assert values["exit_code"] == 5


def test_trackers_are_for_real_runs(tiny, capsys, monkeypatch):
    change(tiny, training={"report_to": ["wandb"]})
    monkeypatch.setattr(trackers, "tracking", forbidden_trackers(trackers.tracking))
    smoke(tiny, capsys)


def forbidden_trackers(original):
    def tracking(metrics, section, *arguments, **options):
        assert section.report_to == ()
        return original(metrics, section, *arguments, **options)

    return tracking
