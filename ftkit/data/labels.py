"""Token ids to examples: which tokens are targets."""

from collections.abc import Sequence

import numpy as np

from ftkit.data.token_spans import Tokens
from ftkit.data.types import IGNORE, Example, Message


def label_turns(tokens: Tokens, turns: Sequence[int], messages: Sequence[Message], *, everything: bool) -> Example:
    """A conversation's example.

    Args:
        tokens: of the conversation.
        turns: indices of the messages that the spans of `tokens` belong to.
        messages: of the conversation.
        everything: whether all tokens are targets, but for turns that are not to be trained on and for thoughts before
            an answer; else only the turns of `turns` are, from where their training begins.
    """
    ids = np.array(tokens.ids, np.int32)
    if everything:
        labels = ids.copy()
        for turn, (start, end), answer in zip(turns, tokens.spans, tokens.answers, strict=True):
            labels[start : end if messages[turn].train is False else answer] = IGNORE
    else:
        labels = np.full_like(ids, IGNORE)
        for (_, end), answer in zip(tokens.spans, tokens.answers, strict=True):
            labels[answer:end] = ids[answer:end]
    return _example(ids, labels)


def label_pieces(ids: Sequence[int], max_length: int) -> list[Example]:
    """A text's examples: pieces of at most `max_length` tokens.

    A piece begins with the last token of the one before, so that every token but the text's first is a target exactly
    once.
    """
    starts = range(0, len(ids) - 1, max_length - 1)
    pieces = [np.array(ids[start : start + max_length], np.int32) for start in starts]
    return [_example(piece, piece.copy()) for piece in pieces]


def _example(input_ids: np.ndarray, labels: np.ndarray) -> Example:
    """An example; its first token is predicted from nothing and is no target."""
    labels[:1] = IGNORE
    return Example(input_ids, labels)
