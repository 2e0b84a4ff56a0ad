"""What holds for every test: no network, no GPU but for tests marked `gpu`, which are skipped where there is none."""

import atexit
import os
import shutil
import tempfile

# Before any library reads it.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test finds what another run prepared.
os.environ["FTKIT_CACHE"] = tempfile.mkdtemp(prefix="ftkit-tests-")
atexit.register(shutil.rmtree, os.environ["FTKIT_CACHE"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Under GitHub Actions the command line annotates what it prints; tests of that set these themselves.
for _name in [name for name in os.environ if name.startswith("GITHUB_")]:
    del os.environ[_name]

import pytest  # noqa: E402

from tests.gpu import has_gpu  # noqa: E402


def pytest_collection_finish(session: pytest.Session) -> None:
    """Skip tests that need a CUDA device where there is none; it is looked for only if one of them will run."""
    needy = [item for item in session.items if item.get_closest_marker("gpu")]
    if needy and not has_gpu():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
