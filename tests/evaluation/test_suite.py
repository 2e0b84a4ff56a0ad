"""Suites: rows become items, and everything that is wrong is said at once, with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftkit.data.types import Conversation, Message, Text
from ftkit.errors import UserError
from ftkit.evaluation.items import Item, Task, validation_tasks
from ftkit.evaluation.metrics import METRICS
from ftkit.evaluation.schema import TaskSection
from ftkit.evaluation.suite import Suite, read_suite

REVIEWS = [
    {"task": "sst2", "inputs": {"text": "dull"}, "target": "negative"},
    {"task": "sst2", "inputs": {"text": "a joy"}, "target": "positive"},
    {"task": "sst2", "inputs": {"text": "fine"}, "target": "positive"},
    {"task": "sst2", "inputs": {"text": "awful"}, "target": "negative"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def suite_of(directory: Path, text: str, rows: list[dict[str, Any]] = REVIEWS, **arguments: Any) -> Suite:
    write(directory / "rows.jsonl", rows)
    (directory / "suite.yaml").write_text(text, encoding="utf-8")
    return read_suite(directory / "suite.yaml", **arguments)


def task_of(directory: Path, keys: str, rows: list[dict[str, Any]] = REVIEWS, **arguments: Any) -> Task:
    text = "tasks:\n  - name: t\n    path: rows.jsonl\n" + "".join(f"    {line}\n" for line in keys.splitlines())
    (task,) = suite_of(directory, text, rows, **arguments).tasks
    return task


def problems_of(directory: Path, text: str, rows: list[dict[str, Any]] = REVIEWS) -> list[str]:
    with pytest.raises(UserError) as caught:
        suite_of(directory, text, rows)
    return [str(problem).replace(f"{directory}/", "") for problem in caught.value.problems]


def asked(item: Item) -> str:
    assert isinstance(item.document, Conversation)
    return item.document.messages[-2].content


# ------------------------------------------------------------------------------------------------------- rows


def test_the_suite_of_the_documentation(tmp_path: Path) -> None:
    suite = suite_of(
        tmp_path,
        """
prompt: auto
tasks:
  - name: sst2
    path: rows.jsonl
    template: "Review: {text}\\nIs it positive or negative?"
    options: [negative, positive]
    metric: rank_accuracy
    cluster: sentiment
    shots: 0
    limit: 200
""",
    )
    (task,) = suite.tasks
    assert (suite.prompt, task.name, task.cluster, task.metrics) == ("auto", "sst2", "sentiment", ("rank_accuracy",))
    assert [asked(item) for item in task.items][:1] == ["Review: dull\nIs it positive or negative?"]
    assert [item.truth.references for item in task.items][:2] == [("negative",), ("positive",)]
    assert task.items[0].truth.options == ("negative", "positive")
    assert task.items[2].where.endswith("rows.jsonl:3")


def test_a_template_takes_plain_rows_and_numbered_labels(tmp_path: Path) -> None:
    rows = [{"sentence": "dull", "label": 0}, {"sentence": "a joy", "label": 1}]
    keys = 'template: "{sentence}?"\ncolumns: {target: label}\noptions: [bad, good]\nmetric: [rank_accuracy, accuracy]'
    task = task_of(tmp_path, keys, rows)
    assert [(asked(item), item.truth.references) for item in task.items] == [("dull?", ("bad",)), ("a joy?", ("good",))]
    assert task.metrics == ("rank_accuracy", "accuracy")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 2], ["1", "2", "3"]),
        ([1, 2, 1], ["1", "2", "1"]),
        ([1, 2, 3], ["1", "2", "3"]),
        (["3", "1", "1"], ["3", "1", "1"]),
    ],
)
def test_labels_that_are_options_are_no_numbers_of_options(
    tmp_path: Path, labels: list[Any], expected: list[str]
) -> None:
    rows = [{"text": "x", "stars": label} for label in labels]
    keys = 'template: "{text}"\ncolumns: {target: stars}\noptions: ["1", "2", "3"]\nmetric: rank_accuracy'
    assert [item.truth.references[0] for item in task_of(tmp_path, keys, rows).items] == expected


def test_every_row_may_have_its_own_options_and_several_references(tmp_path: Path) -> None:
    rows = [
        {"inputs": {"question": "2+2?", "choices": ["3", 4]}, "target": "4"},
        {"inputs": {"question": "capital?", "choices": ["Bern", "Basel"]}, "target": "Bern", "references": ["Berne"]},
    ]
    task = task_of(tmp_path, 'template: "{question}"\noptions_field: choices\nmetric: rank_accuracy', rows)
    assert [item.truth.options for item in task.items] == [("3", "4"), ("Bern", "Basel")]
    assert task.items[1].truth.references == ("Bern", "Berne")
    # Without a template the options of a task record are found by themselves.
    rows = [{"inputs": {"question": "2+2?", "options": ["3", "4"]}, "target": "4"}]
    assert task_of(tmp_path, "metric: rank_accuracy", rows).items[0].truth.options == ("3", "4")


def test_rows_of_other_formats_need_no_template(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}]
    assert asked(task_of(tmp_path, "metric: exact_match", rows).items[0]) == "Add.\n1 and 2"
    task = task_of(tmp_path, "metric: perplexity", [{"text": "just text"}])
    assert task.items[0].document == Text("just text")


def test_limits_keep_the_same_rows_every_time(tmp_path: Path) -> None:
    rows = [{"inputs": {"text": str(index)}, "target": "x"} for index in range(50)]
    keys = "metric: exact_match\nlimit: 20"
    first = task_of(tmp_path, keys, rows).items
    assert first == task_of(tmp_path, keys, rows).items
    places = [int(item.where.rpartition(":")[2]) for item in first]
    assert len(places) == 20
    assert places == sorted(places) != list(range(1, 21))  # a random subset in the order of the file
    assert len(task_of(tmp_path, keys, rows, limit=5).items) == 5
    assert len(task_of(tmp_path, keys, rows, limit=30).items) == 20


def test_shots_are_other_rows_of_the_task(tmp_path: Path) -> None:
    task = task_of(tmp_path, 'template: "Review: {text}"\nshots: 2\nmetric: exact_match')
    assert len(task.items) == 4
    for item, row in zip(task.items, REVIEWS, strict=True):
        assert isinstance(item.document, Conversation)
        messages = item.document.messages
        assert [message.role for message in messages] == ["user", "assistant"] * 3
        assert messages[-2].content == f"Review: {row['inputs']['text']}"
        questions = [message.content for message in messages if message.role == "user"]
        assert len(set(questions)) == 3
    assert task.items == task_of(tmp_path, 'template: "Review: {text}"\nshots: 2\nmetric: exact_match').items


def test_validation_rows_become_tasks() -> None:
    conversation = Conversation(
        (Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2"))
    )
    call = Conversation((Message("user", "q"), Message("assistant", "", tool_calls=({"type": "function"},))))
    chat, text = validation_tasks({"chat": [(4, conversation), (7, call)], "text": [(0, Text("t"))]})
    assert chat.metrics == ("perplexity", "exact_match", "token_f1")
    assert [item.truth.references for item in chat.items] == [("a2",), ()]
    assert chat.rates_all_turns
    assert text.metrics == ("perplexity",)
    many = {"chat": list(enumerate([conversation] * 100))}
    assert len(validation_tasks(many, limit=10)[0].items) == 10


# ----------------------------------------------------------------------------------------------------- errors


def test_all_problems_of_the_file_are_said_at_once(tmp_path: Path) -> None:
    text = """prompt: chatty
tasks:
  - name: a
    path: rows.jsonl
    metric: exact_macth
    limit: many
  - nam: b
    path: rows.jsonl
    metric: [rank_accuracy]
    options: [negative, 1]
    columns: {targte: label}
"""
    problems = problems_of(tmp_path, text)
    assert "suite.yaml:1: prompt: expected one of auto, chat, raw, got the text 'chatty'" in problems
    assert "suite.yaml:5: tasks.0.metric: unknown metric exact_macth; did you mean exact_match?" in problems
    assert "suite.yaml:6: tasks.0.limit: expected a whole number above 0, got the text 'many'" in problems
    assert "suite.yaml:7: tasks.1.nam: unknown key; did you mean name?" in problems
    assert "suite.yaml:7: tasks.1.name: required key is missing; add it" in problems
    assert (
        "suite.yaml:10: tasks.1.options.1: input should be a valid string, got the number 1; put it in quotes"
        in problems
    )
    assert "suite.yaml:11: tasks.1.columns.targte: unknown key; did you mean target?" in problems
    assert len(problems) == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "suite.yaml:1: a suite is a mapping of keys, not a list; list its `tasks`"),
        ("prompt: raw\n", "suite.yaml:1: tasks: required key is missing; add it"),
        ("tasks: []\n", "suite.yaml:1: tasks: expected a list of "),
        (
            "tasks:\n  - {name: a, path: rows.jsonl, metric: exact_match}\n  - {name: a, path: x, metric: token_f1}\n",
            "suite.yaml:1: tasks: a is the name of several tasks; give each its own (`metric` takes a list)",
        ),
        (
            "tasks:\n  - {name: a, path: x, metric: accuracy, options: [a, b], options_field: o}\n",
            "suite.yaml:2: tasks.0: options and options_field exclude each other; keep one of them",
        ),
        (
            'tasks:\n  - {name: a, path: x, metric: accuracy, template: "{q}", columns: {prompt: q}}\n',
            "suite.yaml:2: tasks.0: with a template, columns maps inputs, target and system, not prompt; remove prompt",
        ),
        (
            "tasks:\n  - {name: a, path: missing.jsonl, metric: exact_match}\n",
            "suite.yaml:2: tasks.0.path: no such file: missing.jsonl; ",
        ),
        (
            "tasks:\n  - {name: a, path: rows.jsonl, metric: rank_accuracy}\n",
            "suite.yaml:2: tasks.0: rank_accuracy needs answers to choose from; list them as `options`, or name the "
            "column that holds them as `options_field`",
        ),
        (
            'tasks:\n  - {name: a, path: rows.jsonl, metric: exact_match, template: "{text"}\n',
            "suite.yaml:2: tasks.0.template: not a template: ",
        ),
        (
            'tasks:\n  - {name: a, path: rows.jsonl, metric: token_f1, template: "{text}", columns: {target: label}}\n',
            "suite.yaml:2: tasks.0: rows.jsonl has no column label with the answers; its columns: task, inputs, "
            "target; name it, e.g. `columns: {target: label}`",
        ),
        (
            "tasks:\n  - {name: a, path: rows.jsonl, metric: exact_match, shots: 4}\n",
            "suite.yaml:2: tasks.0.shots: 4 solved examples need as many other rows; set it to at most 3",
        ),
    ],
)
def test_one_problem(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith(expected)


def test_rows_that_cannot_be_scored_are_said_at_once(tmp_path: Path) -> None:
    text = """tasks:
  - {name: a, path: rows.jsonl, metric: rank_accuracy, options: [positive, neutral], template: "{text}"}
  - {name: b, path: rows.jsonl, metric: exact_match, template: "{review}"}
"""
    problems = problems_of(tmp_path, text)
    rejected = "the answer 'negative' is not among the options (positive, neutral); correct the row or the options"
    assert [problem.partition("rows.jsonl:")[2] for problem in problems[:2]] == [f"1: {rejected}", f"4: {rejected}"]
    (unknown_field,) = problems[2:]
    assert "is no field of the record (and 3 rows more: 2, 3, 4)" in unknown_field


def test_text_has_no_answers(tmp_path: Path) -> None:
    text = "tasks:\n  - {name: a, path: rows.jsonl, metric: exact_match}\n"
    (problem,) = problems_of(tmp_path, text, [{"text": "plain"}])
    assert problem.startswith(
        "suite.yaml:2: tasks.0: plain text asks nothing that could be answered; measure perplexity"
    )


def test_empty_answers_are_refused(tmp_path: Path) -> None:
    text = "tasks:\n  - {name: a, path: rows.jsonl, metric: perplexity}\n"
    (problem,) = problems_of(tmp_path, text, [REVIEWS[0], REVIEWS[1] | {"target": " "}])
    assert "rows.jsonl:2: the answer has no text" in problem


def test_every_metric_can_be_named_and_every_key_says_what_it_is(tmp_path: Path) -> None:
    for name in METRICS:
        assert task_of(tmp_path, f"metric: {name}\noptions: [negative, positive]").metrics == (name,)
    assert all(field.description for field in TaskSection.model_fields.values())


def test_rows_are_asked_in_the_librarys_phrasings(tmp_path: Path) -> None:
    keys, rows = "templates: sst2\ncolumns: {sentence: text}\nmetric: rank_accuracy", REVIEWS * 10
    items = task_of(tmp_path, keys, rows).items
    # A phrasing that lists lettered options is answered by a letter.
    assert {item.truth.options for item in items} == {("negative", "positive"), ("(A)", "(B)")}
    for item, row in zip(items, rows, strict=True):
        assert row["inputs"]["text"] in asked(item)
        assert item.truth.references[0] == item.truth.options[row["target"] == "positive"]
    assert len({asked(item).replace(row["inputs"]["text"], "") for item, row in zip(items, rows, strict=True)}) > 2
    again = task_of(tmp_path, keys, rows).items
    assert [asked(item) for item in items] == [asked(item) for item in again]
