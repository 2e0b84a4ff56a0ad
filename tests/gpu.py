"""The GPU of the tests marked `gpu`.

The tests' own process sees none, so that every other test computes on the CPU wherever it runs. Those marked `gpu`
start `ftkit` in a process that sees one.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_runs import cli_environment

_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


def hide_gpus() -> None:
    """Let this process, and those that it starts, see no GPU. To be called before torch looks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def has_gpu() -> bool:
    """Whether a process that may see GPUs finds one."""
    if not Path("/dev/nvidiactl").exists():
        return False
    script = "import torch; print(torch.cuda.is_available())"
    result = subprocess.run([sys.executable, "-c", script], env=_environment(), capture_output=True, text=True)
    return result.stdout.strip() == "True"


def run_on_gpu(*arguments: str | Path, cwd: Path, first: str = "") -> subprocess.CompletedProcess[str]:
    """`ftkit ARGUMENTS` in a process of its own that sees one GPU.

    Args:
        first: Python to run before, with torch imported.
    """
    script = f"import sys, torch\n{first}\nfrom ftkit.cli import run\nsys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=600)


def _environment() -> dict[str, str]:
    one = (_VISIBLE or "0").split(",")[0]
    # cuBLAS asks for the second where torch is told to be deterministic.
    return cli_environment() | {"CUDA_VISIBLE_DEVICES": one, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
