"""`ftkit verify`: does what was exported, or a server, see and say what was trained?"""

import json as json_module
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.console import Console, make_table
from ftkit.errors import CheckFailedError, UserError

if TYPE_CHECKING:
    from ftkit.runs import Target
    from ftkit.verification.compare import PromptCheck, SideReport
    from ftkit.verification.reference import Judged, Parting, Reference
    from ftkit.verification.sides import Side

SHOWN_PROMPTS, SHOWN_BEFORE, SHOWN_AFTER, SHOWN_TEXT = 3, 3, 5, 32
"""Differing prompts shown, tokens around their first difference, and characters of an answer."""


def verify(
    target: str,
    *,
    endpoint: str | None = None,
    model: str | None = None,
    exported: Sequence[Path] = (),
    timeout: float = 120.0,
    json: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Compare TARGET, as it was trained, with its exported files or with a server.

    Args:
        endpoint: address of a server; None: the files.
        model: name of the model on the server, where it has several.
        exported: files that lie elsewhere than in the run.
        timeout: seconds to wait for each of the server's answers.
        json: print one object instead.

    Raises:
        UserError: there is nothing to compare, or the server is none that ftkit knows.
        NetworkError: the server cannot be reached.
        CheckFailedError: something differs.
    """
    import torch

    from ftkit.evaluation.contestants import load_target
    from ftkit.models.load import choose_compute_dtype
    from ftkit.runs import find_target
    from ftkit.verification.client import Client
    from ftkit.verification.compare import verify_sides
    from ftkit.verification.files import find_files
    from ftkit.verification.reference import Reference

    console = Console(quiet=json)
    if endpoint is None and model is not None:
        raise UserError("--model names a server's model", how="say which server with --endpoint URL")
    if endpoint is not None and exported:
        raise UserError("--exported names files, --endpoint a server", how="verify one after the other")
    # An address that is none, or where nobody listens, is told before anything is loaded.
    client = Client(endpoint, seconds=timeout) if endpoint is not None else None

    # 1. What was trained, and what it is compared with.
    found = find_target(target, offline=offline, trust_remote_code=trust_remote_code)
    trained = _trained(found, offline=offline, trust_remote_code=trust_remote_code)
    reference = Reference(trained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A few hundred tokens: a CPU has the time to be exact, a GPU may lack the memory.
    dtype = choose_compute_dtype("auto", device)[0] if device.type == "cuda" else torch.float32
    files = find_files(trained, exported, device=device, compute=dtype) if client is None else []
    sides: Sequence[Side] = files if client is None else [_find_server(client, model, found)]

    # 2. The comparison, which takes a while: answers are computed one token after another.
    console.line(f"comparing  {target} with {', '.join(side.name for side in sides)}")
    with console.progress("verifying", total=len(sides) + 1) as bar:
        steps = iter(range(len(sides) + 1))
        reports = verify_sides(
            reference,
            sides,
            load_model=lambda: load_target(trained, dtype=dtype, device=device),
            compute=str(dtype).removeprefix("torch."),
            on_progress=lambda what: bar.update(next(steps), what),
        )

    # 3. What it comes to.
    if json:
        sys.stdout.write(json_module.dumps(_to_json(target, reference, reports)) + "\n")
    for report in reports:
        _print(report, reference, console)
    for note in _notes(reference, reports, endpoint):
        console.line(f"note: {note}")
    if failed := [report for report in reports if not report.holds]:
        raise CheckFailedError.of(
            problem
            for report in failed
            for problem in CheckFailedError(_verdict(report, reference), how=report.side.hint).problems
        )
    console.line(f"verified   {target}", style="bold")


def _trained(found: "Target", *, offline: bool, trust_remote_code: bool) -> "Target":
    """What the named target is compared with: of RUN/merged and RUN/export the run, for they would equal themselves."""
    from ftkit.methods.beside import DIRECTORY as PROMPT
    from ftkit.runs import EXPORT, MERGED, find_target

    name = Path(found.label).name
    if found.run is not None and name == PROMPT:
        what = "a soft prompt beside an adapter is another model by itself"
        raise UserError(what, where=found.label, how=f"verify {found.run}")
    if found.run is None or name not in (MERGED, EXPORT):
        return found
    return find_target(str(found.run), offline=offline, trust_remote_code=trust_remote_code)


def _find_server(client: Any, model: str | None, found: "Target") -> "Side":
    from ftkit.runs import EXPORT, MERGED
    from ftkit.verification.servers import find_server

    run = [found.run / name for name in (MERGED, EXPORT)] if found.run is not None else []
    places = [path for path in (found.adapter, found.tokenizer, found.model.path, *run) if path is not None]
    return find_server(client, model=model, directories=places)


# ------------------------------------------------------------------------------------------------ for people


def _print(report: "SideReport", reference: "Reference", console: Console) -> None:
    console.line(f"{report.side.name}: {report.side.kind}", style="bold")
    columns = [("conversation", "left"), ("tokens", "right"), ("prompt", "left"), ("answer", "left")]
    columns += [("stops", "left"), ("text", "left")]
    table = make_table("", columns)
    for check in report.prompts:
        judged = report.answers.get(check.probe.name)
        row = [check.probe.name, str(len(check.expected)), _prompt(check, report)]
        table.add_row(*row, *(("-", "-", "") if judged is None else _answer_cells(judged, report)))
    console.table(table)
    for token_id, stops_there in report.stops.items():
        how = {True: "ends an answer", False: "DOES NOT end an answer", None: "may end an answer; not found out"}
        console.line(f"end        {reference.token(token_id)} {how[stops_there]}")
    for line in _details(report, reference):
        console.line(line)
    for note in report.notes:
        console.line(f"note: {note}")
    console.line()


def _prompt(check: "PromptCheck", report: "SideReport") -> str:
    if check.found is None:
        return "REFUSED"
    if check.probe.name in report.fed_failures():
        return "ANOTHER NUMBER FED"
    return "equal" if check.equal else f"DIFFERS at {check.differs_at}"


def _answer(judged: "Judged", report: "SideReport") -> str:
    number = len(judged.ids)
    if (parting := report.clear_parting(judged)) is not None:
        return f"DIFFERS at {parting.place}"
    if judged.worst is not None:
        return f"{number} tokens, near tie at {judged.partings[0].place}"
    return f"equal, {number} tokens"


def _answer_cells(judged: "Judged", report: "SideReport") -> tuple[str, str, str]:
    text = " ".join(judged.answer.text.split())
    return _answer(judged, report), _stops(judged), text[:SHOWN_TEXT] + ("..." if len(text) > SHOWN_TEXT else "")


def _stops(judged: "Judged") -> str:
    if judged.runs_on is not None:
        return f"RUNS ON past {judged.runs_on}"
    return "yes" if judged.answer.stopped else "not within these"


def _details(report: "SideReport", reference: "Reference") -> Iterator[str]:
    """Both sides' tokens around the first differences: where a template is another, all conversations have them."""
    failures = report.prompt_failures()
    for check in failures[:SHOWN_PROMPTS]:
        yield f"{check.probe.name}, prompt: {check.refusal}" if check.found is None else f"{check.probe.name}, prompt:"
        if check.found is not None and (at := check.differs_at) is not None:
            yield f"  trained   {_around(check.expected, at, reference)}"
            yield f"  found     {_around(check.found, at, reference)}"
    if len(failures) > SHOWN_PROMPTS:
        yield f"and {len(failures) - SHOWN_PROMPTS} prompts more (--json has the tokens of all)"
    for name, judged in report.answers.items():
        if name in report.fed_failures():
            yield f"{name}, prompt: it counts {judged.answer.num_fed} tokens where it tokenizes another number"
        if judged.runs_on is not None:
            end = reference.token(judged.ids[judged.runs_on])
            yield f"{name}, answer: goes on after {end}, {_around(judged.ids, judged.runs_on, reference)}"
        clear = report.clear_parting(judged)
        if clear is not None:
            yield f"{name}, answer: {_parting(clear, reference)}"
            yield f"  found     {_around(judged.ids, clear.place, reference)}"
        elif judged.worst is not None:
            yield f"note: {name}, answer: {_parting(judged.worst, reference)}, a near tie"


def _parting(parting: "Parting", reference: "Reference") -> str:
    from math import exp

    taken = "the end" if parting.taken is None else repr(reference.token(parting.taken))
    return (
        f"token {parting.place} is {taken}; the trained model has {reference.token(parting.favoured)!r}, "
        f"with probability {exp(parting.favoured_log_prob):.3f} against {exp(parting.taken_log_prob):.3g}"
    )


def _around(ids: Sequence[int], at: int, reference: "Reference") -> str:
    before = [f"{reference.token(one)!r}" for one in ids[max(0, at - SHOWN_BEFORE) : at]]
    after = [f"{reference.token(one)!r} ({one})" for one in ids[at : at + SHOWN_AFTER]] or ["the end"]
    return " ".join(([*before] if at <= SHOWN_BEFORE else ["...", *before]) + [">>", *after])


def _notes(reference: "Reference", reports: "Sequence[SideReport]", endpoint: str | None) -> Iterator[str]:
    if reference.encoder.system_prompt is not None:
        yield "the run was trained with data.system_prompt, which no template holds: clients must send it"
    if endpoint is None and not any(report.answers for report in reports):
        yield "no answers were compared: ftkit merge or export makes a model to compare, --endpoint URL names a server"


def _verdict(report: "SideReport", reference: "Reference") -> str:
    """The failure in one line, with its first difference."""
    parts = []
    if prompts := report.prompt_failures():
        first, of = prompts[0], f"{len(prompts)} of {len(report.prompts)} prompts differ"
        if first.found is None:
            parts.append(f"{of} ({first.refusal})")
        else:
            at = first.differs_at or 0
            ours, theirs = (_token_at(ids, at, reference) for ids in (first.expected, first.found))
            parts.append(f"{of} ({first.probe.name}: token {at} is {theirs} where training has {ours})")
    if fed := report.fed_failures():
        judged = report.answers[fed[0]]
        parts.append(f"it feeds {judged.answer.num_fed} tokens of {fed[0]!r} where it tokenizes another number")
    if answers := report.answer_failures():
        judged = report.answers[answers[0]]
        clear = report.clear_parting(judged)
        what = f"goes on after {reference.token(judged.ids[judged.runs_on])}" if judged.runs_on is not None else ""
        what = _parting(clear, reference) if clear is not None else what
        parts.append(f"{len(answers)} of {len(report.answers)} answers differ ({answers[0]}: {what})")
    if ends := report.stop_failures():
        parts.append(f"answers go on after {reference.token(ends[0])}")
    return f"{report.side.name} is not what was trained: {', '.join(parts)}"


def _token_at(ids: Sequence[int], at: int, reference: "Reference") -> str:
    return repr(reference.token(ids[at])) if at < len(ids) else "the end"


# ------------------------------------------------------------------------------------------------ for machines


def _to_json(target: str, reference: "Reference", reports: "Sequence[SideReport]") -> dict[str, Any]:
    return {
        "target": target,
        "verified": all(report.holds for report in reports),
        "compared": [_side_to_json(report, reference) for report in reports],
    }


def _side_to_json(report: "SideReport", reference: "Reference") -> dict[str, Any]:
    conversations = []
    for check in report.prompts:
        prompt = {
            "equal": check.equal,
            "differs_at": check.differs_at,
            "refusal": check.refusal or None,
            "trained_ids": list(check.expected),
            "found_ids": None if check.found is None else list(check.found),
        }
        judged = report.answers.get(check.probe.name)
        conversations.append(
            {"name": check.probe.name, "prompt": prompt, "answer": judged and _answer_to_json(judged, report)}
        )
    return {
        "name": report.side.name,
        "kind": report.side.kind,
        "verified": report.holds,
        "margin": report.margin,
        "conversations": conversations,
        "stops": {reference.token(token_id): stops for token_id, stops in report.stops.items()},
        "notes": report.notes,
    }


def _answer_to_json(judged: "Judged", report: "SideReport") -> dict[str, Any]:
    return {
        "text": judged.answer.text,
        "ids": list(judged.ids),
        "stopped": judged.answer.stopped,
        "runs_on": judged.runs_on,
        "equal": report.clear_parting(judged) is None and judged.runs_on is None,
        "partings": [asdict(parting) for parting in judged.partings],
    }
