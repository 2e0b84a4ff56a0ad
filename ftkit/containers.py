"""What the memory limits of containers leave to this process: those of its control groups on Linux."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
_FILES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
"""Version -> the limit, what is used, and what of that is copies of files, which the system can drop."""


def free_in_containers() -> list[int]:
    """Bytes that each limit leaves: of the process's group and of all that it lies in; none where there are no limits.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    return [free for version, directory in _groups() if (free := _free(directory, version)) is not None]


def _groups() -> Iterator[tuple[int, Path]]:
    """Version and directory of each group, from the process's own up. Inside a container its root is the container."""
    try:
        lines = GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            version, root = 2, ROOT
        elif "memory" in controllers.split(","):
            version, root = 1, ROOT / "memory"
        else:
            continue
        own = root / path.lstrip("/")
        for directory in (own, *own.parents):
            if directory.is_relative_to(root):
                yield version, directory


def _free(directory: Path, version: int) -> int | None:
    limit, usage, cached = _FILES[version]
    try:
        room = int((directory / limit).read_text()) - int((directory / usage).read_text())
    except (OSError, ValueError):
        # There is no such limit, or it is "max".
        return None
    try:
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        return room + sum(int(stat.get(name, 0)) for name in cached)
    except (OSError, ValueError):
        return room
