"""`ftkit eval`: what a model can do, beside what its base can do."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.console import Console, human_count
from ftkit.errors import UserError

if TYPE_CHECKING:
    from ftkit.evaluation.items import Task
    from ftkit.evaluation.report import Report
    from ftkit.evaluation.schema import PromptMode
    from ftkit.runs import Target

EXAMPLES_SHOWN = 3
"""Answers that are printed below the table, side by side."""


def evaluate(
    target: str,
    *,
    suite: Path | None = None,
    compare: Sequence[str] = (),
    no_compare: bool = False,
    limit: int | None = None,
    output: Path | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Score TARGET, and beside it its base and whatever it is compared with, on a suite or on its validation rows."""
    import torch

    from ftkit.evaluation.compare import evaluate_models
    from ftkit.evaluation.contestants import check_labels, leading_target, load_contestants
    from ftkit.methods.files import check_base, identify
    from ftkit.methods.table import method_of
    from ftkit.models.load import choose_compute_dtype
    from ftkit.runs import find_target, recorded_base, write_json

    console = Console()
    if output is not None and output.is_dir():
        raise UserError(f"{output} is a directory", how="name a file: --output FILE.json")
    if output is not None:
        # Now, not after hours of answers: a file may be in the way.
        output.parent.mkdir(parents=True, exist_ok=True)

    # 1. Who takes part: the target, its base, what else was named.
    found = find_target(target, offline=offline, trust_remote_code=trust_remote_code)
    targets = [found]
    if found.base is not None and not no_compare:
        if found.run is not None and (trained_on := recorded_base(found.run)) is not None:
            check_base(found.run, trained_on, identify(found.base, remembered=True))
        # Of a QLoRA: what the adapter was trained on. The base as it is stored can be named with --compare.
        label = found.base.name + _precision(found.base.quantization)
        base = replace(found, label=label, model=found.base, adapter=None, tokenizer=None, run=None, base=None)
        targets.append(base)
    others = [find_target(name, offline=offline, trust_remote_code=trust_remote_code) for name in compare]
    targets += [other for other in others if not any(_same(other, known) for known in targets[1:])]
    check_labels(targets)
    targets = _with_short_labels(targets)

    # 2. What they are asked.
    mode, tasks = _tasks(found, suite, limit, offline=offline, trust_remote_code=trust_remote_code)

    # 3. The answers.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = leading_target(targets).recipe
    dtype, reason = choose_compute_dtype(recipe.model.dtype if recipe is not None else "auto", device)
    contestants = load_contestants(targets, mode=mode, dtype=dtype, device=device)
    report = evaluate_models(contestants, tasks, console=console)

    # 4. What they come to.
    console.table(report.to_table())
    _print_examples(report, tasks, [contestant.label for contestant in contestants], console)
    for note in report.notes:
        console.line(f"note: {note}")
    console.line(
        f"computed in {str(dtype).removeprefix('torch.')} ({reason}); {human_count(report.usage.tokens_run)} tokens "
        f"read, {human_count(report.usage.tokens_generated)} generated"
    )
    if output is not None:
        write_json(output, report.to_json())
        console.line(f"written to {output}")
    if found.adapter is not None:
        mergeable = method_of(found.adapter).merge_refusal is None and found.prompt is None
        console.line("next:")
        console.line(f"  ftkit {'merge' if mergeable else 'export --format adapter'} {target}")


def _tasks(
    target: "Target", suite: Path | None, limit: int | None, *, offline: bool, trust_remote_code: bool
) -> tuple["PromptMode", Sequence["Task"]]:
    """The tasks of a suite, or the validation rows that the run held back."""
    from ftkit.evaluation.items import validation_tasks
    from ftkit.evaluation.suite import read_suite
    from ftkit.recipe.load import load_recipe
    from ftkit.runs import RECIPE, recorded_data
    from ftkit.training.prepare import prepare

    if suite is not None:
        read = read_suite(suite, limit=limit)
        return read.prompt, read.tasks
    if target.run is None:
        raise UserError(f"{target.label} belongs to no run, so there are no validation rows", how="name a --suite FILE")
    loaded = load_recipe(target.run / RECIPE)
    quiet = Console(quiet=True)
    plan = prepare(loaded, quiet, offline=offline, trust_remote_code=trust_remote_code, begins=False).plan
    if recorded_data(target.run) != plan.fingerprint:
        raise UserError(
            f"the data of {target.run} is not what it was trained on, so its validation rows are not known any more",
            how="restore the data files, or name a --suite FILE",
        )
    if not plan.validation_documents:
        raise UserError(f"{target.run} held no rows back for validation", how="name a --suite FILE")
    return "auto", validation_tasks(plan.validation_documents, limit=limit)


def _with_short_labels(targets: "list[Target]") -> "list[Target]":
    """Files by their name, directories by their last two parts, where that still tells them apart."""
    # A file's name says what it is; a directory's, such as `merged`, only together with the one above.
    endings = [_precision(target.model.quantization) for target in targets]
    paths = [Path(target.label.removesuffix(end)) for target, end in zip(targets, endings, strict=True)]
    short = [
        target.label.replace(str(path), path.name if path.is_file() else "/".join(path.parts[-2:]))
        if path.exists()
        else target.label
        for path, target in zip(paths, targets, strict=True)
    ]
    if len(set(short)) < len(short):
        return targets
    return [replace(target, label=label) for target, label in zip(targets, short, strict=True)]


def _precision(quantization: str | None) -> str:
    return f" in {quantization}" if quantization is not None else ""


def _same(one: "Target", other: "Target") -> bool:
    return one.adapter == other.adapter and replace(one.model, name="") == replace(other.model, name="")


def _print_examples(report: "Report", tasks: Sequence["Task"], labels: Sequence[str], console: Console) -> None:
    """A few answers in full: figures alone do not tell what a model has become."""
    for task in tasks:
        written = [
            index for index in range(len(task.items)) if report.answers[labels[0]][task.name][index].text is not None
        ]
        for index in written[:EXAMPLES_SHOWN]:
            console.line()
            question = task.items[index].question.messages[-1].content
            console.line(f"{task.name}, {task.items[index].where}: {_short(question)}", style="bold")
            width = max(map(len, labels))
            for label in (*labels[1:], labels[0]):
                text = report.answers[label][task.name][index].text or ""
                console.line(f"  {label:{width}}  {_short(text)}")
    console.line()


def _short(text: str, limit: int = 200) -> str:
    """One line of text."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
