"""What goes wrong between ftkit and a server: one line each, with what to do."""

import socket
import time
from typing import Any

import pytest

from ftkit.errors import NetworkError, UserError
from ftkit.verification.client import Client, NotThereError, RefusedError
from tests.verification.fake_vllm import serving


class Says:
    """A server that says one thing to everybody."""

    def __init__(self, status: int, values: Any, *, seconds: float = 0.0) -> None:
        self.status, self.values, self.seconds = status, values, seconds
        self.requests: list[Any] = []

    def get(self, path: str) -> tuple[int, Any]:
        time.sleep(self.seconds)
        return self.status, self.values

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.get(path)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match=r"no address of a server; write http://HOST:PORT"):
        Client(url)


def test_where_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = rf"no server answers at http://127.0.0.1:{port} \(connection refused\); start"
    with pytest.raises(NetworkError, match=message):
        Client(f"http://127.0.0.1:{port}/v1/").get("/props")


def test_a_host_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **keywords: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(NetworkError, match=r"there is no host nowhere\.invalid; check the name in --endpoint"):
        Client("http://nowhere.invalid:8000").get("/props")


def test_what_listens_and_is_no_http_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = Client(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.3)
        with pytest.raises(NetworkError, match=r"has not answered within 0 seconds; see whether it is busy"):
            client.get("/props")


@pytest.mark.parametrize(
    ("status", "values", "error", "text"),
    [
        (
            404,
            {"error": {"message": "File Not Found"}},
            NotThereError,
            r"/props is not there \(404 File Not Found\); check",
        ),
        (405, {"detail": "Method Not Allowed"}, NotThereError, r"405 Method Not Allowed"),
        (401, {"error": {"message": "Invalid API Key"}}, UserError, r"asks for an API key .*; set OPENAI_API_KEY"),
        (503, {"error": {"message": "Loading model"}}, NetworkError, r"is not ready \(503 Loading model\); wait until"),
        (400, {"error": "no such role"}, RefusedError, r"refuses \(400 no such role\); read the server's log"),
        (500, b"<html>", RefusedError, r"refuses \(500 Internal Server Error\)"),
        (200, b"<html>", UserError, r"/props answers no JSON; name the address of an inference server"),
    ],
)
def test_what_servers_say(status: int, values: Any, error: type[Exception], text: str) -> None:
    with serving(Says(status, values)) as url, pytest.raises(error, match=text) as caught:
        Client(url).get("/props")
    assert "\n" not in str(caught.value)


def test_a_slow_server_is_given_up() -> None:
    with serving(Says(200, {}, seconds=1.0)) as url:
        with pytest.raises(NetworkError, match="has not answered within 0 seconds"):
            Client(url, seconds=0.2).post("/tokenize", {})
        time.sleep(1.0)  # The server's thread ends in peace.


def test_the_key_and_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(fake := Says(200, {"a": [1]})) as url:
        assert Client(f"{url}/v1").get("/v1/models") == {"a": [1]}
        monkeypatch.delenv("OPENAI_API_KEY")
        assert Client(url).post("/tokenize", {"content": "é"}) == {"a": [1]}
    (first, _, headers), (second, body, others) = fake.requests
    assert (first, second, body) == ("/v1/models", "/tokenize", {"content": "é"})
    assert headers["Authorization"] == "Bearer sesame"
    assert "Authorization" not in others
