"""Memory limits of control groups, from files as Linux writes them."""

from pathlib import Path

import pytest

from ftkit import containers
from ftkit.containers import free_in_containers


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(containers, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(containers, "GROUPS", tmp_path / "groups")
    return tmp_path


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n")


def test_every_group_above_counts_and_copies_of_files_are_free(system: Path) -> None:
    (system / "groups").write_text("0::/slurm/job_7/step_0\n")
    stat = "anon 900\ninactive_file 300\nactive_file 50"
    write(system / "cgroup" / "slurm" / "job_7", memory__max="4000", memory__current="1500", memory__stat=stat)
    write(system / "cgroup" / "slurm" / "job_7" / "step_0", memory__max="max", memory__current="1500")
    write(system / "cgroup", memory__max="9000", memory__current="2000")
    assert free_in_containers() == [4000 - 1500 + 350, 7000]


def test_version_one(system: Path) -> None:
    (system / "groups").write_text("12:cpu,cpuacct:/x\n5:memory:/docker/abc\n1:name=systemd:/y\n")
    # In a container the path is that of the host: its own files lie at the root.
    write(
        system / "cgroup" / "memory",
        memory__limit_in_bytes="3000",
        memory__usage_in_bytes="1000",
        memory__stat="cache 9\ntotal_inactive_file 100\ntotal_active_file 20",
    )
    assert free_in_containers() == [2120]


def test_no_limits(system: Path) -> None:
    assert free_in_containers() == []
    (system / "groups").write_text("0::/\n")
    assert free_in_containers() == []
    write(system / "cgroup", memory__max="max", memory__current="1")
    assert free_in_containers() == []
