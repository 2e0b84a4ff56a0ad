import json
from typing import Any

import pytest

from ftkit.data.formats import FORMATS, detect_format, overlooked_columns
from ftkit.data.row_parser import parse_rows
from ftkit.data.types import Conversation, Message, Row, Text
from ftkit.errors import UserError
from ftkit.recipe.schema import ColumnsSection, DatasetSection

KEY = ("data", "train", 0)


def section(**keys: Any) -> DatasetSection:
    columns = ColumnsSection(**keys.pop("columns", {}))
    return DatasetSection(path="data.json", columns=columns, **keys)


def parse(*rows: dict[str, Any], **keys: Any) -> list[Any]:
    numbered = [Row(index, fields, f"data.json:{index + 1}") for index, fields in enumerate(rows)]
    return [document for _, document in parse_rows(numbered, section(**keys), key=KEY)]


def turns(document: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in document.messages]


def problem(*rows: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(*rows, **keys)
    return str(caught.value)


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_formats_are_those_of_the_recipe() -> None:
    names = DatasetSection.model_json_schema()["properties"]["format"]["anyOf"][0]["enum"]
    assert list(FORMATS) == names


# ------------------------------------------------------------------------------------------------------ alpaca


def test_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (document,) = parse(row)
    assert turns(document) == [("user", "Add.\n1 2"), ("assistant", "3")]
    (document,) = parse(row | {"input": "", "system": "Be brief.", "history": [["q", "a"]]})
    assert turns(document) == [
        ("system", "Be brief."),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Add."),
        ("assistant", "3"),
    ]
    (document,) = parse({"instruction": "Add.", "input": None, "output": 3, "text": "Below is an instruction"})
    assert turns(document) == [("user", "Add."), ("assistant", "3")]


def test_alpaca_under_other_names() -> None:
    row = {"instruction": "Add.", "context": "1 2", "response": "3", "category": "math"}
    (document,) = parse(row, columns={"input": "context", "output": "response"})
    assert turns(document) == [("user", "Add.\n1 2"), ("assistant", "3")]


def test_self_instruct_and_super_natural_instructions() -> None:
    (document,) = parse({"id": "x", "instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]})
    assert turns(document) == [("user", "Add.\n1 2"), ("assistant", "3")]
    row = {"Definition": "Add.", "input": "1 2", "output": ["3", "three"]}
    (document,) = parse(row, columns={"instruction": "Definition"})
    assert turns(document) == [("user", "Add.\n1 2"), ("assistant", "3")]
    assert document.references == ("3", "three")
    two = [{"input": "", "output": "a"}] * 2
    assert "instances must hold one" in problem({"instruction": "Add.", "instances": two})


# ---------------------------------------------------------------------------------------------------- sharegpt


@pytest.mark.parametrize("answerer", ["gpt", "chatbot", "bot", "assistant", "GPT", "model"])
@pytest.mark.parametrize("asker", ["human", "user"])
def test_sharegpt(asker: str, answerer: str) -> None:
    conversations = [{"from": asker, "value": "q"}, {"from": answerer, "value": "a"}]
    (document,) = parse({"conversations": conversations, "system": "s", "tools": "[]"})
    assert turns(document) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert document.tools == ()


def test_sharegpt_tool_calls_of_glaive() -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Bern"}})
    tool = {"name": "weather", "parameters": {"type": "object"}}
    conversations = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": '{"sun": true}'},
        {"from": "gpt", "value": "a"},
    ]
    (document,) = parse({"conversations": conversations, "tools": json.dumps([tool])})
    assert turns(document) == [("user", "q"), ("assistant", ""), ("tool", '{"sun": true}'), ("assistant", "a")]
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert document.messages[1] == Message("assistant", "", tool_calls=({"type": "function", "function": function},))
    assert document.tools == ({"type": "function", "function": tool},)
    conversations[1]["value"] = f"[{call}, {call}]"
    assert len(parse({"conversations": conversations})[0].messages[1].tool_calls) == 2
    conversations[1]["value"] = "no json"
    assert "conversations[1]: malformed JSON" in problem({"conversations": conversations})


def test_roles_of_the_recipe_come_first() -> None:
    conversations = [{"from": "client", "value": "q"}, {"from": "user", "value": "a"}]
    roles = {"client": "user", "user": "assistant"}
    assert turns(parse({"conversations": conversations}, roles=roles)[0]) == [("user", "q"), ("assistant", "a")]
    message = problem({"conversations": conversations})
    assert "data.json:1: conversations[0]: unknown role 'client'" in message
    assert "`roles: {client: assistant}`" in message
    assert "`roles: {users: user}`" in problem({"messages": [{"role": "users", "content": "a"}]}, format="messages")


# ---------------------------------------------------------------------------------------------------- messages


def test_messages_with_content_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, "c"]
    assert turns(parse(chat(USER, {"role": "assistant", "content": parts}))[0])[1] == ("assistant", "abc")
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    assert "messages[0]: a content part that is no text" in problem(chat(image, ANSWER))


def test_messages_with_tool_calls() -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    result = {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"}
    tool = {"type": "function", "function": {"name": "f"}}
    (document,) = parse(chat(USER, call, result, result, ANSWER, tools=[tool]))
    parsed = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
    assert document.messages[1] == Message("assistant", "", tool_calls=(parsed,))
    assert document.messages[2] == Message("tool", "2", name="f", tool_call_id="c1")
    assert document.tools == (tool,)
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"x": 1}}}
    (document,) = parse(chat(USER, legacy, {"role": "function", "content": "2"}, ANSWER))
    assert document.messages[1].tool_calls[0]["function"]["arguments"] == {"x": 1}
    function["arguments"] = "{"
    assert "messages[1]: arguments: malformed JSON" in problem(chat(USER, call))


def test_reasoning_is_kept() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        (document,) = parse(chat(USER, ANSWER | {name: "because"}))
        assert document.messages[1].reasoning_content == "because"


@pytest.mark.parametrize(
    ("marks", "train"),
    [
        ({}, None),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"weight": 1}, None),
        ({"loss_weight": 0.0}, False),
        ({"loss_weight": 1.0}, None),
        ({"train": None, "weight": None}, None),
    ],
)
def test_marks_of_what_is_trained_on(marks: dict[str, Any], train: bool | None) -> None:
    (document,) = parse(chat(USER | {"loss_weight": 0.0}, ANSWER | marks))
    assert [message.train for message in document.messages] == [None, train]


def test_marks_that_cannot_be_kept_are_errors() -> None:
    assert "weight 0.5 is neither 0 nor 1" in problem(chat(USER, ANSWER | {"weight": 0.5}))
    assert "a turn of user is marked for training" in problem(chat(USER | {"weight": 1}, ANSWER))
    assert "train must be true or false" in problem(chat(USER, ANSWER | {"train": "no"}))


def test_an_empty_answer_is_not_trained_on() -> None:
    documents = parse({"instruction": "q", "output": ""}, {"instruction": "q", "output": "a"})
    assert [document.messages[-1].train for document in documents] == [False, None]


def test_what_follows_the_last_answer_is_cut() -> None:
    (document,) = parse(chat(USER, ANSWER, {"role": "user", "content": "thanks"}))
    assert turns(document) == [("user", "q"), ("assistant", "a")]


SYSTEM, TOOL = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, USER, ANSWER], "turn 1: a turn of user after one of user; put a turn of assistant there"),
        ([USER, ANSWER, ANSWER], "turn 2: a turn of assistant after one of assistant"),
        ([TOOL, ANSWER], "turn 0: a turn of tool at the start; put a turn of system or user or assistant there"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "turn 1: a turn of system after one of system"),
        ([ANSWER], "no assistant turn to train on"),
        ([ANSWER, USER], "no assistant turn to train on"),
        ([USER, SYSTEM, ANSWER], "turn 1: a turn of system after one of user"),
        ([USER, TOOL, ANSWER], "turn 1: a turn of tool after one of user"),
        ([USER, ANSWER, TOOL, USER], "turn 3: a turn of user after one of tool"),
        ([SYSTEM, USER], "no assistant turn to train on"),
        ([], "messages must be a list of turns"),
        (["q"], "messages[0] must be an object"),
        ([{"content": "q"}], "messages[0]: unknown role None"),
        ([{"role": "user", "content": 3}], "messages[0]: content must be text, found 3"),
    ],
)
def test_order_of_turns(messages: list[Any], expected: str) -> None:
    assert f"data.json:2: {expected}" in problem(chat(USER, ANSWER), chat(*messages))


@pytest.mark.parametrize("opening", [[], [SYSTEM]])
def test_an_assistant_may_open(opening: list[Any]) -> None:
    (document,) = parse(chat(*opening, ANSWER, USER, ANSWER))
    assert [role for role, _ in turns(document)] == [
        *(turn["role"] for turn in opening),
        "assistant",
        "user",
        "assistant",
    ]


def test_system_column_and_turn() -> None:
    assert "a system column and a system turn" in problem(chat(SYSTEM, USER, ANSWER, system="s"))


# ---------------------------------------------------------------------------------- prompt_completion and text


def test_prompt_completion_as_texts_and_as_messages() -> None:
    expected = [("user", "q"), ("assistant", "a")]
    assert turns(parse({"prompt": "q", "completion": "a"})[0]) == expected
    assert turns(parse({"prompt": [USER], "completion": [ANSWER]})[0]) == expected
    assert turns(parse({"prompt": [USER], "completion": "a"})[0]) == expected
    (document,) = parse({"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]})
    assert [(m.role, m.train) for m in document.messages if m.role == "assistant"] == [
        ("assistant", False),
        ("assistant", None),
    ]
    (document,) = parse({"question": "q", "response": "a"}, columns={"prompt": "question", "completion": "response"})
    assert turns(document) == expected


def test_text() -> None:
    assert parse({"text": " a\n"}, {"text": ""}) == [Text(" a\n"), Text("")]
    assert parse({"body": "a"}, columns={"text": "body"}) == [Text("a")]
    assert "data.json:1: text must be text, found 3" in problem({"text": 3})


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert "data.json:1: half a surrogate pair at character 1" in problem({"text": json.loads('"a\\ud83d"')})


# -------------------------------------------------------------------------------------------------------- task


def test_task_with_and_without_a_template() -> None:
    row = {
        "task": "t",
        "cluster": "c",
        "inputs": {"question": "Why?", "options": ["a", "b"], "note": ""},
        "target": "b",
    }
    (document,) = parse(row)
    assert turns(document) == [("user", "question: Why?\noptions:\n- a\n- b"), ("assistant", "b")]
    assert document.options == ("a", "b")
    (document,) = parse(row | {"references": ["b", "B"], "target": 7}, template="{{{question}}}\n{options}")
    assert turns(document) == [("user", "{Why?}\n- a\n- b"), ("assistant", "7")]
    assert document.references == ("b", "B")


def test_template_reaches_fields_only() -> None:
    row = {"inputs": {"text": "x", "a.b": "dotted"}, "target": "y"}
    assert turns(parse(row, template="{a.b}")[0])[0] == ("user", "dotted")
    message = problem(row, template="{text.__class__} {nothing}")
    assert "the template's {text.__class__}, {nothing} is no field of the record; use its fields: text, a.b" in message
    for template in ("{text!r}", "{text:>9}", "{}", "{text", "text}"):
        with pytest.raises(UserError) as caught:
            parse(row, template=template)
        assert caught.value.problems[0].key == (*KEY, "template")
    assert "format text takes no template" in problem({"text": "x"}, template="{text}")


# --------------------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "output": "a", "text": "### q"}, "alpaca"),
        ({"conversations": []}, "sharegpt"),
        ({"messages": [], "prompt": "q"}, "messages"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"text": "x", "id": 1}, "text"),
        ({"task": "t", "inputs": {}, "target": "a"}, "task"),
    ],
)
def test_detection(row: dict[str, Any], expected: str) -> None:
    assert detect_format([Row(0, row, "data.json:1")], section(), KEY) == expected


def test_unknown_columns_show_the_row_and_the_fix() -> None:
    message = problem({"instruction": "q" * 100, "context": "c", "response": "r"})
    assert "data.json fits no format (columns instruction, context, response; first row (data.json:1) " in message
    assert "set `format: alpaca` and `columns: {output: response, input: context}`" in message
    assert len(message) < 500
    assert "`columns: {text: blob}`" in problem({"blob": "x"})


def test_several_formats_are_an_error() -> None:
    message = problem(chat(USER, ANSWER) | {"prompt": "q", "completion": "a"})
    assert "fits several formats" in message
    assert "set `format:` to one of messages, prompt_completion" in message


def test_rows_of_another_layout_are_shown() -> None:
    ours, other = {"instruction": "q", "output": "a"}, {"messages": [{"role": "user", "content": "q"}]}
    assert "; data.json:3 has others, messages" in problem(ours, ours, other)
    # A row that has what the format needs under another name.
    assert problem(ours, {"instruction": "q", "response": "a"}, ours, format="alpaca") == (
        "data.json:2: no column output of format alpaca; columns there are instruction, response; correct the row or, "
        "where all rows are so, map the columns (`columns: {output: response}`)"
    )


def test_columns_that_are_not_there() -> None:
    row = {"instruction": "q", "output": "a"}
    assert "data.json has no column inptu; name one of instruction, output" in problem(
        row, format="alpaca", columns={"input": "inptu"}
    )
    assert "format alpaca has no column prompt" in problem(row, format="alpaca", columns={"prompt": "instruction"})
    assert "lacks messages of format messages" in problem(row, format="messages")
    message = problem({"instruction": "q", "response": "a"}, format="alpaca")
    assert "map them (`columns: {output: response}`)" in message


def test_all_bad_rows_are_reported_together() -> None:
    good, bad = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None}
    lines = problem(good, bad, good, {"completion": "a"}, {"prompt": " ", "completion": "a"}).splitlines()
    assert lines == [
        "data.json:2: completion must be text, a number or a list of them, it is missing; give a text",
        "data.json:4: no column prompt of format prompt_completion; columns there are completion; correct the row or, "
        "where all rows are so, map the columns (`columns: {prompt: NAME}`)",
        "data.json:5: the prompt is empty; fill it or remove the row",
    ]
    lines = problem(good, *[bad] * 30).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "data.json:2: completion must be text, a number or a list of them, it is missing (and 29 rows more: "
        "3, 4, 5, 6, 7, ...)"
    )
    many = [{"prompt": "q", "completion": [{"role": f"role {number}", "content": "a"}]} for number in range(30)]
    lines = problem(good, *many).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "data.json: 10 more of 30 problems are not shown"


@pytest.mark.parametrize(
    ("columns", "overlooked"),
    [
        (("instruction", "output", "inpt"), {"inpt": "input"}),
        (("instruction", "output", "context", "id"), {"context": "input"}),
        (("instruction", "output", "input", "inputs", "context"), {}),
        (("instruction", "output", "source", "category"), {}),
    ],
)
def test_columns_that_seem_to_be_meant_are_found(columns: tuple[str, ...], overlooked: dict[str, str]) -> None:
    rows = [Row(0, dict.fromkeys(columns, "x"), "a:1")]
    assert overlooked_columns(rows, "alpaca", section()) == overlooked
    assert overlooked_columns(rows, "alpaca", section(columns={"input": columns[2]})) == {}
