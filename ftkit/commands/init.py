"""`ftkit init`: a first recipe, from somebody's data or from another tool's configuration."""

import glob
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from ftkit.console import Console
from ftkit.errors import Problem, UserError, dotted
from ftkit.recipe.load import DATA_SUFFIXES

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIGURATIONS = (".yaml", ".yml")


def init(
    source: str,
    *,
    model: str | None = None,
    method: str | None = None,
    output: Path = Path("recipe.yaml"),
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a recipe for SOURCE.

    Args:
        source: data (file, directory, hub id), or a configuration of axolotl, LLaMA-Factory or TRL.
        model: the base model; default a small one, or the configuration's.
        method: as `method.type`; default lora, or the configuration's.

    Raises:
        UserError: the output exists, there is no such method, or nothing can be made of the source.
    """
    console = Console()
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists", how="choose another --output, or give --overwrite: it is moved aside")
    if not output.parent.is_dir():
        raise UserError(f"there is no directory {output.parent}", how="create it, or choose another --output")
    from ftkit.recipe.schema import METHOD_SECTIONS

    if method is not None and method not in METHOD_SECTIONS:
        raise UserError(
            f"--method {method}: there is no such method", how=f"choose one of {', '.join(METHOD_SECTIONS)}"
        )
    if Path(source).suffix in CONFIGURATIONS:
        text = _from_configuration(Path(source), output, console, model=model, method=method)
    else:
        options = {"offline": offline, "trust_remote_code": trust_remote_code}
        text = _from_data(
            source, output, console, model=model or DEFAULT_MODEL, method=method or "lora", options=options
        )
    from ftkit.runs import move_aside, write_whole

    if output.exists():
        console.line(f"the old one is now {move_aside(output)}")
    write_whole(output, text)
    console.line(f"written to {output}", style="bold")
    for verb in ("preview", "plan", "train"):
        console.line(f"  ftkit {verb} {shlex.quote(str(output))}")


def _from_data(source: str, output: Path, console: Console, model: str, method: str, options: dict[str, bool]) -> str:
    from ftkit.draft import draft

    directory = output.absolute().parent
    data, base_model = (_seen_from(directory, text) for text in (source, model))
    made = draft(data, base_model, method, directory, console=console, **options)
    facts = made.facts
    console.line(f"data       {facts.rows:,} rows: {facts.kind}")
    if facts.repeated:
        console.line(f"repeated   {facts.repeated:,} rows say the same as another")
    if facts.dropped:
        shown = f"`ftkit preview {shlex.quote(str(output))} --dropped` says why"
        console.line(f"dropped    {facts.dropped:,} rows cannot be used: {shown}")
    lengths = f"{facts.median:,} tokens in the middle, 99% up to {facts.percentile:,}, the longest {facts.longest:,}"
    console.line(f"lengths    {lengths}")
    for warning in made.warnings:
        console.warning(warning)
    return made.text


def _from_configuration(path: Path, output: Path, console: Console, *, model: str | None, method: str | None) -> str:
    import yaml

    from ftkit.recipe.translate import translate

    found = translate(path)
    values = found.recipe
    dropped = _replace(values, model=model, method=method)
    directory = output.absolute().parent
    _move_paths(values, path.absolute().parent, directory)
    notes = [_note(problem) for problem in found.left_out] + dropped + _not_there(values, directory)
    console.line(f"{path} is a configuration of {found.tool}")
    for note in notes:
        console.line(f"differs    {note}")
    unneeded = ", ".join(map(dotted, found.unneeded))
    defaults = ", ".join(f"{key} {value}" for key, value in found.defaults.items())
    if defaults:
        console.line(f"defaults   {defaults}: what {found.tool} does where it is told nothing")
    if unneeded:
        console.line(f"not needed {unneeded}")
    head = [f"# Made by `ftkit init` from {path.name}, a configuration of {found.tool}."]
    head += ["#", "# Not carried over as it was:", *(f"#   {note}" for note in notes)] if notes else []
    head += textwrap.wrap(f"Not needed here: {unneeded}", 118, initial_indent="# ", subsequent_indent="#   ") * bool(
        unneeded
    )
    order = ("base_model", "model", "data", "method", "training", "output_dir", "seed")
    ordered = {key: values[key] for key in order if values.get(key) not in (None, {})}
    body = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=110)
    return "\n".join(head) + "\n\n" + body


def _note(problem: Problem) -> str:
    return f"{dotted(problem.key)}: {problem.what}" + (f"; {problem.how}" if problem.how else "")


def _not_there(values: dict[str, Any], directory: Path) -> list[str]:
    """Files that the configuration names and that are not there: with such an ending they are no hub ids."""
    named = [
        (f"data.{kind}.{index}.path", dataset["path"])
        for kind in ("train", "eval")
        for index, dataset in enumerate(values.get("data", {}).get(kind, []))
    ]
    return [
        f"{key}: there is no file {path}; put it there, or correct the path"
        for key, path in named
        if Path(path).suffix in DATA_SUFFIXES and not glob.has_magic(path) and not (directory / path).exists()
    ]


def _replace(values: dict[str, Any], *, model: str | None, method: str | None) -> list[str]:
    """Put another base or method into a recipe, and take out what belonged to the old one; what that was.

    Raises:
        UserError: the rest does not go with it.
    """
    from ftkit.recipe.checks import check
    from ftkit.recipe.problems import validate

    gone: list[tuple[str, str]] = []
    if model is not None and model != values["base_model"]:
        values["base_model"] = model
        gone += [("model", name) for name in ("revision", "tokenizer")]
    if method is not None and method != values["method"]["type"]:
        values["method"] = {"type": method}
        gone += [("training", "learning_rate")] + ([("model", "quantization")] if method == "full" else [])
    notes = []
    for section, name in gone:
        if values.get(section, {}).pop(name, None) is not None:
            notes.append(f"{section}.{name}: belonged to what the command line replaced; set it anew where you need it")
    recipe, problems = validate({key: value for key, value in values.items() if value != {}})
    problems = check(recipe) if recipe is not None else problems
    if problems:
        raise UserError(problems[0].what, how=problems[0].how, key=problems[0].key)
    return notes


def _move_paths(values: dict[str, Any], there: Path, here: Path) -> None:
    """Let relative paths that exist beside the configuration, or where we are, start from the recipe's directory."""

    def moved(text: str) -> str:
        found = next((base / text for base in (there, Path.cwd()) if (base / text).exists()), None)
        return text if found is None or Path(text).is_absolute() else os.path.relpath(found, here)

    values["base_model"] = moved(values["base_model"])
    if "chat_template" in values.get("model", {}):
        values["model"]["chat_template"] = moved(values["model"]["chat_template"])
    for kind in ("train", "eval"):
        for dataset in values.get("data", {}).get(kind, []):
            dataset["path"] = moved(dataset["path"])


def _seen_from(directory: Path, text: str) -> str:
    """A path that exists, relative to `directory` where it lies below or beside it; anything else as it is."""
    path = Path(text).expanduser()
    there = path.exists() or (glob.has_magic(text) and any(glob.iglob(str(path), recursive=True)))
    return text if path.is_absolute() or not there else os.path.relpath(path.absolute(), directory)
