"""`ftkit inspect`: what an adapter, or full training, did to the weights, and what two adapters have in common."""

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.console import Console
from ftkit.errors import NetworkError, UserError

if TYPE_CHECKING:
    from ftkit.artifacts.heat_map import Panel
    from ftkit.artifacts.inspection import Inspection
    from ftkit.models.load import BaseModel
    from ftkit.runs import Target


def inspect(
    target: str,
    other: str | None = None,
    *,
    base: str | None = None,
    left: bool = False,
    modules: Sequence[str] = (),
    json: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Print the spectra of the updates of TARGET, or with OTHER the directions that both adapters share.

    Args:
        base: the base model, in place of the one that TARGET names.
        left: compare the directions that updates write to, in place of those that they read.
        modules: only these, as `targets` names them.
        json: print one object instead.
        output: an SVG file to draw a heat map into.
        overwrite: move an `output` that exists to `NAME.old-1`.
    """
    console = Console(quiet=json)
    if output is not None:
        _check_output(output, overwrite=overwrite)
    if other is not None:
        if base is not None:
            raise UserError("two adapters are compared without their base", how="leave --base out")
        _print_comparison(target, other, console, left=left, modules=modules, json=json, output=output)
        return
    if left:
        raise UserError("--left is about the comparison of two adapters", how="name both, or leave it out")
    options = {"offline": offline, "trust_remote_code": trust_remote_code}
    _print_inspection(_inspect(target, base, console, modules, options), console, json=json, output=output)


# ------------------------------------------------------------------------------------------------- one model


def _inspect(
    text: str, base: str | None, console: Console, modules: Sequence[str], options: dict[str, bool]
) -> "Inspection":
    """The inspection of an adapter, with its base where that is at hand, or of a fully trained model."""
    from dataclasses import replace

    from ftkit.artifacts.inspection import inspect_adapter, inspect_factors, inspect_model
    from ftkit.runs import find_target

    directory = _adapter_in(text)
    if directory is None:
        target = find_target(text, base=base, **options)
        return inspect_model(text, target.model, _base_of(target, base, options), console=console, names=modules)
    try:
        target = _with_base(text, base, options)
    except (UserError, NetworkError) as error:
        if base is not None:
            raise
        missing = f"without the base there is no |dW|/|W| and no amplification ({error.problems[0].what}): see --base"
        found = inspect_factors(text, directory, names=modules)
        return replace(found, notes=(missing, *found.notes))
    return inspect_adapter(target, console=console, names=modules)


def _adapter_in(text: str) -> Path | None:
    """Directory of the LoRA that `text` names; None where it is a model or nothing at all.

    Raises:
        UserError: an adapter of another kind.
    """
    from ftkit.methods.files import BOTTLENECK, LORA
    from ftkit.methods.start import PROMPTS
    from ftkit.models.files import ADAPTER_CONFIG_NAME, read_json
    from ftkit.runs import result_of

    directory = result_of(Path(text))
    if not (directory / ADAPTER_CONFIG_NAME).is_file():
        return None
    kind = read_json(directory / ADAPTER_CONFIG_NAME).get("peft_type")
    if kind == BOTTLENECK:
        what = f"{text} holds bottleneck adapters: they have a non-linearity, and change no weight"
        raise UserError(what, how="ftkit inspects LoRA and fully trained models")
    if kind in PROMPTS.values():
        raise UserError(
            f"{text} is a prompt, which changes no weight", how="ftkit inspects LoRA and fully trained models"
        )
    if kind != LORA:
        raise UserError(f"{text} is an adapter of the kind {kind}", how="ftkit inspects LoRA and fully trained models")
    return directory


def _with_base(text: str, base: str | None, options: dict[str, bool]) -> "Target":
    """The adapter, without a prompt beside it, with the base that it was trained on, all of whose files are here."""
    from dataclasses import replace

    from ftkit.methods.files import check_base, identify, read_identity
    from ftkit.runs import find_target

    target = replace(find_target(text, base=base, **options), prompt=None)
    assert target.adapter is not None, text
    check_base(target.adapter, read_identity(target.adapter), identify(target.model, remembered=True))
    return target


def _base_of(target: "Target", base: str | None, options: dict[str, bool]) -> "BaseModel":
    """What a model was trained from."""
    from ftkit.methods.files import check_base, identify
    from ftkit.models.load import find_base
    from ftkit.recipe.schema import ModelSection
    from ftkit.runs import recorded_base

    if target.base is None:
        if base is None:
            raise UserError(f"{target.label} does not say what it was trained from", how="name that with --base")
        return find_base(base, ModelSection(), base=Path.cwd(), **options)
    if target.run is not None and (trained_on := recorded_base(target.run)) is not None:
        check_base(target.run, trained_on, identify(target.base, remembered=True))
    return target.base


def _print_inspection(inspection: "Inspection", console: Console, *, json: bool, output: Path | None) -> None:
    from ftkit.artifacts.inspection_report import inspection_json, inspection_panels, inspection_tables

    for table in inspection_tables(inspection):
        console.table(table)
        console.line()
    _print_notes(inspection.notes, console)
    if json:
        sys.stdout.write(json_module.dumps(inspection_json(inspection)) + "\n")
    if output is not None:
        title = f"{inspection.label}: share of |dW|^2 in the k largest singular values of dW"
        _draw(output, inspection_panels(inspection), console, title=title, rows="rows: W", columns="columns: k")


# ------------------------------------------------------------------------------------------------ two adapters


def _print_comparison(
    one: str, other: str, console: Console, *, left: bool, modules: Sequence[str], json: bool, output: Path | None
) -> None:
    from dataclasses import replace

    from ftkit.artifacts.inspection_report import comparison_json, comparison_panels, comparison_table
    from ftkit.artifacts.similarity import compare_adapters

    directories = _compared(one), _compared(other)
    comparison = compare_adapters((one, other), directories, left=left, names=modules)
    if (seed := _common_seed(directories)) is not None and not left:
        same = f"both runs have seed {seed}: their A began with the same random rows, and share directions for that"
        comparison = replace(comparison, notes=(same, *comparison.notes))
    console.table(comparison_table(comparison))
    console.line()
    _print_notes(comparison.notes, console)
    if json:
        sys.stdout.write(json_module.dumps(comparison_json(comparison)) + "\n")
    if output is not None:
        title = f"phi(i, j) of the {'left singular vectors of B' if left else 'right singular vectors of A'}"
        rows, columns = f"rows: the first i of {one}", f"columns: the first j of {other}"
        _draw(output, comparison_panels(comparison), console, title=title, rows=rows, columns=columns)


def _compared(text: str) -> Path:
    from ftkit.runs import find_target

    directory = _adapter_in(text)
    if directory is None:
        find_target(text)  # Where there is nothing of this name, this says so.
        raise UserError(f"{text} has no adapter", how="two LoRA adapters are compared; inspect a model by itself")
    return directory


def _common_seed(directories: tuple[Path, Path]) -> int | None:
    """The seed that both runs drew their adapters from; None where they did not, or do not say."""
    from ftkit.recipe.load import load_recipe
    from ftkit.runs import RECIPE

    recipes = [directory.parent / RECIPE for directory in directories]
    if not all(path.is_file() for path in recipes):
        return None
    read = [load_recipe(path).recipe for path in recipes]
    began_trained = any(recipe.method.type != "full" and recipe.method.init_from is not None for recipe in read)
    return read[0].seed if read[0].seed == read[1].seed and not began_trained else None


# ---------------------------------------------------------------------------------------------------- output


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Before anything is computed.

    Raises:
        UserError: no SVG file, or it exists.
    """
    from ftkit.artifacts.directory import check_free

    if output.suffix.lower() != ".svg":
        raise UserError(f"{output}: pictures are SVG files, which every browser shows", how="--output NAME.svg")
    if output.is_dir():
        raise UserError(f"{output} is a directory", how="name a file: --output NAME.svg")
    check_free(output, overwrite=overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)


def _draw(output: Path, panels: "Sequence[Panel]", console: Console, *, title: str, rows: str, columns: str) -> None:
    from ftkit.artifacts.heat_map import draw
    from ftkit.models.files import storage_errors
    from ftkit.runs import move_aside, write_whole

    if not panels:
        console.line("note: there is nothing to draw")
        return
    with storage_errors(f"cannot write {output}", how="free space, or choose another --output"):
        if output.exists():
            move_aside(output)
        write_whole(output, draw(panels, title=title, rows=rows, columns=columns))
    console.line(f"written to {output}", style="bold")


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.line(f"note: {note}")
