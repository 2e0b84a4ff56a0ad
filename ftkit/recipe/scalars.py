"""Plain YAML scalars, as YAML 1.2's core schema reads them: text -> value, for files and the command line alike."""

import re
from typing import Any

from ftkit.errors import UserError

INTEGER = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
"""Unlike YAML 1.1's, this takes `1e-4` and `1e5`."""
HEX_OR_OCTAL = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
MAX_NUMBER_LENGTH = 64
"""Longer digit strings are text: Python takes quadratic time to read them."""


def parse_scalar(text: str, *, where: str | None = None) -> Any:
    """The value of a plain (unquoted) scalar: None, bool, int, float or str.

    Raises:
        UserError: a whole number with a leading zero, which is octal in YAML 1.1 and decimal in YAML 1.2.
    """
    if text in WORDS:
        return WORDS[text]
    if len(text) > MAX_NUMBER_LENGTH:
        return text
    if LEADING_ZERO.fullmatch(text):
        how = f"write {int(text)} for the number, or '{text}' for text"
        raise UserError(f"{text} has a leading zero", how=how, where=where)
    if INTEGER.fullmatch(text):
        return int(text)
    if HEX_OR_OCTAL.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    return text


def is_text(text: str) -> bool:
    """Whether a plain scalar is text, so that it can be written without quotes."""
    return len(text) > MAX_NUMBER_LENGTH or not (
        text in WORDS or INTEGER.fullmatch(text) or HEX_OR_OCTAL.fullmatch(text) or FLOAT.fullmatch(text)
    )
