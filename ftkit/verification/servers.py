"""Servers as sides: llama.cpp's own, and those with OpenAI's interface and vLLM's tokenizer endpoint.

What they are asked:

    llama.cpp  GET /props; POST /apply-template, /tokenize, /v1/chat/completions with logprobs, which hold token ids,
               and /completion with return_tokens
    vLLM       GET /v1/models; POST /tokenize with messages, /v1/chat/completions with return_token_ids
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftkit.errors import UserError
from ftkit.verification.client import Client, NotThereError, RefusedError
from ftkit.verification.conversations import Probe
from ftkit.verification.sides import GGUF_KINDS, PRECISIONS, Answer

FORCED_TOKENS, FORCE = 4, 100.0
"""Tokens of an answer that is made to end at once, and the bias of the token that ends it: OpenAI's largest."""
_TOKEN_ID = "token_id:"
_GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    # What a model's generation config or a server's own defaults may change, under the names that either knows.
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stream": False,
    # Ids of the answer's tokens: llama.cpp tells them in the first, vLLM in the second, older ones in the third.
    "logprobs": True,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "cache_prompt": False,
}


class _Server:
    """What all have in common: chat completions."""

    hint = "serve what `ftkit merge` or `ftkit export` wrote, with its own chat template"

    def __init__(self, client: Client, model: str, context: int | None, precision: str) -> None:
        self.name, self.model, self.context, self.precision = client.url, model, context, precision
        self._client = client

    def answers(
        self, asked: Sequence[tuple[Probe, Sequence[int]]], kwargs: Mapping[str, Any], limit: int
    ) -> list[Answer] | None:
        """Greedy answers by /v1/chat/completions."""
        return [self._answer(probe, kwargs, max_tokens=limit) for probe, _ in asked]

    def stops_at(self, token_id: int, probe: Probe, kwargs: Mapping[str, Any]) -> bool | None:
        """Whether an answer ends at the token, which is made the first one by its bias."""
        try:
            answer = self._answer(probe, kwargs, max_tokens=FORCED_TOKENS, logit_bias={str(token_id): FORCE})
        except RefusedError:
            return None
        if answer.stopped:
            return True
        # Without ids, or with another first token, the bias may have been ignored.
        return False if answer.ids and answer.ids[0] == token_id else None

    def _answer(self, probe: Probe, kwargs: Mapping[str, Any], **options: Any) -> Answer:
        values = self._client.post("/v1/chat/completions", {**self._conversation(probe, kwargs), **_GREEDY, **options})
        try:
            (choice,) = values["choices"]
            text, finish = choice["message"].get("content") or "", choice["finish_reason"]
            usage = values.get("usage") or {}
            ids, fed = _ids(choice), usage.get("prompt_tokens")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._strange("/v1/chat/completions") from None
        if ids is not None and usage.get("completion_tokens") not in (None, len(ids)):
            ids = None  # llama.cpp leaves tokens out that are only a part of a character.
        return Answer(ids, text, finish == "stop", fed)

    def _conversation(self, probe: Probe, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {"model": self.model, "messages": [_openai(one) for one in probe.messages]}
        if probe.conversation.tools:
            values["tools"] = list(probe.conversation.tools)
        if kwargs:
            values["chat_template_kwargs"] = dict(kwargs)
        return values

    def _strange(self, path: str) -> UserError:
        what = f"{self.name}{path} does not answer as llama.cpp or vLLM do"
        return UserError(what, how="bring ftkit or the server up to date")


class LlamaCppServer(_Server):
    """`llama-server` of llama.cpp."""

    def __init__(self, client: Client, props: Mapping[str, Any]) -> None:
        context = (props.get("default_generation_settings") or {}).get("n_ctx")
        precision = GGUF_KINDS.get(str(props.get("model_ftype")).removeprefix("all ").upper(), PRECISIONS[-1])
        super().__init__(client, str(props.get("model_alias") or ""), context, precision)
        file = Path(str(props.get("model_path") or self.model)).name
        self.kind = f"llama.cpp with {file} ({props.get('model_ftype') or 'of unknown precision'})"

    def answers(
        self, asked: Sequence[tuple[Probe, Sequence[int]]], kwargs: Mapping[str, Any], limit: int
    ) -> list[Answer] | None:
        """Greedy answers by /v1/chat/completions; ids that these leave out by /completion, given the prompt's ids."""
        answers = super().answers(asked, kwargs, limit) or []
        for place, (_, prompt) in enumerate(asked):
            if answers[place].ids is None:
                again = {"prompt": list(prompt), "n_predict": limit, "return_tokens": True}
                try:
                    ids = tuple(map(int, self._client.post("/completion", {**again, **_GREEDY})["tokens"]))
                except (KeyError, TypeError, ValueError):
                    raise self._strange("/completion") from None
                answers[place] = replace(answers[place], ids=ids)
        return answers

    def prompt(self, probe: Probe, kwargs: Mapping[str, Any]) -> list[int]:
        """Ids of the text that its template gives, with what the server puts before every text."""
        try:
            text = self._client.post("/apply-template", self._conversation(probe, kwargs))["prompt"]
            # As the server itself encodes the text of a chat.
            options = {"content": text, "add_special": True, "parse_special": True}
            return [int(token_id) for token_id in self._client.post("/tokenize", options)["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise self._strange("/tokenize") from None


class OpenAiServer(_Server):
    """A server with OpenAI's interface that tokenizes conversations: vLLM."""

    def __init__(self, client: Client, model: str, entry: Mapping[str, Any]) -> None:
        # It does not say; vLLM's weights have 16 bits unless it is told otherwise.
        super().__init__(client, model, entry.get("max_model_len"), "bfloat16")
        parent = f", on {entry['parent']}" if entry.get("parent") else ""
        self.kind = f"{entry.get('owned_by') or 'OpenAI-compatible'} server with {model}{parent}"

    def prompt(self, probe: Probe, kwargs: Mapping[str, Any]) -> list[int]:
        """Ids of the conversation by its tokenizer endpoint."""
        options = {"add_generation_prompt": True, "add_special_tokens": False}
        try:
            answer = self._client.post("/tokenize", {**self._conversation(probe, kwargs), **options})
        except NotThereError as error:
            what = f"{self.name} has no tokenizer endpoint (POST /tokenize), so what it feeds its model is not known"
            raise UserError(what, how="verify can ask llama.cpp's llama-server and vLLM") from error
        try:
            return [int(token_id) for token_id in answer["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise self._strange("/tokenize") from None


def find_server(client: Client, *, model: str | None, directories: Sequence[Path]) -> LlamaCppServer | OpenAiServer:
    """Find out what listens at an address, and which of its models is meant.

    Args:
        model: its name on the server; None: the one there is, or the adapter that lies in one of `directories`, or the
            only adapter.

    Raises:
        UserError: nothing that ftkit knows, or several models to choose from.
        NetworkError: no server answers.
    """
    try:
        props = client.get("/props")
        if isinstance(props, dict) and "default_generation_settings" in props:
            return LlamaCppServer(client, props)
    except NotThereError:
        pass
    try:
        entries = {str(entry["id"]): entry for entry in client.get("/v1/models")["data"]}
    except (NotThereError, KeyError, TypeError):
        what = f"{client.url} is no server that ftkit knows: it has neither /props nor /v1/models"
        raise UserError(what, how="name the address of llama.cpp's llama-server or of vLLM") from None
    name = model or _choose(entries, directories)
    if name not in entries:
        what = f"{client.url} serves no model {name}" if name else f"{client.url} serves several models"
        raise UserError(what, how=f"name one with --model: {', '.join(entries) or 'it serves none'}")
    return OpenAiServer(client, name, entries[name])


def _choose(entries: Mapping[str, Mapping[str, Any]], directories: Sequence[Path]) -> str | None:
    """The only model, that whose files are ours, or the only adapter (which has a `parent`)."""
    places = {path.resolve() for path in directories}
    ours = [name for name, entry in entries.items() if Path(str(entry.get("root") or name)).resolve() in places]
    adapters = [name for name, entry in entries.items() if entry.get("parent")]
    return next((names[0] for names in (list(entries), ours, adapters) if len(names) == 1), None)


def _ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Ids of an answer's tokens, in any of the forms that servers tell them."""
    if choice.get("token_ids"):
        return tuple(map(int, choice["token_ids"]))
    ids = []
    for token in (choice.get("logprobs") or {}).get("content") or ():
        if "id" in token:
            ids.append(int(token["id"]))
        elif str(token.get("token")).startswith(_TOKEN_ID):
            ids.append(int(token["token"].removeprefix(_TOKEN_ID)))
        else:
            return None
    return tuple(ids) or None


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    """The message in OpenAI's form, where the arguments of a call are JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
