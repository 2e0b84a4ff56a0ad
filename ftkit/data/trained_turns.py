"""Which assistant turns of a conversation are trained on."""

from collections.abc import Sequence
from typing import Literal

from ftkit.data.types import Message
from ftkit.errors import UserError

TrainOn = Literal["assistant", "last_assistant", "all"]


def turns_to_render(messages: Sequence[Message], train_on: TrainOn, where: str) -> list[int]:
    """Assistant turns whose place must be known: the trained ones, and with `train_on: all` the untrained too.

    An assistant message that opens a conversation has no prompt: it is context, never a target.

    Raises:
        UserError: a message has a flag `train` that cannot be followed; names `where`.
    """
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and index > 0]
    _check_flags(messages, train_on == "all", where)
    if train_on == "all":
        return answers
    by_default = answers[-1:] if train_on == "last_assistant" else answers
    flags = {index: messages[index].train for index in answers}
    return [index for index in answers if flags[index] or (flags[index] is None and index in by_default)]


def _check_flags(messages: Sequence[Message], everything: bool, where: str) -> None:
    """Refuse `train` on a message that cannot follow it: only of the assistant's is known where their tokens lie."""
    for number, message in enumerate(messages, start=1):
        if message.role != "assistant" and message.train is not None and message.train != everything:
            raise UserError(
                f"message {number} ({message.role}) has train: {str(message.train).lower()}, which only assistant "
                f"messages can have with data.train_on: {'all' if everything else 'assistant'}",
                how="take the flag out",
                where=where or None,
            )
