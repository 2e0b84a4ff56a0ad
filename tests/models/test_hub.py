import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.fake_hub import COMMIT, HubServer, serve
from tests.tiny_models import tiny_model, tiny_tokenizer

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json")
TOKEN = "hf_secretsecretsecret"

DRIVER = """
import json, sys
from ftkit.errors import FtkitError
from ftkit.models import hub
hub.REQUEST_TIMEOUT = 0.5
for repo, revision, offline in json.loads(sys.argv[1]):
    try:
        commit = hub.resolve_commit(repo, revision, offline=offline)
        directory = hub.fetch(repo, commit, weights=True, code=False, offline=offline)
        print(json.dumps([0, commit, sorted(path.name for path in directory.iterdir())]))
    except FtkitError as error:
        print(json.dumps([error.exit_code, str(error), list(error.problems[0].key)]))
"""


def ask(cases: list[tuple[str, str | None, bool]], home: Path, **environment: str) -> list[list[Any]]:
    """The answers of a fresh process, which reads the hub's environment variables: [exit code, commit or line, ...]."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)],
        env=clean | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "model"
    tiny_model().save_pretrained(directory, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(directory)
    for name in PROCESSOR_FILES:
        (directory / name).write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "consolidated.safetensors").write_bytes(b"not listed in the index")
    return directory


@pytest.fixture(scope="module")
def hub(model: Path) -> Iterator[HubServer]:
    with serve(model) as served:
        yield served


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_refusals_are_one_line_with_the_remedy_and_the_exit_code(hub: HubServer, tmp_path: Path) -> None:
    endpoint = hub.endpoint
    expected: dict[tuple[str, str | None], tuple[int, str, str]] = {
        ("org/gated", None): (2, "is gated", f"accept its licence at {endpoint}/org/gated and set HF_TOKEN"),
        ("org/missing", None): (2, "there is no model org/missing", "name a local directory"),
        ("org/gone", None): (2, "there is no model org/gone", "check the spelling"),
        ("org/bad-token", None): (2, "does not accept your token", "set HF_TOKEN to a valid token"),
        ("org/forbidden", None): (2, "your token may not read org/forbidden", "read access"),
        ("org/pickle", None): (2, "only as a pickle file (pytorch_model.bin)", "save_pretrained"),
        ("org/gguf", None): (2, "only as GGUF", "model.Q4_K_M.gguf"),
        ("org/no-config", None): (2, "has no config.json", ""),
        ("org/good", "nope"): (2, "org/good has no revision nope", "/tree/main"),
        ("org/a/b c", None): (2, "is no hub id", ""),
        ("org/down", None): (7, "answered with status 500", "try again"),
        ("org/busy", None): (7, "answered with status 429", "try again"),
        ("org/slow", None): (7, "could not be reached", "check the network"),
    }
    answers = ask([(*case, False) for case in expected], tmp_path, HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    for (case, (exit_code, what, how)), answer in zip(expected.items(), answers, strict=True):
        assert answer[0] == exit_code, (case, answer)
        assert what in answer[1], (case, answer)
        assert how in answer[1], (case, answer)
        assert "\n" not in answer[1]
    assert answers[list(expected).index(("org/good", "nope"))][2] == ["model", "revision"]


def test_a_missing_model_without_a_token_asks_for_one(hub: HubServer, tmp_path: Path) -> None:
    (answer,) = ask([("org/missing", None, False)], tmp_path, HF_ENDPOINT=hub.endpoint, HF_TOKEN_PATH="/nowhere")
    assert answer[0] == 2
    assert "set HF_TOKEN if it is private" in answer[1]


def test_network_that_is_down_is_worth_a_retry(tmp_path: Path) -> None:
    (answer,) = ask([("org/good", None, False)], tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}")
    assert answer[0] == 7
    assert "could not be reached" in answer[1]


def test_a_model_is_pinned_downloaded_once_and_then_needs_no_network(hub: HubServer, tmp_path: Path) -> None:
    endpoint = hub.endpoint
    ((code, message, _),) = ask([("org/good", None, True)], tmp_path, HF_ENDPOINT=endpoint)
    assert code == 2
    assert "not (wholly) in the cache, and the network is off" in message

    ((code, commit, names),) = ask([("org/good", None, False)], tmp_path, HF_ENDPOINT=endpoint)
    assert (code, commit) == (0, COMMIT)
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert "tokenizer.json" in names
    # Neither pickle nor weights beside the index are downloaded.
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & set(names)

    hub.paths.clear()
    pinned = ask([("org/good", COMMIT, False)], tmp_path, HF_ENDPOINT=endpoint)
    offline = ask([("org/good", None, True)], tmp_path, HF_ENDPOINT=endpoint)
    by_variable = ask([("org/good", None, False)], tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert hub.paths == []
    down = ask([("org/good", None, False)], tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}")
    assert pinned == offline == by_variable == down == [[0, COMMIT, names]]


def test_offline_with_half_a_model_says_so(hub: HubServer, tmp_path: Path) -> None:
    ask([("org/good", None, False)], tmp_path, HF_ENDPOINT=hub.endpoint)
    shard = next(tmp_path.rglob("model-00002*.safetensors"))
    shard.unlink()
    ((code, message, _),) = ask([("org/good", None, True)], tmp_path, HF_ENDPOINT=hub.endpoint)
    assert code == 2
    assert "not (wholly) in the cache" in message


def test_a_tokenizer_needs_no_weights(hub: HubServer, tmp_path: Path) -> None:
    driver = "from ftkit.models import hub; print(hub.fetch_tokenizer('org/good', code=False, offline={offline}))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = clean | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint}

    def fetch(*, offline: bool) -> str:
        command = [sys.executable, "-c", driver.format(offline=offline)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    names = {path.name for path in Path(fetch(offline=False)).iterdir()}
    assert {"tokenizer.json", *PROCESSOR_FILES} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    hub.paths.clear()
    assert fetch(offline=True) == fetch(offline=True)
    assert hub.paths == []
