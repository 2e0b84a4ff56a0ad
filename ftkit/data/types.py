"""The types that data passes through: Row -> Conversation | Text -> Example -> Batch."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]

IGNORE = -100
"""Label of a token that is not trained on (the value of torch's and transformers' losses)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its source."""

    index: int
    """Position in the data set, from 0; the row's id."""
    fields: dict[str, Any]
    where: str
    """`file:line`, or `name row N` where the source has no lines; for errors."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, in the keys of transformers' chat templates."""

    role: Role
    content: str
    train: bool | None = None
    """Whether this turn is trained on; None leaves it to the recipe's `train_on`."""
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    """OpenAI's form: {"type": "function", "function": {"name": str, "arguments": dict}}."""
    name: str | None = None
    tool_call_id: str | None = None

    def to_template(self) -> dict[str, Any]:
        """The dict that `apply_chat_template` takes; absent parts are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; trained on its assistant turns."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools that the model may call (OpenAI's form)."""
    options: tuple[str, ...] = ()
    """The answers to choose from, where the row is a classification; used by evaluation."""
    references: tuple[str, ...] = ()
    """All accepted answers, where there are several; used by evaluation."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """The row's own keywords for the chat template."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, trained on as a whole and cut into pieces of `max_length`."""

    text: str


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A row that is put into words anew in each epoch, by one of the phrasings of its data set."""

    fields: dict[str, Any]
    """The columns that the phrasings name."""
    target: str
    """The answer."""
    references: tuple[str, ...] = ()
    """All accepted answers, the target first."""
    options: tuple[str, ...] = ()
    rationale: str | None = None
    """The reasoning that leads to the answer."""


Document = Conversation | Text
"""What is encoded."""

RowContent = Document | TaskRecord
"""What a row is read as."""


def content_to_json(content: RowContent) -> bytes:
    """A row's content as JSON, for the files of prepared data."""
    kind = type(content).__name__
    if isinstance(content, Conversation):
        values = {"messages": [_filled(message) for message in content.messages], **_filled(content, skip="messages")}
    else:
        values = _filled(content)
        if isinstance(content, TaskRecord):
            # Also where the phrasings print no column.
            values["fields"] = content.fields
    return _to_json([kind, values]).encode("utf-8", "surrogatepass")


def content_from_json(data: bytes) -> RowContent:
    """The content that `content_to_json` wrote."""
    kind, values = json.loads(data.decode("utf-8", "surrogatepass"))
    values = {
        name: tuple(value) if name in _TUPLES and isinstance(value, list) else value for name, value in values.items()
    }
    if kind == "Conversation":
        messages = [
            Message(**{name: _as_tuple(name, value) for name, value in message.items()})
            for message in values.pop("messages")
        ]
        return Conversation(tuple(messages), **values)
    return Text(**values) if kind == "Text" else TaskRecord(**values)


_to_json = json.JSONEncoder(ensure_ascii=False).encode
_TUPLES = {"messages", "tool_calls", "tools", "options", "references"}


def _as_tuple(name: str, value: Any) -> Any:
    return tuple(value) if name in _TUPLES and isinstance(value, list) else value


def _filled(item: Any, skip: str = "") -> dict[str, Any]:
    """The fields of a dataclass that are not empty, shallow."""
    values = {name: getattr(item, name) for name in _NAMES[type(item)] if name != skip}
    return {name: value for name, value in values.items() if value is not None and value != () and value != {}}


_NAMES: dict[type, list[str]] = {
    kind: [field.name for field in fields(kind)] for kind in (Message, Conversation, Text, TaskRecord)
}


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: what `preview` shows as one, and what a global batch counts."""

    input_ids: np.ndarray
    """int32 [T]"""
    labels: np.ndarray
    """int32 [T]; the token's own id where it is a target, IGNORE elsewhere. Not shifted: labels[t] is predicted
    from position t - 1. labels[0] is always IGNORE."""
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An `Example` and where it comes from."""

    example: Example
    dataset: int
    """Index into the recipe's list of data sets."""
    row: int
    """`Row.index`"""


@dataclass(slots=True)
class DatasetCounts:
    """What became of the rows of one data set; what tables and `preview` print."""

    name: str
    rows: int = 0
    rows_used: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """reason -> row ids"""
    share: float = 0.0
    """Of the run's examples."""
    epochs: float = 0.0
    """How often the run goes through its training rows."""
    overlapping: dict[str, list[int]] = field(default_factory=dict)
    """what they say the same as -> row ids, of rows that are trained on all the same"""

    def to_json(self) -> dict[str, Any]:
        """Plain values; of rows their numbers only."""
        values = asdict(self)
        for name in ("dropped", "overlapping"):
            values[name] = {reason: len(rows) for reason, rows in values[name].items()}
        return values
