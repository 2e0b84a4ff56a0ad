"""`ftkit verify`: exported files, a real llama.cpp server, one with vLLM's interface; right ones and wrong ones."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftkit.cli import run as command_line
from ftkit.commands.export import export
from ftkit.commands.merge import merge
from ftkit.commands.train import train
from ftkit.commands.verify import verify
from ftkit.errors import CheckFailedError, UserError
from tests.tiny_gguf import END, llama_server, save_convertible
from tests.tiny_models import CHATML
from tests.tiny_runs import write_recipe
from tests.verification.fake_vllm import FakeVllm, serving

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify")
    save_convertible(directory / "base-llama", context=1024)
    return directory


@pytest.fixture(scope="module")
def run(directory: Path) -> Path:
    """A finished LoRA run of a model that llama.cpp reads."""
    # Answers of two characters and the end, so that the model learns to end them.
    train(write_recipe(directory, max_steps=30, eval_steps=15), [])
    return directory / "runs" / "recipe-1"


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    merge([str(run)])
    return run / "merged"


@pytest.fixture(scope="module")
def exported(run: Path, merged: Path) -> Path:
    export(str(run), format="gguf")
    (file,) = (run / "export").iterdir()
    return file


@pytest.fixture(scope="module")
def llama_cpp(exported: Path) -> Iterator[str]:
    pytest.importorskip("xllamacpp")
    with llama_server(exported) as url:
        yield url


def fake_vllm(directory: Path, **options) -> FakeVllm:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return FakeVllm(model, tokenizer, (tokenizer.convert_tokens_to_ids(END),), **options)


def verify_or_fail(target, *, json: bool = False, **options) -> str:
    """The error's text, or nothing."""
    try:
        verify(str(target), json=json, **options)
    except CheckFailedError as error:
        return str(error)
    return ""


# --- files


def test_what_was_merged_and_exported_is_what_was_trained(run, exported, capsys) -> None:
    verify(str(run))
    printed = capsys.readouterr().out
    first, rest = printed.split("\n", 1)
    assert first == f"comparing  {run} with {run / 'adapter'}, {run / 'merged'}, {exported}"
    tables = rest.split("\n\n")
    assert [table.split("\n")[0].split(": ") for table in tables[:3]] == [
        [str(run / "adapter"), "tokenizer and template"],
        [str(run / "merged"), "model directory"],
        [str(exported), ".gguf file in bfloat16, read by transformers"],
    ]
    assert tables[0].count("equal   -") == tables[1].count("equal   equal,") == tables[2].count("equal   equal,") == 10
    assert "\nend        <|im_end|> ends an answer" in tables[1]
    assert printed.endswith(f"\nverified   {run}\n")


def test_the_files_of_a_run_that_was_not_merged_have_no_answers(run, exported, directory, capsys) -> None:
    alone = directory / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("merged*", "export*"))
    verify(str(alone))
    assert "note: no answers were compared: ftkit merge or export makes a model" in capsys.readouterr().out


def test_another_template_in_the_merged_directory(run, merged, directory) -> None:
    wrong = directory / "template"
    shutil.copytree(merged, wrong)
    (wrong / "chat_template.jinja").write_text(CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"))
    failure = verify_or_fail(run, exported=[wrong])
    assert failure.startswith(f"{wrong} is not what was trained: 2 of 10 prompts differ (spaces at the ends: token ")
    assert "; make it anew with --overwrite" in failure


def test_the_bases_weights_in_the_place_of_the_merged_ones(run, merged, directory, capsys) -> None:
    wrong = directory / "weights"
    shutil.copytree(merged, wrong)
    shutil.copyfile(directory / "base-llama" / "model.safetensors", wrong / "model.safetensors")
    failure = verify_or_fail(run, exported=[wrong])
    assert re.match(rf"{wrong} is not what was trained: \d+ of 10 answers differ \(one question: token ", failure)
    assert "the trained model has " in failure
    assert "prompts differ" not in failure
    capsys.readouterr()


def test_a_generation_config_that_does_not_stop(run, merged, directory) -> None:
    wrong = directory / "stops"
    shutil.copytree(merged, wrong)
    (wrong / "generation_config.json").write_text('{"eos_token_id": 2}')
    failure = verify_or_fail(run, exported=[wrong])
    assert "answers differ (one question: goes on after <|im_end|>" in failure
    assert "answers go on after <|im_end|>" in failure


def test_what_is_named_inside_a_run_is_compared_with_the_run(run, merged, directory, capsys) -> None:
    """Not with itself: a merge of other weights would be equal."""
    moved = directory / "moved"
    shutil.copytree(run, moved)
    shutil.copyfile(directory / "base-llama" / "model.safetensors", moved / "merged" / "model.safetensors")
    assert re.search(r"merged is not what was trained: \d+ of 10 answers differ", verify_or_fail(moved / "merged"))
    capsys.readouterr()


def test_a_checkpoint_is_not_compared_with_what_was_made_of_the_result(run, merged, capsys) -> None:
    verify(str(run / "checkpoints" / "step-00000015"))
    printed = capsys.readouterr().out
    assert printed.count("tokenizer and template") == 1
    assert str(merged) not in printed


def test_a_prompt_beside_an_adapter_is_refused(run, directory) -> None:
    beside = directory / "beside"
    shutil.copytree(run, beside)
    shutil.copytree(run / "adapter", beside / "prompt")
    with pytest.raises(UserError, match=rf"another model by itself; verify {beside}"):
        verify(str(beside / "prompt"))


# --- llama.cpp


def test_llama_cpp_serves_what_was_trained(run, llama_cpp, capsys) -> None:
    verify(str(run), endpoint=f"{llama_cpp}/v1")
    printed = capsys.readouterr().out
    beginning = f"comparing  {run} with {llama_cpp}\n{llama_cpp}: llama.cpp with recipe-1-bf16.gguf (BF16)\n"
    assert printed.startswith(beginning)
    assert printed.count("equal   equal, ") == 10
    assert "end        <|im_end|> ends an answer" in printed


def test_llama_cpp_with_another_template(run, exported, capsys) -> None:
    pytest.importorskip("xllamacpp")
    with llama_server(exported, chat_template=CHATML.replace("assistant\n", "assistant: ")) as url:
        assert command_line(["verify", str(run), "--endpoint", url]) == 6
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"ftkit: error: {url} is not what was trained: 10 of 10 prompts differ (one question: token 48 is ':' where "
        "training has '\\n'); serve what"
    )
    assert "and 7 prompts more" in captured.out


def test_llama_cpp_with_weights_of_the_base(run, exported, directory, capsys) -> None:
    pytest.importorskip("xllamacpp")
    shutil.copyfile(exported, directory / "base.gguf")
    weights = load_file(directory / "base-llama" / "model.safetensors")
    # All but those that the converter writes in another order.
    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
    names |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    stored = {tensor.name: tensor for tensor in GGUFReader(directory / "base.gguf", "r+").tensors}
    for layer in range(2):
        for module, name in names.items():
            weight = weights[f"model.layers.{layer}.{module}.weight"]
            stored[f"blk.{layer}.{name}.weight"].data[:] = weight.view(torch.uint8).numpy()
    with llama_server(directory / "base.gguf") as url:
        assert command_line(["verify", str(run), "--endpoint", url]) == 6
    captured = capsys.readouterr()
    assert re.search(rf"{url} is not what was trained: \d+ of 10 answers differ \(one question: token ", captured.err)
    assert "prompts differ" not in captured.err
    assert captured.out.count(", answer: token ") == 10


# --- vLLM's interface


def test_a_server_like_vllm(run, merged, capsys) -> None:
    with serving(fake := fake_vllm(merged)) as url:
        verify(str(run), endpoint=url)
    printed = capsys.readouterr().out
    assert f"\n{url}: vllm server with tiny\n" in printed
    assert printed.count("equal   equal, ") == 10
    asked = [body for path, body, _ in fake.requests if path == "/v1/chat/completions"]
    assert len(asked) == 11
    assert asked[-1]["logit_bias"] == {"264": 100.0}


def test_a_server_that_tells_no_ids_is_read_by_its_text(run, merged) -> None:
    with serving(fake_vllm(merged, has_ids=False)) as url:
        assert verify_or_fail(run, endpoint=url) == ""
    with serving(fake_vllm(run.parent.parent / "base-llama", has_ids=False)) as url:
        assert re.search(r"\d+ of 10 answers differ", verify_or_fail(run, endpoint=url))


def test_a_server_that_runs_on(run, merged) -> None:
    fake = fake_vllm(merged)
    fake.ends = (2,)
    with serving(fake) as url:
        failure = verify_or_fail(run, endpoint=url)
    assert "goes on after <|im_end|>" in failure
    assert failure.count("answers go on after <|im_end|>") == 1


def test_a_server_that_ignores_the_bias_leaves_the_end_open(run, merged, capsys) -> None:
    fake = fake_vllm(merged, has_bias=False)
    fake.ends = (2,)
    with serving(fake) as url:
        verify_or_fail(run, endpoint=url)
    assert "end        <|im_end|> may end an answer; not found out" in capsys.readouterr().out


def test_of_several_models_the_adapter_is_asked(run, merged, directory) -> None:
    fake = fake_vllm(merged)
    base, entry = {**fake.models[0], "id": "base"}, {**fake.models[0], "id": "tuned", "parent": "base"}
    fake.models = [base, entry]
    with serving(fake) as url:
        assert verify_or_fail(run, endpoint=url) == ""
    assert {body["model"] for _, body, _ in fake.requests if body} == {"tuned"}
    fake.models = [base, {**entry, "root": str(directory)}, {**entry, "id": "mine", "root": str(run / "adapter")}]
    fake.requests.clear()
    with serving(fake) as url:
        assert verify_or_fail(run, endpoint=url) == ""
        assert {body["model"] for _, body, _ in fake.requests if body} == {"mine"}
        fake.models[2]["root"] = "elsewhere"
        with pytest.raises(UserError, match=r"serves several models; name one with --model: base, tuned, mine"):
            verify(str(run), endpoint=url)
        assert verify_or_fail(run, endpoint=url, model="base") == ""
        with pytest.raises(UserError, match="serves no model x; name one with --model"):
            verify(str(run), endpoint=url, model="x")


def test_a_server_that_refuses_a_conversation_and_one_that_counts_otherwise(run, merged, capsys) -> None:
    fake = fake_vllm(merged)
    post = fake.post

    def refuse(path, body):
        if path == "/tokenize" and body["messages"][0]["role"] == "system":
            return 400, {"error": {"message": "no system messages"}}
        status, values = post(path, body)
        if path == "/v1/chat/completions" and "capital" in body["messages"][0]["content"]:
            values["usage"]["prompt_tokens"] += 1
        return status, values

    fake.post = refuse
    with serving(fake) as url:
        failure = verify_or_fail(run, endpoint=url)
    assert "1 of 10 prompts differ" in failure
    assert "refuses (400 no system messages)" in failure
    assert "it feeds 50 tokens of 'one question' where it tokenizes another number" in failure
    assert "ANOTHER NUMBER FED" in capsys.readouterr().out


def test_servers_that_ftkit_does_not_know(run, merged) -> None:
    message = r"has no tokenizer endpoint .* llama\.cpp's llama-server and vLLM"
    with serving(fake_vllm(merged, has_tokenizer=False)) as url, pytest.raises(UserError, match=message):
        verify(str(run), endpoint=url)
    fake = fake_vllm(merged)
    fake.get = lambda path: (404, {})
    with serving(fake) as url, pytest.raises(UserError, match="no server that ftkit knows: it has neither /props nor"):
        verify(str(run), endpoint=url)


# --- options


def test_json_has_the_tokens_of_both(run, merged, capsys) -> None:
    fake = fake_vllm(merged)
    fake.tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    with serving(fake) as url:
        assert "2 of 10 prompts differ" in verify_or_fail(run, endpoint=url, json=True)
    values = json.loads(capsys.readouterr().out)
    (compared,) = values["compared"]
    assert (values["target"], values["verified"], compared["verified"]) == (str(run), False, False)
    assert compared["stops"] == {"<|im_end|>": True}
    conversations = {one["name"]: one for one in compared["conversations"]}
    wrong, right = conversations["empty lines first"], conversations["one question"]
    at = wrong["prompt"]["differs_at"]
    assert wrong["prompt"]["trained_ids"][:at] == wrong["prompt"]["found_ids"][:at]
    assert wrong["prompt"]["trained_ids"][at] != wrong["prompt"]["found_ids"][at]
    assert wrong["answer"] is None
    assert (right["prompt"]["equal"], right["answer"]["equal"], right["answer"]["stopped"]) == (True, True, True)
    assert right["answer"]["ids"][-1] == 264


def test_options_that_do_not_go_together(run) -> None:
    with pytest.raises(UserError, match="say which server with --endpoint URL"):
        verify(str(run), model="x")
    with pytest.raises(UserError, match="verify one after the other"):
        verify(str(run), endpoint="http://x", exported=[Path("x")])
    with pytest.raises(UserError, match="no such file; name what `ftkit export` has written"):
        verify(str(run), exported=[Path("x.gguf")])
    with pytest.raises(UserError, match="neither a model nor an adapter here"):
        verify(str(run), exported=[run])


def test_what_the_run_sent_besides_is_told(directory, capsys) -> None:
    """A system prompt of the recipe and keywords of the template: a server knows neither by itself."""
    own = directory / "keywords"
    shade = "{% if shade %}{{ shade }}{% endif %}" + CHATML
    save_convertible(own / "base-llama", context=1024, chat_template=shade)
    overrides = ["data.system_prompt=Be brief.", "data.chat_template_kwargs={shade: blue}"]
    train(write_recipe(own, max_steps=2, eval_steps=1), overrides)
    merge([str(own / "runs" / "recipe-1")])
    capsys.readouterr()
    with serving(fake_vllm(own / "runs" / "recipe-1" / "merged")) as url:
        verify(str(own / "runs" / "recipe-1"), endpoint=url)
    printed = capsys.readouterr().out
    assert "note: it feeds other tokens unless requests have chat_template_kwargs: {'shade': 'blue'}" in printed
    assert "note: the run was trained with data.system_prompt, which no template holds: clients must send it" in printed
