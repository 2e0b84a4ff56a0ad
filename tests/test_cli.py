"""The command line: what each verb passes on, and the one line that every failure is."""

import errno
import importlib
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ftkit.cli import run
from ftkit.errors import CheckFailedError, Interrupted, NetworkError, Problem, UserError
from ftkit.failures import LATER_OPTIONS, LATER_VERBS

VERBS = ("init", "train", "plan", "merge", "eval", "export", "verify", "inspect", "diff", "doctor", "schema")


def ftkit(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "ftkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """What the verbs' functions were called with, in place of running them; the calls must fit their signatures."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def record(verb: str, signature: inspect.Signature) -> Any:
        def called(*positional: Any, **keywords: Any) -> None:
            assert signature.bind(*positional, **keywords).arguments.keys() == signature.parameters.keys()
            seen.append((verb, positional, keywords))

        return called

    for verb in VERBS[:-1]:
        module = importlib.import_module(f"ftkit.commands.{verb}")
        function = "evaluate" if verb == "eval" else verb
        monkeypatch.setattr(module, function, record(verb, inspect.signature(module.__dict__[function])))
    return seen


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line of a command line that the user got wrong."""
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("ftkit: error: ")
    return line.removeprefix("ftkit: error: ")


def test_train_passes_everything_on(calls: list[Any]) -> None:
    assert run(["train", "r.yaml"]) == 0
    arguments = ["train", "--resume", "r.yaml", "seed=1", "--from", "ckpt", "lr=-1", "--overwrite", "--dry-run"]
    arguments += ["--offline", "--num-processes", "2", "--launch-config", "l.yaml", "--trust-remote-code"]
    assert run(arguments) == 0
    nothing = {
        "resume": False,
        "checkpoint": None,
        "overwrite": False,
        "dry_run": False,
        "offline": False,
        "num_processes": None,
        "launch_config": None,
        "trust_remote_code": False,
    }
    everything = dict.fromkeys(nothing, True) | {
        "checkpoint": Path("ckpt"),
        "num_processes": 2,
        "launch_config": Path("l.yaml"),
    }
    assert calls == [
        ("train", (Path("r.yaml"), []), nothing),
        ("train", (Path("r.yaml"), ["seed=1", "lr=-1"]), everything),
    ]


def test_smoke_is_a_command_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("ftkit.commands.smoke")
    signature, seen = inspect.signature(module.smoke), []
    monkeypatch.setattr(module, "smoke", lambda *given, **named: seen.append(signature.bind(*given, **named).arguments))
    assert run(["train", "r.yaml", "seed=1", "--smoke", "--smoke-model", "m", "--offline", "--trust-remote-code"]) == 0
    assert run(["train", "r.yaml", "--smoke", "--from", "c", "--num-processes", "1"]) == 0
    assert run(["train", "r.yaml", "--smoke-model", "m"]) == 0
    named = ["--resume", "--from", "--overwrite", "--dry-run", "--num-processes", "--launch-config", "--smoke"]
    nothing = dict.fromkeys(named, False) | dict.fromkeys(["--from", "--num-processes", "--launch-config"])
    both = {"offline": True, "trust_remote_code": True}
    neither = {"offline": False, "trust_remote_code": False}
    assert seen == [
        {"recipe": Path("r.yaml"), "overrides": ["seed=1"], "model": Path("m"), "others": nothing, **both},
        {"recipe": Path("r.yaml"), "overrides": [], "model": None, **neither}
        | {"others": nothing | {"--from": Path("c"), "--num-processes": 1}},
        {"recipe": Path("r.yaml"), "overrides": [], "model": Path("m"), **neither}
        | {"others": nothing | {"--smoke": True}},
    ]


def test_the_other_verbs_pass_everything_on(calls: list[Any]) -> None:
    common = ["--offline", "--trust-remote-code"]
    place = ["--memory", "24GB", "--num-processes", "2"]
    assert run(["plan", "r.yaml", "a=b", "--model-only", *place, "--json", *common]) == 0
    merge = ["merge", "A:-1", "B", "--base", "M", "--output", "o", "--dtype", "bfloat16", "--proof", "modules"]
    assert run([*merge, "--overwrite", "--onto-stored", *common]) == 0
    evaluate = ["eval", "T", "--suite", "s", "--compare", "a", "--compare", "b", "--no-compare", "--limit", "3"]
    assert run([*evaluate, "--output", "o.json", *common]) == 0
    export = ["export", "T", "--format", "hf", "--output", "o", "--dtype", "float16", "--overwrite"]
    assert run([*export, *common]) == 0
    inspection = ["inspect", "A", "B", "--base", "M", "--left", "--modules", "q", "--modules", "k", "--json"]
    assert run([*inspection, "--output", "o.svg", "--overwrite", *common]) == 0
    assert run(["init", "D", "--model", "m", "--method", "full", "-o", "r.yaml", "--overwrite", *common]) == 0
    assert calls.pop() == (
        "init",
        ("D",),
        {"model": "m", "method": "full", "output": Path("r.yaml"), "overwrite": True}
        | {"offline": True, "trust_remote_code": True},
    )
    verification = ["verify", "R", "--endpoint", "http://h", "--model", "m", "--exported", "a", "--exported", "b"]
    assert run([*verification, "--timeout", "3", "--json", *common]) == 0
    assert calls.pop() == (
        "verify",
        ("R",),
        {"endpoint": "http://h", "model": "m", "exported": [Path("a"), Path("b")], "timeout": 3.0, "json": True}
        | {"offline": True, "trust_remote_code": True},
    )
    assert run(["doctor", "--json", "--offline"]) == 0
    assert calls.pop() == ("doctor", (), {"json": True, "offline": True})
    assert run(["diff", "A", "B", "--tolerance", "0.5", "--ignore", "data", "--ignore", "loss", "--json"]) == 0
    on = {"offline": True, "trust_remote_code": True}
    assert calls.pop() == (
        "diff",
        (Path("A"), Path("B")),
        {"tolerance": 0.5, "ignore": ["data", "loss"], "json": True},
    )
    assert calls == [
        (
            "plan",
            (Path("r.yaml"), ["a=b"]),
            {"model_only": True, "memory": "24GB", "num_processes": 2, "json": True, **on},
        ),
        (
            "merge",
            (["A:-1", "B"],),
            {"base": "M", "output": Path("o"), "dtype": "bfloat16", "proof": "modules", "overwrite": True}
            | {"onto_stored": True, **on},
        ),
        (
            "eval",
            ("T",),
            {
                "suite": Path("s"),
                "compare": ["a", "b"],
                "no_compare": True,
                "limit": 3,
                "output": Path("o.json"),
                **on,
            },
        ),
        ("export", ("T",), {"format": "hf", "output": Path("o"), "dtype": "float16", "overwrite": True, **on}),
        (
            "inspect",
            ("A", "B"),
            {
                "base": "M",
                "left": True,
                "modules": ["q", "k"],
                "json": True,
                "output": Path("o.svg"),
                "overwrite": True,
                **on,
            },
        ),
    ]


WRONG = {
    ("trian", "r.yaml"): "there is no verb trian; did you mean train?",
    ("zzz",): "there is no verb zzz; choose one of train, init, plan, preview, merge, eval, export, verify, inspect,"
    " diff, doctor, schema",
    ("train",): "missing argument RECIPE; see ftkit train --help",
    ("train", "r.yaml", "--resum"): "there is no option --resum; did you mean --resume?",
    ("train", "r.yaml", "--zzzz"): "there is no option --zzzz; see ftkit train --help",
    ("train", "r.yaml", "-x"): "there is no option -x; see ftkit train --help",
    ("--verison",): "there is no option --verison; did you mean --version?",
    ("train", "r.yaml", "--from"): "option --from requires an argument; see ftkit train --help",
    ("train", "r.yaml", "--num-processes", "0"): "invalid value for --num-processes: expected a number of at least 1;"
    " see ftkit train --help",
    ("eval", "T", "--limit", "many"): "invalid value for --limit: expected a whole number; see ftkit eval --help",
    ("schema", "x"): "too many arguments: (x); see ftkit schema --help",
    ("export", "T"): "missing option --format; see ftkit export --help",
    ("train", "nope.yaml"): "nope.yaml: no such file; check the path",
}


@pytest.mark.parametrize(("arguments", "line"), WRONG.items(), ids=" ".join)
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str) -> None:
    assert fails(capsys, *arguments) == line


@pytest.mark.parametrize("verb", LATER_VERBS)
def test_later_verbs(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert fails(capsys, verb, "x") == f"the verb {verb} is not in this version; {LATER_VERBS[verb]}"


@pytest.mark.parametrize("option", LATER_OPTIONS)
def test_later_options(capsys: pytest.CaptureFixture[str], option: str) -> None:
    line = f"the option {option} is not in this version; {LATER_OPTIONS[option]}"
    assert fails(capsys, "merge", "x", option) == line
    assert fails(capsys, "merge", "x", f"{option}=full") == line


def test_the_problems_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "base_model: a\ndata:\n  train: [{path: b}]\nmethod: {type: lora}\nlerning_rate: 1\n"
    )
    result = ftkit("train", "x.yaml", "traning.lr=1", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "ftkit: error: x.yaml:5: lerning_rate: unknown key; did you mean training.learning_rate?",
        "ftkit: error: command line: traning.lr: unknown key; did you mean training.learning_rate?",
    ]


def _raise(error: BaseException) -> Any:
    def command(*_: Any, **__: Any) -> None:
        raise error

    return command


FAILURES: dict[str, tuple[BaseException, int, list[str]]] = {
    "two problems": (UserError.of([Problem("a"), Problem("b", "mend it")]), 2, ["a", "b; mend it"]),
    "check": (CheckFailedError("the proof failed"), 6, ["the proof failed"]),
    "network": (NetworkError("no answer", how="try again", where="hub"), 7, ["hub: no answer; try again"]),
    "terminated": (Interrupted("stopped", signal_number=signal.SIGTERM), 143, ["stopped"]),
    "Ctrl-C": (KeyboardInterrupt(), 130, ["interrupted"]),
    "disk full": (
        OSError(errno.ENOSPC, "No space left on device", "a/b"),
        5,
        ["a/b: no space left on device; free some space"],
    ),
    "denied": (
        PermissionError(errno.EACCES, "Permission denied", "a"),
        5,
        ["a: permission denied; check the permissions"],
    ),
    "file in the way": (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"),
        2,
        ["a/b: not a directory; name another path"],
    ),
    "long name": (
        OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300),
        2,
        [f"{'a' * 300}: file name too long; name another path"],
    ),
    "file where the command line wants a directory": (
        FileExistsError(errno.EEXIST, "File exists", "out"),
        2,
        ["out: file exists; name another path"],
    ),
    "directory where the command line wants a file": (
        IsADirectoryError(errno.EISDIR, "Is a directory", str(Path("out/run").absolute())),
        2,
        [f"{Path('out/run').absolute()}: is a directory; name another path"],
    ),
    "memory": (
        MemoryError(),
        4,
        ["out of memory; lower training.max_tokens_per_device, or set training.gradient_checkpointing=true"],
    ),
    "memory of torch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        4,
        ["out of memory; lower training.max_tokens_per_device, or set training.gradient_checkpointing=true"],
    ),
}


@pytest.mark.parametrize(("error", "code", "lines"), FAILURES.values(), ids=FAILURES)
def test_failures_end_in_their_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    lines: list[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ftkit.commands.plan", types.SimpleNamespace(plan=_raise(error)))
    assert run(["plan", "r.yaml", "output_dir=out/run"]) == code
    assert [line for line in capsys.readouterr().err.splitlines() if line] == [
        f"ftkit: error: {line}" for line in lines
    ]


BUGS = {
    "value": ValueError("x"),
    "no path": FileNotFoundError(errno.ENOENT, "x"),
    "a path of ours": FileNotFoundError(errno.ENOENT, "No such file", "out/metrics.jsonl"),
    "where we are": IsADirectoryError(errno.EISDIR, "Is a directory", str(Path.cwd())),
    "descriptor": OSError(errno.ENOTDIR, "Not a directory", 3),
    "runtime": RuntimeError("shapes differ"),
}


@pytest.mark.parametrize("error", BUGS.values(), ids=BUGS)
def test_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setitem(sys.modules, "ftkit.commands.plan", types.SimpleNamespace(plan=_raise(error)))
    with pytest.raises(type(error), match=re.escape(str(error))):
        run(["plan", "r.yaml", "output_dir=out"])


def test_a_bug_exits_with_1(tmp_path: Path) -> None:
    script = "import sys, types\nimport ftkit.cli\n"
    script += "sys.modules['ftkit.commands.plan'] = types.SimpleNamespace(plan=lambda *a, **k: 1 / 0)\n"
    script += "sys.argv = ['ftkit', 'plan', 'x']\nftkit.cli.main()\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_schema_prints_json() -> None:
    result = ftkit("schema")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["properties"]["training"]


def test_output_that_nobody_reads_or_nothing_can_hold(tmp_path: Path) -> None:
    """`ftkit schema | head -1`, and a full disk."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "ftkit", "schema"]
    with os.fdopen(write_end, "w") as broken:
        result = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (141, "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (5, "ftkit: error: no space left on device; free some space\n")


def test_help_and_version() -> None:
    result = ftkit("--help")
    assert result.returncode == 0
    assert all(f"\n  {verb} " in result.stdout for verb in VERBS)
    assert ftkit().stdout == result.stdout
    assert ftkit("--version").stdout.startswith("ftkit 0.")
    for verb in VERBS:
        assert f"ftkit {verb}" in ftkit(verb, "-h").stdout


def test_help_answers_at_once() -> None:
    """Without torch and the like, it takes a fifth of a second; with them five seconds."""
    script = "import sys\nimport ftkit.cli\nprint(ftkit.cli.run(['--help']), len(sys.modules), 'torch' in sys.modules,"
    script += " 'pydantic' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    code, modules, *heavy = result.stdout.split()[-4:]
    assert (code, heavy) == ("0", ["False", "False"])
    assert int(modules) < 500
    # Processor time, which other work on the machine does not change as it does the clock's.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ftkit("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
