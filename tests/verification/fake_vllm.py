"""A server with vLLM's interface as documented, in this process, that computes with a tiny model."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class FakeVllm:
    """What it serves, and what is wrong with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"id": "tiny", "object": "model", "owned_by": "vllm", "root": "tiny", "parent": None, "max_model_len": 1024}
        ]
    )
    has_ids: bool = True
    """Whether `return_token_ids` is known; versions before it ignore the key."""
    has_bias: bool = True
    has_tokenizer: bool = True
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """Path, body and headers of each."""

    def get(self, path: str) -> tuple[int, Any]:
        """GET: status and answer."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": self.models}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """POST: status and answer."""
        if body.get("model") not in [entry["id"] for entry in self.models]:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist.", "code": 404}}
        if path == "/tokenize" and self.has_tokenizer:
            ids = self._prompt(body)
            return 200, {"count": len(ids), "max_model_len": 1024, "tokens": ids, "token_strs": None}
        if path == "/v1/chat/completions":
            return 200, self._complete(body)
        return 404, {"detail": "Not Found"}

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        messages = json.loads(json.dumps(body["messages"]))
        for call in (call for message in messages for call in message.get("tool_calls", [])):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return self.tokenizer.apply_chat_template(
            messages,
            tools=body.get("tools"),
            add_generation_prompt=True,
            return_dict=False,
            **(body.get("chat_template_kwargs") or {}),
        )

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["temperature"] == 0.0
        prompt = self._prompt(body)
        ids: list[int] = []
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in self.ends):
            logits = self.model(torch.tensor([[*prompt, *ids]])).logits[0, -1].clone()
            for token, bias in (body.get("logit_bias") or {}).items() if self.has_bias else ():
                logits[int(token)] += bias
            ids.append(int(logits.argmax()))
        stopped = bool(ids) and ids[-1] in self.ends
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.tokenizer.decode(ids, skip_special_tokens=True)},
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": None,
        }
        if self.has_ids and body.get("return_token_ids"):
            choice["token_ids"] = ids
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


@contextmanager
def serving(fake: Any) -> Iterator[str]:
    """Serve `fake.get` and `fake.post` on a free port; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.requests.append((self.path, {}, dict(self.headers)))
            self._answer(*fake.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append((self.path, body, dict(self.headers)))
            self._answer(*fake.post(self.path, body))

        def _answer(self, status: int, values: Any) -> None:
            body = values if isinstance(values, bytes) else json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
