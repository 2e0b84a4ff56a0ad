import os

import pytest

from ftkit.models import hashes
from ftkit.models.files import hash_files
from ftkit.models.hashes import hash_once


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Two files of a model that counts as large, and a cache of its own."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "WORTH_IT", 4)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        path.write_bytes(b"abc")
    return paths


@pytest.fixture
def hashed(monkeypatch):
    """The calls that read the files."""
    calls = []

    def count(paths):
        calls.append(paths)
        return hash_files(paths)

    monkeypatch.setattr(hashes, "hash_files", count)
    return calls


def test_a_large_model_is_read_once_and_again_after_any_change(weights, hashed):
    first = hash_once(weights, remembered=False)
    assert hash_once(weights, remembered=True) == first == hash_files(weights)
    assert len(hashed) == 1
    # The same size and time of modification, as a copying tool leaves it.
    times = weights[1].stat()
    weights[1].write_bytes(b"abd")
    os.utime(weights[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hash_once(weights, remembered=True) == hash_files(weights) != first
    assert len(hashed) == 2


def test_what_is_to_be_proven_is_read(weights, hashed):
    for _ in range(2):
        hash_once(weights, remembered=False)
    assert len(hashed) == 2


def test_nothing_is_written_for_a_small_model(weights, hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "WORTH_IT", 7)
    hash_once(weights, remembered=True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"sha256:12", b"\xff"])
def test_a_damaged_entry_is_not_believed(weights, tmp_path, content):
    first = hash_once(weights, remembered=True)
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    entry.write_bytes(content)
    assert hash_once(weights, remembered=True) == first
    assert entry.read_text() == first


def test_a_cache_that_cannot_be_written_costs_time_only(weights, tmp_path):
    (tmp_path / "cache").touch()
    assert hash_once(weights, remembered=True) == hash_files(weights)
