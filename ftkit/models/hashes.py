"""The hash of weight files, remembered in the user's cache: a large model takes long to hash."""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ftkit.data.cache import cache_directory
from ftkit.models.files import hash_files

WORTH_IT = 1 << 30
"""Bytes; fewer are hashed in a second or two, and nothing is written for them."""
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


def hash_once(paths: Sequence[Path], *, remembered: bool) -> str:
    """`hash_files`, kept for the next time.

    Args:
        remembered: take what was found for files of the same paths, sizes and times of change, where there is any.
    """
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    if sum(stat.st_size for _, stat in stats) < WORTH_IT:
        return hash_files(paths)
    # The time of change besides that of modification, which copying tools set as they like.
    files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    kept = cache_directory() / "hashes" / hashlib.sha256(json.dumps(files).encode()).hexdigest()
    if remembered:
        with suppress(OSError, UnicodeDecodeError):
            if _HASH.fullmatch(found := kept.read_text(encoding="utf-8")):
                return found
    computed = hash_files(paths)
    # Half a file, from a full disk or a killed process, is no hash; without a cache it is computed each time.
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(computed, encoding="utf-8")
    return computed
