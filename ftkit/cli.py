"""The `ftkit` command: arguments, help, exit code.

Each verb calls one function of `ftkit/commands/`, imported when it runs, so that `--help` answers at once. Whatever a
user can cause ends as `ftkit: error: [WHERE: ]WHAT; HOW TO MEND IT` on standard error and the exit code of its kind; a
traceback means a bug.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ftkit import options
from ftkit.errors import FtkitError
from ftkit.failures import interrupted, known_failure, usage_error
from ftkit.github import annotations
from ftkit.verbs import Verbs


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ftkit {metadata.version('ftkit')}")
        raise typer.Exit


app = typer.Typer(
    cls=Verbs,
    help="Fine-tune language models from one YAML recipe.",
    epilog="Start with `ftkit train RECIPE --dry-run`; `ftkit VERB --help` describes a verb.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)


@app.callback()
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    recipe: options.RecipeFile,
    overrides: options.Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run of this recipe.")] = False,
    checkpoint: options.FromCheckpoint = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan the run, like `ftkit plan`.")] = False,
    offline: options.Offline = False,
    num_processes: options.NumProcesses = None,
    launch_config: options.LaunchConfig = None,
    trust_remote_code: options.RemoteCode = False,
    smoke: options.Smoke = False,
    smoke_model: options.SmokeModel = None,
) -> None:
    """Fine-tune a model as RECIPE says, into a new run directory."""
    if smoke or smoke_model is not None:
        from ftkit.commands.smoke import smoke as smoke_command

        others: dict[str, object] = {"--resume": resume, "--from": checkpoint, "--overwrite": overwrite}
        others |= {"--dry-run": dry_run, "--num-processes": num_processes, "--launch-config": launch_config}
        others |= {"--smoke": not smoke}
        common = {"offline": offline, "trust_remote_code": trust_remote_code}
        smoke_command(recipe, overrides or [], model=smoke_model, others=others, **common)
        return
    from ftkit.commands.train import train as command

    command(
        recipe,
        overrides or [],
        resume=resume,
        checkpoint=checkpoint,
        overwrite=overwrite,
        dry_run=dry_run,
        offline=offline,
        num_processes=num_processes,
        launch_config=launch_config,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def init(
    source: options.Source,
    model: options.Model = None,
    method: options.MethodName = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe.")] = Path("recipe.yaml"),
    overwrite: options.Overwrite = False,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Write a first recipe, from your data or another tool's configuration."""
    from ftkit.commands.init import init as command

    common = {"overwrite": overwrite, "offline": offline, "trust_remote_code": trust_remote_code}
    command(source, model=model, method=method, output=output, **common)


@app.command()
def plan(
    recipe: options.RecipeFile,
    overrides: options.Overrides = None,
    model_only: options.ModelOnly = False,
    memory: options.DeviceMemory = None,
    num_processes: options.NumProcesses = None,
    json: options.Json = False,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Show what RECIPE will do and need, without loading weights."""
    from ftkit.commands.plan import plan as command

    command(
        recipe,
        overrides or [],
        model_only=model_only,
        memory=memory,
        num_processes=num_processes,
        json=json,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def preview(
    recipe: options.RecipeFile,
    overrides: options.Overrides = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Only this data set.")] = None,
    row: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only this row, counted from 0.")] = None,
    dropped: Annotated[bool, typer.Option("--dropped", help="The rows that were left out, with the reasons.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line: ids, labels, text.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Examples of each data set.")] = None,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Show what the model will see: tokens, which of them are trained on, what was dropped and why."""
    from ftkit.commands.preview import preview as command

    common = {"offline": offline, "trust_remote_code": trust_remote_code}
    command(recipe, overrides or [], dataset=dataset, row=row, dropped=dropped, json=json, limit=limit, **common)


@app.command()
def merge(
    adapters: options.Adapters,
    base: options.Base = None,
    output: options.MergeOutput = None,
    dtype: options.Dtype = None,
    proof: options.Proof = "full",
    overwrite: options.Overwrite = False,
    onto_stored: options.OntoStored = False,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Fold LoRA into the base model's weights, or take it off again, and prove the result."""
    from ftkit.commands.merge import merge as command

    common = {"overwrite": overwrite, "offline": offline, "trust_remote_code": trust_remote_code}
    command(adapters, base=base, output=output, dtype=dtype, proof=proof, onto_stored=onto_stored, **common)


@app.command(name="eval")
def evaluate(
    target: options.Target,
    suite: options.Suite = None,
    compare: options.Compare = None,
    no_compare: Annotated[bool, typer.Option("--no-compare", help="Do not compare a run with its base.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most so many rows a task.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the results as JSON.")] = None,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Measure a model, side by side with what it was tuned from."""
    from ftkit.commands.eval import evaluate as command

    common = {"offline": offline, "trust_remote_code": trust_remote_code}
    command(target, suite=suite, compare=compare or [], no_compare=no_compare, limit=limit, output=output, **common)


@app.command()
def export(
    target: options.Target,
    format: options.ExportFormat,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default RUN/export.")] = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Write a model in the form that other tools read."""
    from ftkit.commands.export import export as command

    common = {"overwrite": overwrite, "offline": offline, "trust_remote_code": trust_remote_code}
    command(target, format=format, output=output, dtype=dtype, **common)


@app.command()
def verify(
    target: options.Target,
    endpoint: options.Endpoint = None,
    model: options.ServedModel = None,
    exported: options.Exported = None,
    timeout: options.Timeout = 120.0,
    json: options.Json = False,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Compare exported files or a server with what was trained: tokens, answers, where they end."""
    from ftkit.commands.verify import verify as command

    common = {"offline": offline, "trust_remote_code": trust_remote_code}
    command(target, endpoint=endpoint, model=model, exported=exported or [], timeout=timeout, json=json, **common)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="ADAPTER|RUN", help="A run, checkpoint, adapter or trained model.")],
    other: options.InspectOther = None,
    base: options.Base = None,
    left: options.Left = False,
    modules: options.Modules = None,
    json: options.Json = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw a heat map.")] = None,
    overwrite: options.Overwrite = False,
    offline: options.Offline = False,
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Show what training changed: singular values, ranks, sizes; or what two adapters share."""
    from ftkit.commands.inspect import inspect as command

    common = {"overwrite": overwrite, "offline": offline, "trust_remote_code": trust_remote_code}
    command(target, other, base=base, left=left, modules=modules or [], json=json, output=output, **common)


@app.command()
def diff(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.")],
    tolerance: options.Tolerance = 0.0,
    ignore: options.Ignore = None,
    json: options.Json = False,
) -> None:
    """Say where two runs part; exit code 6 if they do."""
    from ftkit.commands.diff import diff as command

    command(run, other, tolerance=tolerance, ignore=ignore or [], json=json)


@app.command()
def doctor(json: options.Json = False, offline: options.Offline = False) -> None:
    """Show what this machine has and can do: versions, devices, speed, disk, hub."""
    from ftkit.commands.doctor import doctor as command

    command(json=json, offline=offline)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from ftkit.commands.schema import schema as command

    command()


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        code = run(sys.argv[1:])
    except Exception:
        # A bug. What Python does by itself, but here, so that one of several processes ends as below.
        traceback.print_exc()
        code = FtkitError.exit_code
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads of gloo outlive the process group and may abort the interpreter while it shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code. Only bugs raise."""
    try:
        code = typer.main.get_command(app).main(args=list(arguments), prog_name="ftkit", standalone_mode=False)
        sys.stdout.flush()
    except FtkitError as error:
        return _fail(error)
    except typer.TyperException as error:
        return _fail(usage_error(error, arguments))
    except (KeyboardInterrupt, typer.Abort):
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as end:  # What typer makes of a broken pipe.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return _reader_gone()
    except (OSError, MemoryError, RuntimeError) as error:
        known = known_failure(error, arguments)
        if known is None:
            raise
        return _fail(known)
    if code == 128 + signal.SIGINT:
        return _fail(interrupted())
    return int(code or 0)


def _fail(error: FtkitError) -> int:
    for problem in error.problems:
        print(f"ftkit: error: {problem}", file=sys.stderr)
    for line in annotations(error.problems):
        # The runner reads both streams; this one is not what a caller parses.
        print(line, file=sys.stderr)
    if error.last_line is not None:
        print(error.last_line)
    sys.stdout.flush()
    return error.exit_code


def _reader_gone() -> int:
    """`ftkit schema | head -1`: end like any other program in a pipe, quietly."""
    # A second attempt to flush at exit would print a traceback.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


if __name__ == "__main__":
    main()
