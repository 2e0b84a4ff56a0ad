"""Where rows come from: local files, globs and directories, or a data set on the hub."""

import difflib
import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.data.problems import problems_error, shorten
from ftkit.data.readers import READERS, BadRecord, Record, Stream, plain_values
from ftkit.data.types import Row
from ftkit.errors import FtkitError, KeyPath, NetworkError, Problem, StorageError, UserError
from ftkit.recipe.schema import DatasetSection

HUB_PREFIX = "hf://"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = {*READERS, ".txt", ".gz", ".zip", ".zst", ".xz", ".bz2", ".arrow", ".xlsx", ".yaml", ".yml"}
"""Suffixes that say "a file" even where none is there: such a path is never looked up on the hub."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows of a data set lie: files, or a data set of the hub that is on this machine."""

    files: tuple[Path, ...]
    hub: Any = None
    """A `datasets.Dataset`."""
    hub_name: str = ""
    first: int | None = None
    """Records that are read; None: all."""

    def stream(self) -> Iterator[Row | BadRecord | Problem]:
        """All rows, in the order of the files, and what is wrong between them.

        Raises:
            StorageError: a file cannot be opened.
        """
        index = 0
        for found in self._records():
            if index == self.first:
                return
            if isinstance(found, Record):
                yield Row(index, found.fields, found.where)
            else:
                yield found
            # A bad record keeps its number: ids do not depend on what is mended elsewhere.
            index += not isinstance(found, Problem)

    def digest(self) -> str:
        """SHA-256 in hex over the bytes of the files, or the hub data set's own fingerprint."""
        digest = hashlib.sha256()
        if self.first is not None:
            digest.update(f"the first {self.first}\0".encode())
        if self.hub is not None:
            digest.update(f"{self.hub_name}\0{self.hub._fingerprint}\0{len(self.hub)}".encode())
        for file in self.files:
            with _opened(file), file.open("rb") as stream:
                # The name too: places in errors hold it.
                digest.update(f"{shown(file)}\0".encode())
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def _records(self) -> Stream:
        if self.hub is not None:
            for index, row in enumerate(self.hub):
                yield Record(f"{self.hub_name} row {index}", plain_values(row))
        for file in self.files:
            with _opened(file):
                yield from READERS[file.suffix](file, shown(file))


def find_source(dataset: DatasetSection, *, base: Path, key: KeyPath) -> Source:
    """Find the files of a data set, or fetch it from the hub.

    Args:
        dataset: its section of the recipe.
        base: the directory that a relative `path` starts from.
        key: the section's place in the recipe, e.g. ("data", "train", 0).

    Raises:
        UserError: no such path or hub data set, or a gated one.
        NetworkError: the hub cannot be reached.
    """
    files = _local_files(dataset, base, key)
    if files is not None:
        return Source(tuple(files))
    return Source((), _load_hub(dataset, base, key), dataset.path.removeprefix(HUB_PREFIX).removeprefix("datasets/"))


def read_rows(dataset: DatasetSection, *, base: Path, key: KeyPath) -> list[Row]:
    """All rows of a small data set at once; arguments and errors as `find_source`.

    Raises:
        UserError: also where there are no rows, or some cannot be read (all of them).
        StorageError: a file cannot be opened.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for found in find_source(dataset, base=base, key=key).stream():
        if isinstance(found, Row):
            rows.append(found)
        else:
            problems.append(found.problem if isinstance(found, BadRecord) else found)
    if problems:
        raise problems_error(problems, of=dataset.path)
    if not rows:
        raise no_rows(dataset, key)
    return rows


def no_rows(dataset: DatasetSection, key: KeyPath) -> UserError:
    """The error for a data set without rows."""
    return UserError(f"{dataset.path} has no rows", how="name a data set that has some", key=(*key, "path"))


def dataset_name(dataset: DatasetSection) -> str:
    """The label in tables and metrics: `name`, or the stem of the file, or the last part of a hub id."""
    if dataset.name is not None:
        return dataset.name
    path = Path(dataset.path.removeprefix(HUB_PREFIX).rstrip("/"))
    stem = path.name.removesuffix(path.suffix) if path.suffix in _FILE_SUFFIXES else path.name
    if glob.has_magic(stem):
        stem = re.sub(r"[*?\[\]!]+", "", stem).strip(".-_ ") or path.parent.name
    return stem or "data"


def dataset_names(datasets: Sequence[DatasetSection]) -> list[str]:
    """One label each, no two alike: the second `alpaca` becomes `alpaca-2`."""
    names: list[str] = []
    for dataset in datasets:
        name = first = dataset_name(dataset)
        number = 2
        while name in names:
            name, number = f"{first}-{number}", number + 1
        names.append(name)
    return names


# ------------------------------------------------------------------------------------------------ local files


def _local_files(dataset: DatasetSection, base: Path, key: KeyPath) -> list[Path] | None:
    """The files that `path` means, or None where it is a hub id."""
    key = (*key, "path")
    text = dataset.path
    if text.startswith(HUB_PREFIX):
        return None
    path = base / Path(text).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS and not file.name.startswith("."))
        if not files:
            how = f"give a glob such as {text.rstrip('/')}/**/*.parquet, or one of {', '.join(READERS)}"
            raise UserError(f"{text} holds no data files", how=how, key=key)
    elif path.exists():
        files = [path]
    elif glob.has_magic(text):
        found = glob.glob(str(Path(text).expanduser()), root_dir=base, recursive=True)
        files = sorted(file for name in found if (file := base / name).is_file())
        if not files:
            raise UserError(f"no file matches {text}", how=f"correct the pattern; it starts from {base}", key=key)
    elif _looks_local(text):
        raise UserError(f"no such file: {path.absolute()}", how=_similar(path, text), key=key)
    elif _HUB_ID.fullmatch(text):
        return None
    else:
        raise UserError(f"{text} is neither a path nor a hub id", how="give a file, a directory or org/name", key=key)
    if dataset.subset is not None or dataset.revision is not None:
        how = f"remove them, or write {HUB_PREFIX}org/name"
        raise UserError(f"subset and revision are of hub data sets, {text} is local", how=how, key=key)
    for file in files:
        if file.suffix not in READERS:
            how = f"convert it to one of {', '.join(READERS)}"
            raise UserError(f"{shown(file)}: files of this kind are not read", how=how, key=key)
    return files


@contextmanager
def _opened(file: Path) -> Iterator[None]:
    """What an error of the system while reading `file` means."""
    try:
        yield
    except OSError as error:
        how = "check its permissions and the disk"
        raise StorageError(f"cannot be read: {error.strerror or error}", how=how, where=shown(file)) from error


def shown(path: Path) -> str:
    """The path as a user can click it: relative to the working directory where it lies below that."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def _looks_local(text: str) -> bool:
    return (
        Path(text).suffix in _FILE_SUFFIXES
        or text.startswith((".", "/", "~"))
        or text.endswith("/")
        or text.count("/") > 1
        or "\\" in text
    )


def _similar(path: Path, text: str) -> str:
    """The fix for a path that does not exist: file names like it, or the folder that is missing."""
    if not path.parent.is_dir():
        return f"{shown(path.parent)} is no directory; correct the path"
    names = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=3)
    if names:
        return "did you mean " + " or ".join(str(Path(text).with_name(name)) for name in names) + "?"
    return f"correct the path; it starts from {path.absolute().parent}"


# ---------------------------------------------------------------------------------------------------- the hub


def _load_hub(dataset: DatasetSection, base: Path, key: KeyPath) -> Any:
    import datasets

    name = dataset.path.removeprefix(HUB_PREFIX).removeprefix("datasets/")
    try:
        return datasets.load_dataset(name, name=dataset.subset, split=dataset.split, revision=dataset.revision)
    except Exception as error:  # the library, the network and foreign files fail in too many ways to list
        raise _hub_error(error, name, dataset, base, (*key, "path")) from error


def _hub_error(error: Exception, name: str, dataset: DatasetSection, base: Path, key: KeyPath) -> FtkitError:
    """One line and the right exit code for what `datasets.load_dataset` raised."""
    from datasets.exceptions import DatasetNotFoundError

    text = shorten(error, width=200)
    no_path = "" if dataset.path.startswith(HUB_PREFIX) else f"there is no {(base / name).absolute()}, and "
    if isinstance(error, DatasetNotFoundError) and "gated" in text:
        how = f"ask for access at https://huggingface.co/datasets/{name} and set HF_TOKEN"
        return UserError(f"{name} is gated and this account has no access", how=how, key=key)
    if isinstance(error, DatasetNotFoundError) and "Revision" in text:
        return UserError(f"{name} has no revision {dataset.revision}", how="correct `revision`", key=key)
    if isinstance(error, DatasetNotFoundError):
        how = "correct the id or the path, or set HF_TOKEN if it is private"
        return UserError(f"{no_path}no data set {name} on the hub", how=how, key=key)
    if _is_network(error):
        how = "check the network and HF_HUB_OFFLINE, or download the data set"
        return NetworkError(f"{no_path}the hub cannot be reached for {name}: {text}", how=how, key=key)
    how = "correct `subset` and `split`, or download its data files and name them"
    return UserError(f"cannot load {name} (split {dataset.split}): {text}", how=how, key=key)


def _is_network(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, is the network's or the server's."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | HfHubHTTPError):
            return True
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "aiohttp"):
            return True
        error = error.__cause__
    return False
