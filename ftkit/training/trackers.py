"""Trackers, `training.report_to`: what metrics.jsonl gets, shown elsewhere too, through accelerate's classes.

Each tracker works on a thread of its own. What it raises, and how long it takes, is no business of the run: a tracker
that fails is told of once and left out from there on, one that does not answer is left behind at the end. Nothing of a
tracker reaches the numbers of the run.

A run's directory holds RUN/NAME for every tracker: its files where it writes any, and reported.json, which says how far
it has come. A run that goes on goes on in the same place:

- TensorBoard is told to forget what was written after the checkpoint (`purge_step`), so that it shows metrics.jsonl;
- the others cannot take anything back: lines that they have already are not sent again.
"""

import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ftkit.console import Console
from ftkit.errors import UserError
from ftkit.recipe.load import LoadedRecipe
from ftkit.recipe.schema import TrainingSection

if TYPE_CHECKING:
    from ftkit.runs import MetricsFile

KEY = ("training", "report_to")
REPORTED = "reported.json"
PROJECT = "ftkit"
TENSORBOARD, WANDB, MLFLOW = "tensorboard", "wandb", "mlflow"
IN_EXTRA = (TENSORBOARD, WANDB)
"""What `ftkit[trackers]` installs; every other tracker's package is called as the tracker."""
CLOSING_SECONDS = 30.0
"""How long the end of a run waits for what its trackers still have to send."""
Line = Mapping[str, Any]


def check_installed(loaded: LoadedRecipe) -> None:
    """Check that the packages behind `training.report_to` are there, without importing them.

    Raises:
        UserError: one is not.
    """
    for name in loaded.recipe.training.report_to:
        # A directory ./wandb, which its runs leave behind, is found too, but is no package: it has no origin.
        found = find_spec(name)
        if found is None or found.origin is None:
            package = "'ftkit[trackers]'" if name in IN_EXTRA else name
            how = f"pip install {package}, or leave it out"
            raise UserError(f"{name} is not installed", key=KEY, how=how).located(loaded.marks)


@contextmanager
def tracking(
    metrics: "MetricsFile", section: TrainingSection, run: Path, console: Console, *, main: bool, step: int
) -> Iterator[None]:
    """Hand every line that `metrics` gets on to the trackers that `section` names.

    Args:
        run: its directory, which holds recipe.yaml.
        main: whether this process writes the run's files; the others have no trackers.
        step: optimizer steps that were done before.
    """
    open_ = [_Tracker(_Place(name, section, run, step)) for name in section.report_to if main]

    def look() -> None:
        for tracker in open_[:]:
            if (text := tracker.take_notice()) is not None:
                console.line(f"tracking   {tracker.name}: {text}")
            if tracker.failure is not None:
                console.warning(f"the tracker {tracker.name} failed, the run goes on without it: {tracker.failure}")
                open_.remove(tracker)

    def follow(line: Line) -> None:
        for tracker in open_:
            tracker.send(line)
        look()

    metrics.followers.append(follow)
    try:
        yield
    finally:
        metrics.followers.remove(follow)
        for tracker in open_:
            tracker.send(None)
        until = time.monotonic() + CLOSING_SECONDS
        for tracker in open_[:]:
            tracker.wait(until - time.monotonic())
        look()
        for tracker in open_:
            if tracker.is_busy:
                what = f"has not taken everything {CLOSING_SECONDS:.0f} s after the end, and is left behind"
                console.warning(f"the tracker {tracker.name} {what}")


def scalars(line: Line) -> dict[str, float]:
    """A line of metrics.jsonl as trackers name its numbers: `train/loss`, `eval/loss`, `eval/NAME/loss` and so on.

    The loss of each data set is told where there are several.
    """
    if line.get("event") == "eval":
        parts = {key.removeprefix("eval_loss_"): line[key] for key in line if key.startswith("eval_loss_")}
        values = {"eval/loss": line["eval_loss"], **_of_datasets("eval", parts)}
        return values | {"eval/seconds": line["timing"]["seconds"]}
    plain = ("loss", "learning_rate", "grad_norm", "epoch", "tokens", "target_tokens")
    values = {f"train/{key}": line[key] for key in plain} | _of_datasets("train", line["loss_by_dataset"])
    return values | {f"train/{key}": line["timing"][key] for key in ("tokens_per_second", "peak_memory_bytes")}


def _of_datasets(part: str, losses: Mapping[str, float]) -> dict[str, float]:
    # Names in a path of their own, in letters that every tracker takes.
    named = {f"{part}/{re.sub(r'[^-.A-Za-z0-9_]', '_', name)}/loss": loss for name, loss in losses.items()}
    return named if len(losses) > 1 else {}


@dataclass(frozen=True)
class _Place:
    """A tracker's name, and what it is told about the run."""

    tracker: str
    section: TrainingSection
    run: Path
    step: int
    """Optimizer steps that were done before."""

    @property
    def directory(self) -> Path:
        return self.run / self.tracker

    @property
    def title(self) -> str:
        return self.section.run_name or self.run.name

    @property
    def project(self) -> str:
        return self.section.project or PROJECT


class _Tracker:
    """One tracker, on a thread of its own that is only ever handed lines."""

    def __init__(self, place: _Place) -> None:
        self.name = place.tracker
        self.failure: str | None = None
        """Why it takes no more lines."""
        self._place = place
        self._notice: str | None = None
        self._lines: SimpleQueue[Line | None] = SimpleQueue()
        # A daemon: one that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def send(self, line: Line | None) -> None:
        """Let the tracker have a line; None: there are no more."""
        self._lines.put(line)

    def wait(self, seconds: float) -> None:
        """Until it is done, but no longer than that."""
        self._thread.join(max(0.0, seconds))

    @property
    def is_busy(self) -> bool:
        """Whether it has something to do yet."""
        return self._thread.is_alive()

    def take_notice(self) -> str | None:
        """Where the run can be watched, once it is known."""
        text, self._notice = self._notice, None
        return text

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # Some clients call sys.exit.
            first = next((text for text in str(error).splitlines() if text.strip()), "")
            self.failure = f"{type(error).__name__}: {first}" if first else type(error).__name__

    def _work(self) -> None:
        from ftkit.models.files import read_json
        from ftkit.runs import RECIPE, write_json

        place = self._place
        place.directory.mkdir(exist_ok=True)
        file = place.directory / REPORTED
        known: dict[str, Any] = read_json(file) if file.is_file() else {}
        identity = known.get("id") or secrets.token_hex(8)
        tracker = _open(place, identity, resumed=bool(known))
        if self.name == MLFLOW:
            identity = tracker.tracker.info.run_id
        self._notice = _where(place, tracker)
        if not known or self.name in (TENSORBOARD, WANDB):
            # To the others a configuration is final, also that of a run that has become longer.
            _describe(place, tracker, (place.run / RECIPE).read_text(encoding="utf-8"))
        last = None if self.name == TENSORBOARD else known.get("last")
        while (line := self._lines.get()) is not None:
            # Of one step, the evaluation comes after the losses.
            here = [line["step"], "event" in line]
            if last is not None and here <= last:
                continue
            # Before it is sent: a run that is killed in between goes on without the line, not with two of it.
            write_json(file, {"id": identity, "last": here})
            tracker.log(scalars(line), step=line["step"])
        tracker.finish()


# ------------------------------------------------------------------------------------------- what differs among them


def _open(place: _Place, identity: str, *, resumed: bool) -> Any:
    """accelerate's tracker, started; a run that goes on is the one that it has by `identity`."""
    from ftkit.distributed import tracker_class

    make, name = tracker_class(place.tracker), place.tracker
    project = place.project
    if name == WANDB and place.section.project is None:
        project = os.environ.get("WANDB_PROJECT", project)
    # Its directory is the run's own.
    arguments = ["" if name == TENSORBOARD else project]
    arguments += [str(place.directory)] if make.requires_logging_directory else []
    if name == MLFLOW:
        # Left alone it writes into the working directory.
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{place.directory.absolute()}/mlflow.db")
    tracker = make(*arguments, **_options(place, identity, resumed=resumed))
    tracker.start()
    return tracker


def _options(place: _Place, identity: str, *, resumed: bool) -> dict[str, Any]:
    """What the package itself is told: the run's name, its place, and which one it goes on with."""
    directory, title = str(place.directory), place.title
    # wandb: it asks nothing and leaves the terminal alone. Without a key it then fails, and that is told.
    quiet = {"silent": True, "console": "off"}
    known: dict[str, dict[str, Any]] = {
        TENSORBOARD: {"purge_step": place.step + 1} if resumed else {},
        WANDB: {"id": identity, "resume": "allow", "name": title, "dir": str(place.run), "settings": quiet},
        MLFLOW: {"logging_dir": directory} | ({"run_id": identity} if resumed else {"run_name": title}),
        "swanlab": {"id": identity, "resume": "allow", "experiment_name": title, "logdir": directory},
        # Its runs are known by their names: a new one of an old name is another run.
        "trackio": {"name": title, "resume": "allow" if resumed else "never"},
        "dvclive": {"dir": directory, "resume": resumed, "save_dvc_exp": False, "dvcyaml": None},
    }
    return known.get(place.tracker, {})


def _where(place: _Place, tracker: Any) -> str:
    """How to see the run there."""
    if place.tracker == TENSORBOARD:
        return f"tensorboard --logdir {place.directory}"
    if place.tracker == WANDB:
        run = tracker.tracker
        return f"offline; wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)
    return f"project {place.project}"


def _describe(place: _Place, tracker: Any, recipe: str) -> None:
    """Tell the tracker the resolved recipe: its keys and values, or the text where a text can be shown."""
    from ftkit.recipe.marked_yaml import parse_yaml
    from ftkit.run_diff import flat

    if place.tracker == TENSORBOARD:
        # Its own form of a configuration is a further run beside the first.
        tracker.log({"recipe": f"```yaml\n{recipe}```"}, step=place.step)
        return
    values, _ = parse_yaml(recipe, "recipe.yaml")
    tracker.store_init_configuration({key: value for key, value in flat(values) if value not in ([], {}, None)})
