"""`ftkit doctor`: every line says what is the case here, and what is missing does not end it."""

import json
import re
import shutil
from importlib import metadata

import pytest
import torch

from ftkit import machine
from ftkit.commands.doctor import doctor
from ftkit.errors import NetworkError, UserError
from ftkit.models.load import choose_compute_dtype

NAMES = ["ftkit", "packages", "processor", "device", "precision", "attention", "products", "disk", "hub"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Products of small matrices."""
    monkeypatch.setattr(machine, "WIDTHS", {"cpu": 32, "cuda": 32})


def test_each_line_says_what_is_the_case():
    found = machine.look(offline=True, seconds=0.0)
    assert list(found) == [*NAMES, "extra gguf", "extra gpu", "extra trackers"]
    assert f"torch {torch.__version__}" in found["packages"]
    dtype, reason = choose_compute_dtype("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert found["precision"].startswith(f"{str(dtype).removeprefix('torch.')} with model.dtype: auto ({reason})")
    speeds = re.fullmatch(r"float32 (\S+) TFLOP/s, bfloat16 (\S+) TFLOP/s \(32 x 32\)", found["products"])
    assert all(float(speed) > 0 for speed in speeds.groups())
    assert found["hub"] == "not asked (--offline)"
    assert metadata.version("gguf") in found["extra gguf"]


def test_a_speed_is_the_operations_of_a_product_by_its_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(machine, "WIDTHS", {"cpu": 10_000})
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.zeros(1, 1))
    # A second each: 2 x 10,000^3 operations.
    assert machine._products(torch.device("cpu"), 0.0) == "float32 2 TFLOP/s, bfloat16 2 TFLOP/s (10,000 x 10,000)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NetworkError("the hub could not be reached"), "cannot be used: the hub could not be reached; cached models"),
        (UserError("the token is refused", how="log in"), "cannot be used: the token is refused; cached models"),
        (None, r"answers in \d+\.\d s, with the token of somebody$"),
    ],
)
def test_the_hub_is_asked(error, expected, monkeypatch):
    def answer():
        if error is not None:
            raise error
        return "with the token of somebody"

    monkeypatch.setattr(machine, "reach_hub", answer)
    assert re.match(expected, machine.look(offline=False, seconds=0.0)["hub"])


def test_without_the_network_switched_on_the_hub_is_left_alone():
    # The tests set HF_HUB_OFFLINE.
    assert machine._hub().startswith("cannot be used: HF_HUB_OFFLINE is set")


def test_what_an_extra_would_give(monkeypatch):
    monkeypatch.setitem(machine.EXTRAS, "gpu", ("no-such-package", "model.quantization: nf4"))
    assert machine._extra("gpu") == "not installed; pip install 'ftkit[gpu]' gives: model.quantization: nf4"


def test_the_disk_of_a_directory_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "a" / "b"))
    free = machine._free_places()[str(tmp_path / "a" / "b")]
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_the_command_prints_lines_or_json(capsys, monkeypatch):
    monkeypatch.setattr(machine, "MEASURED_SECONDS", 0.0)
    doctor(offline=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(NAMES)]] == NAMES
    doctor(offline=True, json=True)
    assert list(json.loads(capsys.readouterr().out))[: len(NAMES)] == NAMES
