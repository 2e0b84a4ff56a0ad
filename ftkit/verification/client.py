"""JSON over HTTP: the only module that talks to a server. What goes wrong is one line with what to do."""

import json
import os
import socket
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, OpenerDirector, ProxyHandler, Request, build_opener

from ftkit.errors import NetworkError, UserError

API_KEY = "OPENAI_API_KEY"
"""Environment variable with the key that a server asks for."""
SECONDS = 120.0
"""To wait for one answer: a few tokens of a large model on a CPU."""
_LONGEST = 200
"""Characters of a server's own words that are passed on."""


class RefusedError(UserError):
    """The server does not take what it was sent; it may take other things."""


class NotThereError(UserError):
    """The server has no such place (404, 405, 501)."""


class Client:
    """A server's address."""

    def __init__(self, url: str, *, seconds: float = SECONDS) -> None:
        """`url` with or without the /v1 of OpenAI's clients; `seconds` to wait for each answer.

        Raises:
            UserError: it is no address of a server.
        """
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._seconds = seconds
        try:
            parts = urlsplit(self.url)
            valid = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            )
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"--endpoint {url}: no address of a server", how="write http://HOST:PORT")
        self._opener = _opener(parts.hostname or "")

    def get(self, path: str) -> Any:
        """What the server answers to GET.

        Raises:
            NotThereError: it has no such place.
            RefusedError: it does not take this.
            UserError: it wants a key, or what it says is no JSON.
            NetworkError: it cannot be reached, or takes too long.
        """
        return self._ask(path, None)

    def post(self, path: str, values: dict[str, Any]) -> Any:
        """What the server answers to `values`, as JSON; errors as `get`."""
        return self._ask(path, json.dumps(values).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        headers = {"Accept": "application/json", "User-Agent": "ftkit"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        place = self.url + path
        try:
            with self._opener.open(Request(place, data=body, headers=headers), timeout=self._seconds) as response:
                text = response.read()
        except HTTPError as error:
            raise _refusal(error, place) from None
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from None
        try:
            return json.loads(text)
        except ValueError:
            raise UserError(f"{place} answers no JSON", how="name the address of an inference server") from None

    def _unreachable(self, error: OSError | HTTPException) -> NetworkError:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            what = f"{self.url} has not answered within {self._seconds:.0f} seconds"
            return NetworkError(what, how="see whether it is busy or still loading, and try again")
        if isinstance(reason, socket.gaierror):
            return NetworkError(f"there is no host {urlsplit(self.url).hostname}", how="check the name in --endpoint")
        said = (reason.strerror if isinstance(reason, OSError) else None) or str(reason) or type(reason).__name__
        what = f"no server answers at {self.url} ({said.lower()})"
        return NetworkError(what, how="start it, wait until it has loaded the model, and check host and port")


def _opener(host: str) -> OpenerDirector:
    """A proxy of the environment is for the world outside: none knows this machine by the name localhost."""
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    return build_opener(ProxyHandler({}), HTTPHandler()) if here else build_opener()


def _refusal(error: HTTPError, place: str) -> UserError | NetworkError:
    said = _words(error)
    if error.code in (404, 405, 501):
        return NotThereError(f"{place} is not there ({said})", how="check the address in --endpoint")
    if error.code in (401, 403):
        return UserError(f"{place} asks for an API key ({said})", how=f"set {API_KEY}")
    if error.code in (408, 429, 502, 503, 504):
        return NetworkError(f"{place} is not ready ({said})", how="wait until the model is loaded, and try again")
    return RefusedError(f"{place} refuses ({said})", how="read the server's log")


def _words(error: HTTPError) -> str:
    """What the server says about its refusal, in OpenAI's form, in FastAPI's, or only by its code."""
    try:
        values = json.loads(error.read())
    except (ValueError, OSError, HTTPException):
        values = None
    said = values.get("error", values.get("detail", values.get("message"))) if isinstance(values, dict) else None
    if isinstance(said, dict):
        said = said.get("message")
    text = " ".join(str(said).split())[:_LONGEST] if said else (error.reason or "no reason given")
    return f"{error.code} {text}"
