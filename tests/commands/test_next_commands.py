"""Every command that train, merge and export print, and every one in docs/serving.md, pasted."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftkit.cli import run as command_line
from tests.commands.test_verify import fake_vllm
from tests.tiny_gguf import llama_server, save_convertible
from tests.tiny_runs import write_recipe
from tests.verification.fake_vllm import serving

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]
DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With a space, as a user's directory may have.
    directory = tmp_path_factory.mktemp("next") / "my models"
    save_convertible(directory / "base-llama", context=1024)
    recipe = write_recipe(directory, max_steps=30, eval_steps=15)
    recipe.write_text(recipe.read_text().replace("{name}-{n}", "sst2"))
    return directory


@pytest.fixture
def pasted(directory: Path, monkeypatch, capsys) -> Iterator:
    """Runs a command line as a shell would, in the directory; returns what it printed."""
    monkeypatch.chdir(directory)

    def run(line: str, **servers: str) -> str:
        for address, url in servers.items():
            line = line.replace(f"http://localhost:{address.removeprefix('port')}", url)
        words = shlex.split(line)
        if words[0] == "ftkit":
            code = command_line(words[1:])
            captured = capsys.readouterr()
            assert code == 0, f"{line}: {captured.err}"
            return captured.out
        assert words[:2] == ["python", "-c"], line
        exec(compile(words[2], "pasted", "exec"), {})
        return capsys.readouterr().out

    return run


def commands(printed: str) -> list[str]:
    return [line.strip() for line in printed.splitlines() if re.match("  [a-z]", line)]


def by_tool(lines: list[str], tool: str) -> list[str]:
    return [line for line in lines if line.split()[0] == tool]


def test_everything_that_is_printed_works_as_pasted(directory, pasted) -> None:
    trained = commands(pasted("ftkit train recipe.yaml"))
    label = shlex.quote(str(directory / "runs" / "sst2"))
    assert trained == [f"ftkit eval {label}", f"ftkit merge {label}", f"ftkit export {label} --format adapter"]
    assert "perplexity" in pasted(trained[0])

    merged = commands(pasted(trained[1]))
    assert [line.split()[:2] for line in merged] == [
        ["ftkit", "eval"],
        ["vllm", "serve"],
        ["ftkit", "verify"],
        ["ftkit", "verify"],
        ["python", "-c"],
    ]
    pasted(merged[0])
    assert "verified" in pasted(merged[2])
    assert "generated_text" in pasted(merged[4])
    (serve,) = by_tool(merged, "vllm")
    assert (Path(shlex.split(serve)[2]) / "config.json").is_file()
    with serving(fake_vllm(Path(shlex.split(serve)[2]))) as url:
        assert "verified" in pasted(merged[3], port8000=url)

    exported = commands(pasted(trained[2]))
    assert [line.split()[0] for line in exported] == ["vllm", "ftkit", "ftkit", "python"]
    words = shlex.split(exported[0])
    assert (Path(words[2]) / "config.json").is_file()
    assert (Path(words[words.index("--lora-modules") + 1].removeprefix("tuned=")) / "adapter_config.json").is_file()
    assert "verified" in pasted(exported[1])
    assert "lora_A" in pasted(exported[3])
    shutil.rmtree(directory / "runs" / "sst2" / "export")

    exported = commands(pasted(f"ftkit export {label} --format hf"))
    assert "generated_text" in pasted(by_tool(exported, "python")[0])
    assert "verified" in pasted(by_tool(exported, "ftkit")[1])
    shutil.rmtree(directory / "runs" / "sst2" / "export")


def test_every_command_of_the_docs_works(directory, pasted) -> None:
    if not (directory / "runs" / "sst2").exists():
        pasted("ftkit train recipe.yaml")
    for name in ("merged", "export"):
        shutil.rmtree(directory / "runs" / "sst2" / name, ignore_errors=True)
    pytest.importorskip("xllamacpp")
    lines = re.findall(r"^\$ (ftkit .+|python -c .+)$", DOCS, flags=re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        if "localhost:8080" in line:
            (file,) = (directory / "runs" / "sst2" / "export").glob("*.gguf")
            with llama_server(file) as url:
                assert "verified" in pasted(line, port8080=url)
        elif "localhost:8000" in line:
            with serving(fake := fake_vllm(directory / "runs" / "sst2" / "merged")) as url:
                fake.models[0]["id"] = "tuned"
                assert "verified" in pasted(line, port8000=url)
        else:
            pasted(line)


def test_without_rows_held_back_no_evaluation_is_proposed(directory, pasted) -> None:
    printed = pasted("ftkit train recipe.yaml data.val_size=0 training.max_steps=1 output_dir=runs/none")
    assert [line.split()[1] for line in commands(printed)] == ["merge", "export"]
    assert "eval" not in [line.split()[1] for line in commands(pasted("ftkit merge runs/none"))]
