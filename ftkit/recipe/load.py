"""Reads recipes (file, other tools' names, overrides, defaults, validation, checks) and writes them."""

import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ftkit.errors import KeyPath, Problem, UserError, dotted
from ftkit.recipe import shape
from ftkit.recipe.checks import check
from ftkit.recipe.marked_yaml import read_yaml
from ftkit.recipe.names import convert_values, move_aliases
from ftkit.recipe.overrides import WHERE, apply_overrides
from ftkit.recipe.problems import validate
from ftkit.recipe.scalars import is_text
from ftkit.recipe.schema import DatasetSection, Recipe
from ftkit.recipe.section import Section

HUB_PREFIX = "hf://"
"""In front of a base model or data set: never a local path."""

DATA_SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where its keys were written."""

    recipe: Recipe
    path: Path
    """The recipe's file."""
    marks: dict[KeyPath, str]
    """Key path -> `recipe.yaml:12`, or `command line`; keys with default values have none."""

    def directory(self, key: KeyPath) -> Path:
        """Where a relative input path at `key` starts: the recipe's directory, or for the command line the working one.

        Not `Path.resolve`: a recipe reached by a symbolic link is relative to the link, as for everyone who reads it.
        """
        return Path.cwd() if _mark(key, self.marks) == WHERE else self.path.absolute().parent


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` each; they win over the file.

    Raises:
        UserError: everything that is wrong with file and overrides, a problem each, in the order of the file.
        StorageError: the file cannot be read.
    """
    if path.suffix in DATA_SUFFIXES and path.is_file():
        raise UserError(
            "is data, not a recipe", how=f"make a recipe of it: ftkit init {shlex.quote(str(path))}", where=str(path)
        )
    raw, marks = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(
            f"a recipe is a mapping of keys, not {shape.describe(raw)}", how="see recipes/", where=str(path)
        )
    problems = move_aliases(raw, marks)
    problems += apply_overrides(raw, marks, overrides)
    recipe, invalid = validate(convert_values(_without_empty_sections(raw)))
    problems += invalid
    if recipe is not None and not problems:
        problems = check(recipe)
    if recipe is None or problems:
        located = [_located(problem, marks, path) for problem in problems]
        raise UserError.of(sorted(located, key=_line))
    return LoadedRecipe(recipe, path, marks)


def resolve(loaded: LoadedRecipe) -> Recipe:
    """The recipe that repeats this run from anywhere: absolute paths, and a new directory beside this run's.

    Input paths that exist become absolute; hub ids stay. In `output_dir` `{name}` is filled in and `{n}` left open; a
    name without a placeholder that makes it unique gets `-{n}`.
    """
    recipe = loaded.recipe

    def absolute(kind: str, datasets: Sequence[DatasetSection]) -> tuple[DatasetSection, ...]:
        resolved = []
        for index, dataset in enumerate(datasets):
            key: KeyPath = ("data", kind, index)
            update = {"path": _absolute_input(dataset.path, loaded.directory((*key, "path")))}
            if isinstance(dataset.templates, str):
                update["templates"] = _absolute_templates(dataset.templates, loaded.directory((*key, "templates")))
            resolved.append(dataset.model_copy(update=update))
        return tuple(resolved)

    model = {
        name: _absolute_input(value, loaded.directory(("model", name)), patterns=False)
        for name in ("chat_template", "tokenizer")
        if (value := getattr(recipe.model, name)) is not None
    }
    method = recipe.method
    if (start := getattr(method, "init_from", None)) is not None:
        # Never a hub id: the recipe stays the same when what it began with is gone.
        path = loaded.directory(("method", "init_from")) / Path(start).expanduser()
        method = method.model_copy(update={"init_from": os.path.abspath(path)})
    data = {"train": absolute("train", recipe.data.train), "eval": absolute("eval", recipe.data.eval)}
    return recipe.model_copy(
        update={
            "base_model": _absolute_input(recipe.base_model, loaded.directory(("base_model",))),
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update=data),
            "method": method,
            "output_dir": _resolved_output(recipe.output_dir, loaded.path.stem),
        }
    )


def dump_recipe(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back to an equal recipe.

    Defaults are written out; keys that are null or empty by default are left out.
    """
    return yaml.dump(
        _plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110
    )


def _resolved_output(output_dir: str, name: str) -> str:
    # Braces in a file's or directory's own name must not pass for placeholders.
    text = os.path.expanduser(output_dir.replace("{name}", re.sub("[{}]", "_", name)))
    here = os.getcwd()
    text = str(Path(text) if re.search("[{}]", here) else Path(here) / text)
    return text if "{n}" in text or "{time}" in text else text + "-{n}"


def _absolute_input(text: str, base: Path, *, patterns: bool = True) -> str:
    """`text` as an absolute path where it names something local, relative to `base`; else unchanged."""
    if text.startswith(HUB_PREFIX):
        return text
    relative = os.path.expanduser(text)
    if os.path.exists(path := base / relative):
        return str(path)
    if patterns and glob.has_magic(text):
        pattern = os.path.join(glob.escape(str(base)), relative)
        if glob.glob(pattern, recursive=True):
            return pattern
    return text


def _absolute_templates(text: str, base: Path) -> str:
    """FILE.yaml or FILE.yaml:NAME with an absolute path; a name of the library is no file."""
    file, suffix, name = text.partition(".yaml")
    return _absolute_input(file + suffix, base, patterns=False) + name if suffix else text


def _without_empty_sections(value: Any, path: KeyPath = ()) -> Any:
    """`value`, which stands at `path`, without sections whose keys are all commented out, which YAML reads as null."""
    if isinstance(value, dict):
        return {
            key: _without_empty_sections(item, (*path, key))
            for key, item in value.items()
            if item is not None or not shape.is_section((*path, key))
        }
    if isinstance(value, list):
        return [_without_empty_sections(item, (*path, index)) for index, item in enumerate(value)]
    return value


def _located(problem: Problem, marks: dict[KeyPath, str], path: Path) -> Problem:
    if problem.where is not None:
        return problem
    return replace(problem, where=f"{_mark(problem.key, marks) or path}: {dotted(problem.key)}")


def _mark(key: KeyPath, marks: dict[KeyPath, str]) -> str | None:
    """Where `key`, or the nearest section or list around it, was written; None where a default is meant."""
    places = (marks.get(key[:length]) for length in range(len(key), 0, -1))
    return next((place for place in places if place), None)


def _line(problem: Problem) -> tuple[int, int]:
    """Sorts by line; what has none comes first in the file, and the command line last."""
    place = re.match(r".*?:(\d+)(?=:|$)", problem.where or "")
    return (0, int(place[1])) if place else (int((problem.where or "").startswith("command line")), 0)


def _plain(value: Any) -> Any:
    """Sections and tuples as dicts and lists."""
    if isinstance(value, Section):
        known = {
            name: plain
            for name, field in type(value).model_fields.items()
            if (plain := _plain(value.__dict__[name])) not in (None, [], {}) or value.__dict__[name] != field.default
        }
        # Columns that only the phrasings know.
        return known | {name: _plain(inner) for name, inner in (value.model_extra or {}).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Dumper(yaml.SafeDumper):
    """Quotes text that `parse_scalar` would read as something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Line breaks of YAML 1.1 that are none to anybody else are read back only as escapes.
        unusual = any(character in text for character in "\r\x85\u2028\u2029")
        style = '"' if unusual else "'" if not is_text(text) else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
