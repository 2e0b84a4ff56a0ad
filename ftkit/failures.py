"""What ends a command line, in our words: typer's complaints, later versions' names, failures of the machine.

The command line turns what it catches into an `FtkitError` here; what becomes None is a bug and keeps its traceback.
"""

import errno
import os
import re
import signal
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import typer

from ftkit.errors import FtkitError, OutOfMemoryError, StorageError, UserError

LATER_VERBS = {
    "chat": "export the model with `ftkit export` and serve it with any tool",
}
"""Verbs of later versions -> what to do until then."""

LATER_OPTIONS = {
    "--quantization": "leave it out",
}
"""Options of later versions -> what to do until then."""

TYPER_WORDS = {
    "Input should be a valid integer, unable to parse string as an integer": "expected a whole number",
    "Input should be greater than or equal to": "expected a number of at least",
    "Got unexpected extra argument(s)": "Too many arguments:",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
NO_PATH = {errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What only a user's path can be the cause of: ftkit's own names are short, and lie in directories that it made."""
MISTAKEN = {errno.ENOENT, errno.EEXIST, errno.EISDIR}
"""The user's mistake where it is about a path of the command line; else a bug."""


def usage_error(error: typer.TyperException, arguments: Sequence[str]) -> UserError:
    """Typer's own complaint about arguments, in our form."""
    message = error.format_message()
    verb = [argument for argument in arguments[:1] if not argument.startswith("-")]
    help_command = f"see {' '.join(['ftkit', *verb, '--help'])}"
    if unknown := re.match(r"No such option:? '?(--?[\w-]+)", message):
        option = unknown[1]
        if option in LATER_OPTIONS:
            return UserError(f"the option {option} is not in this version", how=LATER_OPTIONS[option])
        close = get_close_matches(option, re.findall(r"--[\w-]+", message[unknown.end() :]), n=1)
        return UserError(f"there is no option {option}", how=f"did you mean {close[0]}?" if close else help_command)
    for theirs, ours in TYPER_WORDS.items():
        message = message.replace(theirs, ours)
    message = message.rstrip(".").replace("'", "")
    return UserError(message[:1].lower() + message[1:], how=help_command)


def known_failure(error: OSError | MemoryError | RuntimeError, arguments: Sequence[str]) -> FtkitError | None:
    """What a full disk, a bad path, a missing permission or too little memory means to a user; None for a bug."""
    if isinstance(error, OSError):
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if where is not None and (error.errno in NO_PATH or (error.errno in MISTAKEN and _is_named(where, arguments))):
            return UserError((error.strerror or "cannot be used").lower(), how="name another path", where=where)
        if error.errno not in FULL | DENIED:
            return None
        how = "free some space" if error.errno in FULL else "check the permissions"
        return StorageError((error.strerror or "cannot be written").lower(), how=how, where=where)
    # torch raises its own class on a GPU and a RuntimeError on the CPU; importing it to ask would take seconds.
    if isinstance(error, RuntimeError):
        on_gpu, on_cpu = type(error).__name__ == "OutOfMemoryError", "can't allocate memory" in str(error)
        if not on_gpu and not on_cpu:
            return None
    how = "lower training.max_tokens_per_device, or set training.gradient_checkpointing=true"
    return OutOfMemoryError("out of memory", how=how)


def _is_named(path: str, arguments: Sequence[str]) -> bool:
    """Whether the command line names `path` or something in it, as an argument or as the value of `key=value`."""
    named = {Path(os.path.expanduser(t)).absolute() for a in arguments for t in {a, a.partition("=")[2]} if t}
    # What the working directory lies in is no part of a relative path that the user wrote.
    here = {Path.cwd(), *Path.cwd().parents}
    return Path(path).absolute() in named | {parent for one in named for parent in one.parents} - here


def interrupted() -> FtkitError:
    """Ctrl-C where nothing was to be saved."""
    error = FtkitError("interrupted")
    error.exit_code = 128 + signal.SIGINT
    return error
