"""What this machine has and can do: `ftkit doctor`."""

import shutil
import statistics
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import psutil
import torch

from ftkit.console import human_bytes
from ftkit.data.cache import cache_directory
from ftkit.errors import FtkitError
from ftkit.models.hub import reach_hub
from ftkit.models.load import choose_compute_dtype
from ftkit.runs import describe_environment

MEASURED_SECONDS = 2.5
"""Of matrix products in each precision."""
WIDTHS = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the square matrices that are multiplied."""
EXTRAS = {
    "gguf": ("gguf", "reads .gguf models, writes them with ftkit export --format gguf"),
    "gpu": ("bitsandbytes", "model.quantization: nf4"),
    "trackers": ("wandb", "training.report_to: [tensorboard, wandb]"),
}
"""Extra of pyproject -> the package that it installs, and what that gives."""
FLASH = "flash_attn"


def look(*, offline: bool, seconds: float) -> dict[str, str]:
    """Name of a line -> what there is to say, in the order to say it in.

    Args:
        offline: leave the hub alone.
        seconds: how long matrix products are measured in each precision.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = describe_environment(device, 1)
    packages = {name: version for name, version in found["packages"].items() if name != "ftkit"}
    dtype, reason = choose_compute_dtype("auto", device)
    precision = str(dtype).removeprefix("torch.")
    lines = {
        "ftkit": f"{found['packages']['ftkit']} on Python {found['python']}, {found['platform']}",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "processor": _processor(found),
        "device": _device(device),
        "precision": f"{precision} with model.dtype: auto ({reason}); what trains is kept in float32",
        "attention": _attention(),
        "products": _products(device, seconds),
        "disk": _disk(),
        "hub": "not asked (--offline)" if offline else _hub(),
    }
    return lines | {f"extra {name}": _extra(name) for name in EXTRAS}


def _processor(found: dict[str, Any]) -> str:
    memory = psutil.virtual_memory()
    cores = f"{psutil.cpu_count()} cores, {found['threads']} threads"
    return f"{found['processor']}, {cores}, {human_bytes(memory.available)} of {human_bytes(memory.total)} free"


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        built_for = torch.version.cuda
        return "cpu; " + (
            f"torch is built for CUDA {built_for}, and sees no GPU" if built_for else "torch is built for CPUs alone"
        )
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"{torch.cuda.get_device_name(index)}, {human_bytes(free)} of {human_bytes(total)} free")
    return f"CUDA {torch.version.cuda}: " + "; ".join(names)


def _attention() -> str:
    flash = "installed" if util.find_spec(FLASH) else "not installed, and not needed"
    return f"ftkit's own with model.attn_implementation: auto; {FLASH} is {flash}"


def _products(device: torch.device, seconds: float) -> str:
    """Median speed of square matrix products, in each precision that a run may compute in."""
    width, speeds = WIDTHS[device.type], []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        times: list[float] = []
        # The first one warms up.
        until = time.perf_counter() + seconds
        while len(times) < 2 or time.perf_counter() < until:
            begin = time.perf_counter()
            left @ right
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        speed = 2 * width**3 / statistics.median(times[1:]) / 1e12
        speeds.append(f"{str(dtype).removeprefix('torch.')} {speed:.3g} TFLOP/s")
    return f"{', '.join(speeds)} ({width:,} x {width:,})"


def _disk() -> str:
    return ", ".join(f"{human_bytes(free)} free in {place}" for place, free in _free_places().items())


def _free_places() -> dict[str, int]:
    """Where runs and prepared data are written -> bytes that are free; of a directory to be, where it will lie."""
    found = {}
    for name, place in (("the working directory", Path.cwd()), (str(cache_directory()), cache_directory())):
        existing = next(path for path in (place, *place.absolute().parents) if path.exists())
        found[name] = shutil.disk_usage(existing).free
    return found


def _hub() -> str:
    begin = time.perf_counter()
    try:
        who = reach_hub()
    except FtkitError as error:
        return f"cannot be used: {error.problems[0].what}; cached models and local ones can"
    return f"answers in {time.perf_counter() - begin:.1f} s, {who}"


def _extra(name: str) -> str:
    package, gives = EXTRAS[name]
    try:
        return f"{package} {metadata.version(package)}: {gives}"
    except metadata.PackageNotFoundError:
        return f"not installed; pip install 'ftkit[{name}]' gives: {gives}"
