"""Trackers: the real packages, offline, and ones that fail."""

import json
import struct
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ftkit.commands.train import train
from ftkit.errors import Interrupted, UserError
from ftkit.recipe.load import load_recipe
from ftkit.recipe.schema import TrainingSection
from ftkit.runs import MetricsFile
from ftkit.training import trackers
from ftkit.training.trackers import scalars
from tests.tiny_runs import read_metrics, result_hash, run_cli, write_recipe, write_rows

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """(recipe, directory of its runs), with the working directory moved to an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return write_recipe(tmp_path), tmp_path / "runs"


def shown_by_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of every point, read as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def in_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run, timing=True):
        for name, value in scalars(line).items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def float32(points: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard keeps of a number."""
    return {name: [(step, float(np.float32(value))) for step, value in values] for name, values in points.items()}


def wandb_records(run: Path) -> Iterator[Any]:
    """The records of a run's offline directories, in order: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        content, position, record = path.read_bytes(), 7, b""
        while position < len(content):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            _, length, kind = struct.unpack("<IHB", content[position : position + 7])
            record += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # Whole, or the last part.
                yield Record.FromString(record)
                record = b""


def shown_by_wandb(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of every point."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return found


def test_the_names_are_accelerates() -> None:
    names = TrainingSection.model_fields["report_to"].annotation.__args__[0].__args__
    assert set(names) == set(LOGGER_TYPE_TO_CLASS)
    assert [name for name in trackers.IN_EXTRA if name not in names] == []


def test_the_numbers_of_a_line_by_name() -> None:
    timing = {"seconds": 2.0, "tokens_per_second": 5.0, "peak_memory_bytes": 7}
    line = {"step": 3, "epoch": 0.5, "loss": 2.0, "loss_by_dataset": {"a": 1.0, "b (x)": 3.0}, "learning_rate": 1e-3}
    line |= {"grad_norm": 0.25, "tokens": 10, "target_tokens": 4, "timing": timing}
    assert scalars(line) == {
        "train/loss": 2.0,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 0.25,
        "train/epoch": 0.5,
        "train/tokens": 10,
        "train/target_tokens": 4,
        "train/a/loss": 1.0,
        "train/b__x_/loss": 3.0,
        "train/tokens_per_second": 5.0,
        "train/peak_memory_bytes": 7,
    }
    evaluation = {"event": "eval", "step": 3, "epoch": 0.5, "eval_loss": 2.0, "eval_loss_a": 2.0, "timing": timing}
    assert scalars(evaluation) == {"eval/loss": 2.0, "eval/seconds": 2.0}
    assert scalars(evaluation | {"eval_loss_b": 3.0})["eval/b/loss"] == 3.0


def test_both_show_what_metrics_jsonl_holds_and_change_nothing(tiny, capsys):
    recipe, runs = tiny
    write_rows(recipe.parent / "more.jsonl", 20, seed=1)
    two = ["data.train.1.path=more.jsonl", f"data.train.1.path={recipe.parent / 'more.jsonl'}"]
    train(recipe, two)
    capsys.readouterr()
    tracked = ["training.report_to=[tensorboard, wandb]", "training.run_name=first try", "training.project=mine"]
    train(recipe, [*two, *tracked])
    run = runs / "recipe-2"
    assert result_hash(run) == result_hash(runs / "recipe-1")
    assert read_metrics(run) == read_metrics(runs / "recipe-1")

    assert {"train/rows/loss", "train/more/loss", "eval/rows/loss", "eval/loss"} < in_metrics(run).keys()
    assert shown_by_tensorboard(run) == float32(in_metrics(run))
    assert shown_by_wandb(run) == in_metrics(run)
    (begun,) = [record.run for record in wandb_records(run) if record.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name) == ("mine", "first try")
    told = {item.key: json.loads(item.value_json) for item in configuration(run)}
    assert told["training.learning_rate"] == 1e-2
    assert told["data.train.1.path"] == str(recipe.parent / "more.jsonl")

    out = capsys.readouterr()
    assert f"\ntracking   tensorboard: tensorboard --logdir {run / 'tensorboard'}\n" in out.out
    assert f"\ntracking   wandb: offline; wandb sync {run / 'wandb' / 'offline-run-'}" in out.out
    assert "wandb" not in out.err
    # Nothing beside the run's directory.
    assert list(Path.cwd().iterdir()) == []


def configuration(run: Path) -> list[Any]:
    return [item for record in wandb_records(run) for item in record.config.update]


def test_a_run_that_goes_on_goes_on_there_without_a_step_twice(tiny, monkeypatch):
    """Interrupted after step 5, of which the last checkpoint, of step 3, knows nothing; then lengthened."""
    recipe, runs = tiny
    overrides, run = ["training.report_to=[tensorboard, wandb]"], runs / "recipe-1"

    def stopped(metrics: MetricsFile, values: dict[str, Any], append: Any = MetricsFile.append) -> None:
        append(metrics, values)
        if values["step"] == 5:
            raise Interrupted("as if it were killed", signal_number=9)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", stopped)
        with pytest.raises(Interrupted):
            train(recipe, overrides)
    assert [step for step, _ in shown_by_tensorboard(run)["train/loss"]] == [1, 2, 3, 4, 5]
    train(recipe, overrides, resume=True)
    assert shown_by_tensorboard(run) == float32(in_metrics(run))
    shown, written = shown_by_wandb(run), in_metrics(run)
    # How long a step took is another time.
    for name in ("train/loss", "train/grad_norm", "eval/loss", "train/epoch"):
        assert shown[name] == written[name], name
    assert len(shown["train/loss"]) == 6
    train(recipe, [*overrides, "training.max_steps=8", "training.lr_scheduler_type=cosine"], resume=True)
    assert shown_by_tensorboard(run) == float32(in_metrics(run))
    assert shown_by_wandb(run)["train/loss"] == in_metrics(run)["train/loss"]
    # Three parts of one run.
    files = [path.name for path in (run / "wandb").glob("offline-run-*/run-*.wandb")]
    assert (len(files), len(set(files))) == (3, 1)


class Failing:
    """A tracker that raises in one of its functions, or waits in it for ever."""

    requires_logging_directory, seen = False, []

    def __init__(self, project: str, **_: Any) -> None:
        self._reach("init")

    def _reach(self, place: str) -> None:
        self.seen.append(place)
        if place == self.fails_in:
            self.fail()

    def start(self) -> None:
        self._reach("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._reach("configuration")

    def log(self, values: dict[str, float], step: int) -> None:
        self._reach("log")

    def finish(self) -> None:
        self._reach("finish")


def failing(monkeypatch: pytest.MonkeyPatch, place: str, fail: Any) -> type[Failing]:
    members = {"fails_in": place, "fail": fail, "seen": []}
    made = type("Made", (Failing,), members)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "clearml", made)
    monkeypatch.setattr(trackers, "check_installed", lambda loaded: None)
    return made


def raises(self: Any) -> None:
    raise ConnectionError("no answer\nand more of it")


def leaves(self: Any) -> None:
    raise SystemExit(3)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    directory = tmp_path_factory.mktemp("untracked")
    recipe = write_recipe(directory)
    train(recipe, [])
    return recipe, directory / "runs" / "recipe-1"


@pytest.mark.parametrize("place", ["init", "start", "configuration", "log", "finish"])
@pytest.mark.parametrize("fail", [raises, leaves])
def test_one_that_fails_is_told_of_once_and_changes_nothing(untracked, monkeypatch, capsys, place, fail):
    recipe, expected = untracked
    made = failing(monkeypatch, place, fail)
    output = recipe.parent / f"{place}-{fail.__name__}"
    train(recipe, ["training.report_to=clearml", f"output_dir={output}"])
    out = capsys.readouterr().out
    why = "ConnectionError: no answer" if fail is raises else "SystemExit: 3"
    assert out.count("warning: ") == 1
    assert f"\nwarning: the tracker clearml failed, the run goes on without it: {why}\n" in out
    assert made.seen.count(place) == 1
    assert made.seen[-1] == place
    assert result_hash(output) == result_hash(expected)
    assert read_metrics(output) == read_metrics(expected)


@pytest.mark.parametrize("place", ["start", "log", "finish"])
def test_one_that_hangs_is_left_behind(untracked, monkeypatch, capsys, place):
    recipe, expected = untracked
    failing(monkeypatch, place, lambda self: time.sleep(30))
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.2)
    output, before = recipe.parent / f"hangs-{place}", time.monotonic()
    train(recipe, ["training.report_to=clearml", f"output_dir={output}"])
    assert time.monotonic() - before < 20
    assert "warning: the tracker clearml has not taken everything 0 s after the end" in capsys.readouterr().out
    assert result_hash(output) == result_hash(expected)


@pytest.mark.slow
def test_a_real_one_that_cannot_report_is_told_of(tmp_path):
    """Weights & Biases without a key: it neither asks for one nor ends the run."""
    (tmp_path / "home").mkdir()
    home = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": "online"}
    result = run_cli("train", write_recipe(tmp_path), "training.report_to=wandb", cwd=tmp_path, **home)
    assert result.returncode == 0, result.stderr
    assert "the tracker wandb failed, the run goes on without it: UsageError: No API key" in result.stdout
    assert (tmp_path / "runs" / "recipe-1" / "adapter").is_dir()


def test_a_package_that_is_missing_is_told_before_anything_else(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    (tmp_path / "clearml").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    # A directory of that name is no package.
    assert find_spec("clearml") is not None
    with pytest.raises(UserError, match=r"line: training.report_to: clearml is not installed; pip install clearml, or"):
        train(recipe, ["training.report_to=[clearml]", "base_model=nowhere/at-all"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'ftkit\[trackers\]', or leave it out"):
        train(recipe, ["training.report_to=[wandb]"])
    assert not (tmp_path / "runs").exists()


def test_words_for_trackers(tmp_path):
    recipe = write_recipe(tmp_path)

    def named(text: str) -> tuple[str, ...]:
        return load_recipe(recipe, [f"training.report_to={text}"]).recipe.training.report_to

    assert named("wandb") == ("wandb",)
    assert named("tensorboard,wandb") == named("[tensorboard, wandb]") == ("tensorboard", "wandb")
    assert named("none") == named("[]") == named("[none]") == named("null") == ()
    assert named("comet") == ("comet_ml",)
    for text, message in {
        "all": "the text 'all' is not in this version; name the trackers, e.g. .tensorboard, wandb.",
        "wanbd": "expected one of aim, .*, got the text 'wanbd'; did you mean wandb?",
        "[wandb, wandb]": "wandb is named twice; name each tracker once",
    }.items():
        with pytest.raises(UserError, match=message):
            named(text)
    with pytest.raises(UserError, match=r"training.project: only trackers use it, and none is named; set training.rep"):
        load_recipe(recipe, ["training.project=x"])


@pytest.mark.slow
def test_of_several_processes_one_reports(tiny):
    recipe, runs = tiny
    arguments = ["train", recipe, "training.report_to=[tensorboard, wandb]", "--num-processes", "2"]
    result = run_cli(*arguments, cwd=Path.cwd(), WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert len(list((runs / "recipe-1" / "tensorboard").glob("events*"))) == 1
    assert shown_by_tensorboard(runs / "recipe-1") == float32(in_metrics(runs / "recipe-1"))
    assert shown_by_wandb(runs / "recipe-1") == in_metrics(runs / "recipe-1")
    assert list(Path.cwd().iterdir()) == []
