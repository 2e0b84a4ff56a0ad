"""What holds for every test: no network, and tests marked `gpu` only where there is one."""

import atexit
import os
import shutil
import tempfile

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test finds what another run prepared.
os.environ["FTKIT_CACHE"] = tempfile.mkdtemp(prefix="ftkit-tests-")
atexit.register(shutil.rmtree, os.environ["FTKIT_CACHE"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
