"""Every chat template that trl ships, on fifty conversations: ids as a server has them, targets as marked by others.

Real tokenizers are taken in by FTKIT_TEST_TOKENIZERS, directories separated by colons; `make test-tokenizers` fetches
them. `python -m tests.data.test_chat_templates` writes the table of docs/chat_templates.md anew.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from ftkit.data.chat import ChatTemplate
from ftkit.data.encode import Encoder
from ftkit.data.types import IGNORE, Conversation, Example
from ftkit.errors import UserError
from tests.data.conversations import Case, cases
from tests.data.template_reference import form_of, marked_turn, prints_thoughts, server_text
from tests.data.trl_templates import SMALL_TOKENIZERS, read_template, template_names, tokenizer_for

PAGE = Path(__file__).parents[2] / "docs" / "chat_templates.md"
REAL_TOKENIZERS = [path for path in os.environ.get("FTKIT_TEST_TOKENIZERS", "").split(":") if path]
SAMPLE = (0, 3, 9, 13, 14)
"""Conversations of every kind, with thoughts of both forms."""
REFUSED = {
    "deepseek_r1_distill": "does not begin a turn with its own generation prompt",
    "deepseekv3": "does not begin a turn with its own generation prompt",
    "glm4moe": "prints nothing after the assistant's turn that would stop generation",
    "idefics3": "does not print the assistant's turn",
    "llava_next": "fails: 'str object' has no attribute 'text'",
    "smolvlm": "does not print the assistant's turn",
}
"""Templates that no conversation can be trained with, and why plain ones cannot."""

Keywords = tuple[tuple[str, bool], ...]


def settings() -> list[tuple[str, Keywords]]:
    """(template, keywords): without any, and without thinking where the template knows that."""
    found: list[tuple[str, Keywords]] = []
    for name in template_names():
        found.append((name, ()))
        if "enable_thinking" in read_template(name):
            found.append((name, (("enable_thinking", False),)))
    return found


@dataclass
class Outcome:
    """What became of one template's conversations."""

    one_example: int = 0
    one_a_turn: int = 0
    refused: dict[str, list[frozenset[str]]] = field(default_factory=dict)
    """Reason -> what is in each conversation that is refused for it."""
    raised: int = 0
    """Of the refused, those that the template itself fails on; all others were rendered."""
    turns: Counter[str] = field(default_factory=Counter)
    """Trained turns by what they were compared with: marks, hand, both."""
    seams: int = 0
    """Examples whose ids differ from the rendering's, because the tokenizer merges prompt and answer."""


@cache
def outcome(name: str, keywords: Keywords, source: str, chosen: tuple[int, ...] | None = None) -> Outcome:
    """Encode the conversations and compare each with its references."""
    tokenizer, kwargs = tokenizer_for(name, source), dict(keywords)
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer, read_template(name), kwargs), max_length=1_000_000)
    result = Outcome()
    everything = cases()
    for case in everything if chosen is None else [everything[index] for index in chosen]:
        check = _Check(name, kwargs, tokenizer, encoder, case, result)
        try:
            examples = encoder.encode(case.data, "rows.jsonl:7").examples
        except UserError as error:
            check.refusal(error)
        else:
            check.examples(examples)
    return result


@dataclass
class _Check:
    """One conversation of one template, against its references."""

    name: str
    kwargs: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    case: Case
    result: Outcome

    def __post_init__(self) -> None:
        """`served`: thoughts have a place of their own where the template prints it, as servers read them."""
        messages = (
            apart if prints_thoughts(self.tokenizer, self.kwargs, apart) else data
            for apart, data in zip(self.case.apart.messages, self.case.data.messages, strict=True)
        )
        self.served = replace(self.case.data, messages=tuple(messages))

    def refusal(self, error: UserError) -> None:
        """One line that names the row and what to do; it says so where the template itself fails."""
        (problem,) = error.problems
        assert problem.where == "rows.jsonl:7"
        assert problem.how
        reason = short_reason(problem.what)
        self.result.refused.setdefault(reason, []).append(self.case.kinds)
        if "its own generation prompt" in reason:
            assert not all(map(self._begins_with_prompt, self._turns()))
        if reason == "drops reasoning_content":
            thinking = [
                self.served.messages[turn] for turn in self._turns() if self.served.messages[turn].reasoning_content
            ]
            assert not all(prints_thoughts(self.tokenizer, self.kwargs, message) for message in thinking)
        try:
            server_text(self.tokenizer, self.served, self.kwargs, prompt=False)
        except Exception:  # whatever a template raises
            self.result.raised += 1

    def examples(self, examples: list[Example]) -> None:
        """All turns are targets once, each after a server's prompt, in the ids of the rendering."""
        messages, answers = self.served.messages, self._turns()
        spans = [(example, *span) for example in examples for span in target_spans(example)]
        assert len(spans) == len(answers)
        assert len(examples) in (1, len(answers))
        self.result.one_example += len(examples) == 1
        self.result.one_a_turn += len(examples) > 1
        seam = False
        for turn, (example, start, end) in zip(answers, spans, strict=True):
            history = replace(self.served, messages=messages[:turn])
            told = replace(self.served, messages=messages[: turn + 1])
            prompt = server_text(self.tokenizer, history, self.kwargs, prompt=True)
            assert example.input_ids[:start].tolist() == self._ids(prompt)
            target = self._text(example.input_ids[start:end])
            self._compare_target(told, prompt, target)
            # An example is one with the text's ids, unless they do not begin with those of the prompt.
            whole = server_text(self.tokenizer, told, self.kwargs, prompt=False)[: len(prompt) + len(target)]
            assert self._read(whole) == self._read(prompt) + target
            seam = seam or self._ids(whole)[:start] != self._ids(prompt)
            if turn == answers[-1] or len(examples) > 1:
                assert self._text(example.input_ids) == self._read(whole)
                assert seam or example.input_ids.tolist() == self._ids(whole)
                self.result.seams += seam
                seam = False

    def _compare_target(self, conversation: Conversation, prompt: str, target: str) -> None:
        by_marks = marked_turn(self.name, self.tokenizer, conversation, self.kwargs, prompt)
        by_hand = form_of(self.name, self.kwargs).turn(conversation)
        if self.name == "diffusion_gemma" and conversation.messages[-1].tool_calls:
            by_marks = None  # They leave out the token at which its servers stop.
        for expected in (by_marks, by_hand):
            assert expected is None or target == self._read(expected)
        known = [name for name, text in (("marks", by_marks), ("hand", by_hand)) if text is not None]
        self.result.turns[" and ".join(known) or "neither"] += 1

    def _turns(self) -> list[int]:
        return [index for index, message in enumerate(self.served.messages) if message.role == "assistant"]

    def _begins_with_prompt(self, turn: int) -> bool:
        history = replace(self.served, messages=self.served.messages[:turn])
        told = replace(self.served, messages=self.served.messages[: turn + 1])
        prompt = server_text(self.tokenizer, history, self.kwargs, prompt=True)
        return server_text(self.tokenizer, told, self.kwargs, prompt=False).startswith(prompt)

    def _read(self, text: str) -> str:
        """The text as it comes out of the tokenizer: SentencePiece does not tell the letter ▁ from a space."""
        return text.replace("▁", " ") if self._text(self._ids("▁")) == " " else text

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text(self, ids: np.ndarray | list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def target_spans(example: Example) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.labels != IGNORE, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def short_reason(what: str) -> str:
    """An error's words without what is the row's own."""
    for pattern, words in (
        (r"the chat template cannot be trained on: it ", ""),
        (r"the chat template (fails) on this conversation: ", r"\1: "),
        (r"the chat template ", ""),
        (r" of message \d+ \(\w+\): .*", ""),
        (r" message \d+ with its own generation prompt: .*", " a turn with its own generation prompt"),
        (r" (after|in) (.*), no special token.*", r" in no special token"),
    ):
        what = re.sub(pattern, words, what, flags=re.DOTALL)
    return what


def ids(value: object) -> str:
    return value if isinstance(value, str) else "-".join(f"{key}={setting}" for key, setting in value) or "plain"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "keywords"), settings(), ids=ids)
def test_some_conversations_with_a_tokenizer_that_merges_across_turns(name: str, keywords: Keywords) -> None:
    result = outcome(name, keywords, "seams", SAMPLE)
    assert not result.turns["neither"]
    assert (name in REFUSED) == (not result.one_example + result.one_a_turn)


@pytest.mark.slow
@pytest.mark.parametrize("source", [*SMALL_TOKENIZERS, *REAL_TOKENIZERS])
@pytest.mark.parametrize(("name", "keywords"), settings(), ids=ids)
def test_every_conversation(name: str, keywords: Keywords, source: str) -> None:
    result = outcome(name, keywords, source)
    num_refused = sum(map(len, result.refused.values()))
    assert result.one_example + result.one_a_turn + num_refused == len(cases())
    assert not result.turns["neither"]
    assert (num_refused == len(cases())) == (name in REFUSED)
    if name in REFUSED and not keywords:
        assert REFUSED[name] in result.refused
    without_merges = outcome(name, keywords, "bytes")
    assert not without_merges.seams
    assert result.refused == without_merges.refused
    assert result.one_example <= without_merges.one_example


# ------------------------------------------------------------------------------------------------- the table


def table() -> str:
    """The table of docs/chat_templates.md: what becomes of the conversations where no tokens merge."""
    lines = ["| template | | one example | one a turn | refused |", "|-|-|-:|-:|-|"]
    for name, keywords in settings():
        result = outcome(name, keywords, "bytes")
        verdict = "exact" if result.one_example else "refused"
        if result.one_a_turn:
            verdict = "one example a turn"
        reasons = sorted(result.refused.items(), key=lambda item: -len(item[1]))
        why = "; ".join(f"{len(kinds)}{_with(kinds)}: {reason}" for reason, kinds in reasons)
        label = name + "".join(f", {key}: {str(value).lower()}" for key, value in keywords)
        counts = f"{result.one_example or ''} | {result.one_a_turn or ''}"
        lines.append(f"| {label} | {verdict} | {counts} | {why.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _with(kinds: list[frozenset[str]]) -> str:
    """What all of some conversations have."""
    common = sorted(frozenset.intersection(*kinds))
    return f" with {' and '.join(common)}" if common else ""


def page() -> str:
    """The page with its table made anew."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"^\|.*\|\n(?=\n|\Z)", lambda _: table(), text, count=1, flags=re.DOTALL | re.MULTILINE)


def test_the_page_names_every_template() -> None:
    rows = re.findall(r"^\| (\w+)(, enable_thinking: false)? \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows[1:] == [(name, ", enable_thinking: false" if keywords else "") for name, keywords in settings()]


@pytest.mark.slow
@pytest.mark.skipif(
    f"trl {version('trl')}" not in PAGE.read_text(encoding="utf-8"), reason="another trl than the page's"
)
def test_the_page_says_what_the_code_does() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
