"""Compares sides with the trained model: prompts token by token, then answers, then where these end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ftkit.data.end_of_turn import common_length
from ftkit.verification.client import RefusedError
from ftkit.verification.conversations import Probe
from ftkit.verification.reference import Judged, Parting, Reference
from ftkit.verification.sides import PRECISIONS, Answer, Side

MAX_NEW_TOKENS = 48
"""Tokens of an answer."""
MARGINS = dict(zip(PRECISIONS, (0.05, 0.2, 1.0, 1.5, 2.0), strict=True))
"""Precision of weights -> how much less probable than its favourite the trained model may find a token, in nats.

Rounded weights move every score a little, and where two tokens are almost equally probable another one wins. The
margins lie above what rounding was seen to do, and far below what other weights or another prompt do (docs/serving.md).
"""


@dataclass(frozen=True)
class PromptCheck:
    """What a side feeds its model for one conversation, beside what training feeds."""

    probe: Probe
    expected: tuple[int, ...]
    found: tuple[int, ...] | None
    """None where it refuses the conversation."""
    refusal: str = ""

    @property
    def differs_at(self) -> int | None:
        """The first place where the two are not the same; None where they are equal or it refuses."""
        if self.found is None or self.found == self.expected:
            return None
        return common_length(self.expected, self.found)

    @property
    def equal(self) -> bool:
        """Whether it feeds the same tokens."""
        return self.found == self.expected


@dataclass
class SideReport:
    """What was found out about a side."""

    side: Side
    margin: float
    prompts: list[PromptCheck]
    answers: dict[str, Judged] = field(default_factory=dict)
    """Name of the conversation -> its answer; none where prompts differ, or the side has no model."""
    stops: dict[int, bool | None] = field(default_factory=dict)
    """Token that ends a turn -> whether the side's answers end there."""
    notes: list[str] = field(default_factory=list)

    def prompt_failures(self) -> list[PromptCheck]:
        """Conversations that it renders otherwise, or refuses."""
        return [check for check in self.prompts if not check.equal]

    def clear_parting(self, judged: Judged) -> Parting | None:
        """The first token that the trained model would clearly not have written."""
        return next((one for one in judged.partings if one.gap > self.margin), None)

    def answer_failures(self) -> list[str]:
        """Names of the conversations that it answers otherwise, or whose answers do not end."""
        return [
            name
            for name, judged in self.answers.items()
            if self.clear_parting(judged) is not None or judged.runs_on is not None
        ]

    def fed_failures(self) -> list[str]:
        """Names of the conversations of which it counts another number of tokens than it tokenizes."""
        lengths = {check.probe.name: len(check.expected) for check in self.prompts}
        fed = {name: judged.answer.num_fed for name, judged in self.answers.items()}
        return [name for name, number in fed.items() if number is not None and number != lengths[name]]

    def stop_failures(self) -> list[int]:
        """Tokens that end a turn, behind which its answers go on."""
        return [token_id for token_id, stops in self.stops.items() if stops is False]

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not (self.prompt_failures() or self.answer_failures() or self.fed_failures() or self.stop_failures())


def verify_sides(
    reference: Reference,
    sides: Sequence[Side],
    *,
    load_model: Callable[[], PreTrainedModel],
    compute: str,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[SideReport]:
    """Compare each side with the trained model; only one model is in memory at a time.

    Args:
        load_model: loads the trained model, if any side has answered.
        compute: precision that it computes in.
        on_progress: told what is done next.

    Raises:
        UserError: a side takes no conversation at all.
        NetworkError: a server cannot be reached.
    """
    probes, kwargs = reference.probes(), reference.template.kwargs
    expected = {probe.name: reference.prompt(probe) for probe in probes}
    reports, waiting = [], []
    for side in sides:
        on_progress(f"asking {side.name}")
        coarser = max(side.precision, compute, key=PRECISIONS.index)
        report = SideReport(
            side, MARGINS[coarser], [_check_prompt(side, one, expected[one.name], kwargs) for one in probes]
        )
        report.notes += _unsaid_keywords(side, probes[0], expected[probes[0].name], kwargs)
        answered = _answers(reference, report, kwargs)
        report.stops = {token_id: side.stops_at(token_id, probes[0], kwargs) for token_id in reference.turn_ends}
        reports.append(report)
        waiting.append(answered)
    if any(waiting):
        on_progress("reading the answers with the trained model")
        model = load_model()
        for report, answered in zip(reports, waiting, strict=True):
            for name, answer in answered.items():
                report.answers[name] = reference.judge(model, expected[name], answer)
    return reports


def _check_prompt(side: Side, probe: Probe, expected: Sequence[int], kwargs: Mapping[str, Any]) -> PromptCheck:
    try:
        return PromptCheck(probe, tuple(expected), tuple(side.prompt(probe, kwargs)))
    except RefusedError as error:
        return PromptCheck(probe, tuple(expected), None, str(error.problems[0]))


def _unsaid_keywords(side: Side, probe: Probe, expected: Sequence[int], kwargs: Mapping[str, Any]) -> list[str]:
    """What clients must send, where the template does otherwise by itself than it did in training."""
    if not kwargs or _check_prompt(side, probe, expected, {}).equal:
        return []
    return [f"it feeds other tokens unless requests have chat_template_kwargs: {dict(kwargs)}"]


def _answers(reference: Reference, report: SideReport, kwargs: Mapping[str, Any]) -> dict[str, Answer]:
    """Answers to the conversations that the side renders as training does, and that it has room for."""
    side = report.side
    room = min(reference.context, side.context or reference.context) - MAX_NEW_TOKENS
    equal = [check for check in report.prompts if check.equal and check.probe.answered]
    asked = [(check.probe, check.expected) for check in equal if len(check.expected) <= room]
    if len(asked) < len(equal):
        report.notes.append(
            f"{len(equal) - len(asked)} conversations leave no room for an answer in {room + MAX_NEW_TOKENS} tokens"
        )
    answers = side.answers(asked, kwargs, MAX_NEW_TOKENS) if asked else None
    if answers is None:
        return {}
    return {probe.name: answer for (probe, _), answer in zip(asked, answers, strict=True)}
