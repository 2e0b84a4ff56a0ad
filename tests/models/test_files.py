"""What a full disk raises, from the libraries that write; a limit on the size of files stands for it."""

import errno
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from ftkit.errors import StorageError, UserError
from ftkit.models.files import storage_errors
from tests.tiny_models import tiny_tokenizer


@contextmanager
def file_size_limit(size):
    """Inside this context no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def writing():
    return storage_errors("cannot write it", how="make room", where="there")


@pytest.mark.parametrize(
    "write",
    [
        lambda source, target: (target / "file").write_bytes(bytes(5000)),
        lambda source, target: save_file({"w": torch.zeros(5000)}, target / "w.safetensors"),
        lambda source, target: tiny_tokenizer().save_pretrained(target),
        lambda source, target: shutil.copytree(source, target / "copy"),
    ],
    ids=["plain", "safetensors", "tokenizers", "copytree"],
)
def test_whatever_a_library_raises_is_one_line_with_the_systems_reason(tmp_path, write):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("a", "b"):
        (source / name).write_bytes(bytes(5000))
    with file_size_limit(1000), pytest.raises(StorageError) as caught, writing():
        write(source, target)
    assert str(caught.value) == "there: cannot write it: File too large; make room"


@pytest.mark.parametrize("error", [UserError("mine"), Exception("no file at all"), RuntimeError("a bug"), KeyError(1)])
def test_errors_that_are_not_the_disks_pass(error):
    with pytest.raises(type(error)) as caught, writing():
        raise error
    assert caught.value is error


def test_a_file_is_named_by_where_alone(tmp_path):
    with pytest.raises(StorageError, match="there: cannot write it: No space left on device; make room"), writing():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
