"""Prepared data on disk: directories named by what they were made from, written once and published whole.

Safe for several ranks and several runs at once: one process writes an entry, the others wait for it. Nothing in it is
anybody's only copy; it may be deleted at any time.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ftkit.errors import StorageError

FINISHED = "finished.json"
"""Written last into an entry."""


def cache_directory() -> Path:
    """FTKIT_CACHE, else XDG_CACHE_HOME/ftkit, else ~/.cache/ftkit."""
    if own := os.environ.get("FTKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ftkit"


def digest_of(*parts: Any) -> str:
    """SHA-256 in hex over plain values, which may be nested."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_version() -> str:
    """SHA-256 in hex over the code that prepares data: after a change of it, old entries are not found any more."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def prepared(key: str, write: Callable[[Path], None]) -> Path:
    """The entry `key`, a directory; on a miss `write` fills it first.

    The entry is staged beside its place, flushed and renamed, so that a killed run leaves nothing behind that looks
    finished. Of processes that want the same entry one writes, and the others wait.

    Args:
        write: fills the empty directory that it is given; what it raises leaves no entry.

    Raises:
        StorageError: the cache is full or not writable.
    """
    root = cache_directory() / "data"
    entry = root / key
    if (entry / FINISHED).is_file():
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{key}.lock"):
            if (entry / FINISHED).is_file():
                return entry
            _write(entry, write)
    except OSError as error:
        what = f"cannot write prepared data to {root}: {error.strerror or error}"
        raise StorageError(what, how="free space there, or name another place with FTKIT_CACHE") from error
    return entry


def _write(entry: Path, write: Callable[[Path], None]) -> None:
    # The lock is held, so these were left by processes that were killed.
    for abandoned in entry.parent.glob(f".{entry.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        content = staging / "entry"
        content.mkdir()
        write(content)
        (content / FINISHED).write_text("{}\n", encoding="utf-8")
        for path in content.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        # Half an entry that was there has been left by something else than `prepared`.
        shutil.rmtree(entry, ignore_errors=True)
        content.rename(entry)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time; the system releases the lock of a process that dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
