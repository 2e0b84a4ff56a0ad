"""Whole evaluations: known scores, the same questions for all, and reports that add up."""

import json
import math
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ftkit.console import Console
from ftkit.data.chat import ChatTemplate
from ftkit.data.encode import Encoder
from ftkit.data.types import Conversation, Message, Text
from ftkit.evaluation.compare import Contestant, evaluate_models
from ftkit.evaluation.items import Item, Task, validation_tasks
from ftkit.evaluation.metrics import Truth
from ftkit.evaluation.prompts import ChatPrompts, RawPrompts
from ftkit.evaluation.report import Report
from tests.tiny_models import CHATML, tiny_model, tiny_tokenizer

COLORS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "rose": "red", "sun": "tan", "sea": "gray"}
OPTIONS = tuple(COLORS.values())
ALL_METRICS = ("rank_accuracy", "exact_match", "accuracy", "token_f1", "perplexity")


def color_task(metrics: tuple[str, ...] = ALL_METRICS) -> Task:
    items = tuple(
        Item(
            Conversation((Message("user", thing), Message("assistant", color))),
            Truth((color,), OPTIONS),
            f"colors:{index}",
        )
        for index, (thing, color) in enumerate(COLORS.items(), start=1)
    )
    return Task("colors", metrics, items, cluster="knowledge")


def chat_prompts(train_on: str = "assistant") -> ChatPrompts:
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, CHATML)
    return ChatPrompts(
        tokenizer,
        Encoder(tokenizer, template, max_length=512, turns="auto", train_on=train_on),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def tuned() -> PreTrainedModel:
    """A model that has learned the colors by heart."""
    model, prompts = tiny_model(seed=1), chat_prompts()
    rows = [prompts.answered(item, item.truth.references[0], 512) for item in color_task().items]
    length = max(row.num_tokens for row in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for index, row in enumerate(rows):
        ids[index, : row.num_tokens] = torch.from_numpy(row.input_ids)
        labels[index, : row.num_tokens] = torch.from_numpy(row.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    return model.eval()


@pytest.fixture(scope="module")
def report(tuned: PreTrainedModel) -> Report:
    base = Contestant("base", tiny_model(seed=2).eval(), chat_prompts())
    return evaluate_models([Contestant("tuned", tuned, chat_prompts()), base], [color_task()])


def own_loss(model: PreTrainedModel, prompts: ChatPrompts, items: tuple[Item, ...]) -> float:
    """The model's own cross-entropy over all targets of the documents, one by one."""
    total, count = 0.0, 0
    for item in items:
        for example in prompts.document(item, 512):
            ids, labels = (torch.from_numpy(a.astype(np.int64))[None] for a in (example.input_ids, example.labels))
            with torch.no_grad():
                total += model(ids, labels=labels).loss.item() * example.num_targets
            count += example.num_targets
    return total / count


def test_a_model_that_knows_the_answers_scores_as_such(report: Report) -> None:
    scores = {(result.model, result.metric): result for result in report.results}
    for metric in ("rank_accuracy", "exact_match", "accuracy", "token_f1"):
        assert scores["tuned", metric].score == 1.0
        assert scores["tuned", metric].interval == (1.0, 1.0)
        assert scores["base", metric].score < 0.6
    assert scores["tuned", "perplexity"].score < 1.1
    assert scores["base", "perplexity"].score > 20
    assert {result.n for result in report.results} == {len(COLORS)}
    for pair in report.comparisons:
        assert pair.significant
        assert pair.difference == pair.tuned - pair.base
        assert pair.interval[0] <= pair.difference <= pair.interval[1]
    assert [answer.text for answer in report.answers["tuned"]["colors"]] == list(COLORS.values())


def test_the_json_is_the_one_that_is_documented(report: Report) -> None:
    values = json.loads(json.dumps(report.to_json()))
    assert {"results", "comparisons"} <= values.keys()
    assert values["results"][0].keys() == {"model", "task", "cluster", "metric", "score", "interval", "n"}
    wanted = {"task", "metric", "base", "tuned", "difference", "interval", "significant"}
    assert wanted <= values["comparisons"][0].keys()
    assert len(values["results"]) == 2 * len(ALL_METRICS)
    assert len(values["comparisons"]) == len(ALL_METRICS)
    assert len(values["results"][0]["interval"]) == 2
    assert isinstance(values["comparisons"][0]["significant"], bool)
    assert values["usage"]["tokens_generated"] > 0


def test_the_table_has_both_models_and_says_what_is_better(report: Report) -> None:
    stream = StringIO()
    Console(stream=stream).table(report.to_table())
    text = stream.getvalue()
    header, *rows = text.splitlines()[1:]
    assert header.split() == ["task", "cluster", "metric", "n", "base", "tuned", "difference"]
    assert len(rows) == len(ALL_METRICS)
    assert "1.000 [1.000, 1.000]" in text
    assert all(row.rstrip().endswith("▲") for row in rows)  # a lower perplexity is better


def test_perplexity_of_validation_rows_is_the_exponential_of_the_loss(tuned: PreTrainedModel) -> None:
    conversation = Conversation(
        (Message("user", "sky"), Message("assistant", "blue"), Message("user", "sun"), Message("assistant", "tan"))
    )
    texts = [Text("the sky"), Text("a much longer text")]
    tasks = validation_tasks({"chat": list(enumerate([conversation, conversation])), "text": list(enumerate(texts))})
    prompts = chat_prompts()
    found = evaluate_models([Contestant("tuned", tuned, prompts)], tasks)
    scores = {(result.task, result.metric): result.score for result in found.results}
    for task in tasks:
        loss = own_loss(tuned, prompts, task.items)
        assert scores[task.name, "perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    chat_scores = {("chat", "perplexity"), ("chat", "exact_match"), ("chat", "token_f1")}
    assert set(scores) == {*chat_scores, ("text", "perplexity")}
    assert found.comparisons == ()


def test_a_model_equals_itself(tuned: PreTrainedModel) -> None:
    pair = [Contestant(label, tuned, chat_prompts()) for label in ("one", "two")]
    report = evaluate_models(pair, [color_task()])
    for comparison in report.comparisons:
        assert (comparison.difference, comparison.interval, comparison.significant) == (0.0, (0.0, 0.0), False)
    assert report == evaluate_models(pair, [color_task()])


def test_scores_do_not_depend_on_the_batches(tuned: PreTrainedModel) -> None:
    contestant = [Contestant("tuned", tuned, chat_prompts())]
    one, many = (evaluate_models(contestant, [color_task()], max_tokens=size) for size in (1, 10_000))
    for left, right in zip(one.results, many.results, strict=True):
        assert left.score == pytest.approx(right.score, abs=1e-5)
        assert left.interval == pytest.approx(right.interval, abs=1e-5)
    assert one.usage.tokens_generated == many.usage.tokens_generated


def test_raw_answers_are_cut_at_the_end_of_their_line(tuned: PreTrainedModel) -> None:
    prompts = RawPrompts(tiny_tokenizer(None))
    item = Item(Conversation((Message("user", "q"), Message("assistant", "a"))), Truth(("a",)), "here:1")
    report = evaluate_models(
        [Contestant("raw", tuned, prompts)], [Task("t", ("exact_match", "perplexity"), (item,), max_new_tokens=20)]
    )
    (answer,) = report.answers["raw"]["t"]
    assert answer.text is not None
    assert "\n" not in answer.text
    assert answer.num_tokens == 2  # the space and the letter


def test_other_tokens_are_no_perplexity_to_compare(tuned: PreTrainedModel) -> None:
    pair = [Contestant("chat", tuned, chat_prompts()), Contestant("raw", tuned, RawPrompts(tiny_tokenizer(None)))]
    task = color_task(("perplexity", "rank_accuracy"))
    first = task.items[0]
    longer = replace(first, document=Conversation(2 * first.document.messages))  # type: ignore[union-attr]
    report = evaluate_models(pair, [replace(task, items=(longer,), rates_all_turns=True)])
    assert [comparison.metric for comparison in report.comparisons] == ["rank_accuracy"]
    assert "not compared" in report.notes[0]


def test_prompts_longer_than_the_model_are_cut() -> None:
    model = tiny_model("gpt2", n_positions=64).eval()
    document = Conversation((Message("user", "word " * 100), Message("assistant", "blue")))
    item = Item(document, Truth(("blue",), ("blue", "green")), "long:1")
    report = evaluate_models([Contestant("gpt2", model, chat_prompts())], [Task("t", ALL_METRICS, (item,))])
    assert len(report.results) == len(ALL_METRICS)


def test_the_rows_of_a_dataset_without_references_are_left_out(tuned: PreTrainedModel) -> None:
    task = color_task(("exact_match", "perplexity"))
    silent = replace(task.items[0], truth=Truth())
    report = evaluate_models(
        [Contestant("tuned", tuned, chat_prompts())], [replace(task, items=(silent, *task.items), rates_all_turns=True)]
    )
    assert [(result.metric, result.n) for result in report.results] == [("exact_match", 7), ("perplexity", 8)]
