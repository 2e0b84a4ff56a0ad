"""Exported files as sides: a model directory, a .gguf file, an adapter's directory; and what a run has of them."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftkit.errors import UserError
from ftkit.evaluation.generation import cached_tokens, generate
from ftkit.models.files import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, read_json, stored_dtype
from ftkit.models.gguf import check_rotary, end_tokens, read_tokenizer
from ftkit.models.load import BaseModel, load_tokenizer, load_weights, local_directory
from ftkit.models.quiet import quiet_transformers
from ftkit.runs import EXPORT, MERGED, Target
from ftkit.verification.client import RefusedError
from ftkit.verification.conversations import Probe
from ftkit.verification.sides import GGUF_KINDS, PRECISIONS, Answer

_ANEW = "make it anew with --overwrite"


class Directory:
    """A directory with a tokenizer, as transformers loads it; one without a model of its own answers nothing."""

    context: int | None = None
    hint = _ANEW

    def __init__(self, path: Path, *, device: torch.device, compute: torch.dtype, answers: bool, code: bool) -> None:
        """`compute` is the precision to compute in; `answers`: whether to ask its model; `code`: whether it may run."""
        self.name = str(path)
        self.kind = "model directory" if answers else "tokenizer and template"
        self.precision = str(stored_dtype(path)).removeprefix("torch.") if answers else PRECISIONS[0]
        self._path, self._device, self._compute, self._answers, self._code = path, device, compute, answers, code

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        return self._load_tokenizer()

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens at which generation ends, as its files say."""
        path = self._path / GENERATION_CONFIG_NAME
        return _as_tuple(read_json(path).get("eos_token_id") if path.is_file() else None)

    def prompt(self, probe: Probe, kwargs: Mapping[str, Any]) -> list[int]:
        """Ids by `apply_chat_template`."""
        if not self.tokenizer.chat_template:
            raise RefusedError("has no chat template", where=self.name, how=self.hint)
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                probe.messages,
                tools=list(probe.conversation.tools) or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **kwargs,
            )
        except Exception as error:  # A template is foreign code.
            raise RefusedError(f"the template fails: {error}", where=self.name, how=self.hint) from None
        return [int(token_id) for token_id in rendered]

    def answers(
        self, asked: Sequence[tuple[Probe, Sequence[int]]], kwargs: Mapping[str, Any], limit: int
    ) -> list[Answer] | None:
        """Greedy answers of its model, which stop at the tokens that its files say."""
        del kwargs
        if not self._answers:
            return None
        model = self._load_model().eval()
        nn.Module.to(model, self._device)
        prompts = [ids for _, ids in asked]
        # Batches without much padding: the long text goes alone, the others together.
        room = min(cached_tokens(model), max(map(len, prompts)) + limit)
        written = generate(model, prompts, end_ids=self.end_ids, max_new_tokens=limit, max_tokens=room)
        answers = []
        for one in written:
            ids = one.ids if one.end_id is None else (*one.ids, one.end_id)
            text = str(self.tokenizer.decode(list(one.ids), skip_special_tokens=True))
            answers.append(Answer(ids, text, one.finished))
        return answers

    def stops_at(self, token_id: int, probe: Probe, kwargs: Mapping[str, Any]) -> bool | None:
        """Whether its files count the token among those that end generation."""
        del probe, kwargs
        return token_id in self.end_ids

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(BaseModel(self.name, path=self._path, trust_remote_code=self._code))

    def _load_model(self) -> PreTrainedModel:
        return load_weights(BaseModel(self.name, path=self._path, trust_remote_code=self._code), dtype=self._compute)


class GgufFile(Directory):
    """A .gguf file as transformers reads it, dequantized; what llama.cpp makes of it, only its server tells."""

    def __init__(self, path: Path, *, device: torch.device, compute: torch.dtype) -> None:
        from gguf import GGUFReader

        super().__init__(path, device=device, compute=compute, answers=False, code=False)
        self._reader = reader = GGUFReader(path)
        kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
        # The coarsest of them.
        self.precision = max((GGUF_KINDS.get(kind, PRECISIONS[-1]) for kind in kinds), key=PRECISIONS.index)
        self.kind, self._answers = f".gguf file in {self.precision}, read by transformers", True
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except ValueError as error:
            how = "serve it with llama.cpp, and name the server with --endpoint"
            raise UserError(f"transformers cannot read it back: {error}", how=how, where=str(path)) from None
        try:
            check_rotary(path, reader, config, key=())
        except UserError:
            # Its answers would be another model's.
            self.kind = f".gguf file in {self.precision}, whose answers only a server can tell: see --endpoint"
            self._answers = False
        self._ends = _as_tuple(end_tokens(reader))

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens at which generation ends, as its metadata say."""
        return self._ends

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        quiet_transformers()
        # transformers shows a bar of its own, here and below.
        with redirect_stderr(io.StringIO()):
            return read_tokenizer(self._path, self._reader)

    def _load_model(self) -> PreTrainedModel:
        quiet_transformers()
        with redirect_stderr(io.StringIO()):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self._path.parent,
                gguf_file=self._path.name,
                local_files_only=True,
                dtype=self._compute,
                quantization_config=GgufConfig(dequantize=True),
            )
        return model


def find_files(
    found: Target, exported: Sequence[Path], *, device: torch.device, compute: torch.dtype
) -> list[Directory]:
    """What a target's tokenizer was saved to, what `ftkit merge` and `ftkit export` made of its run, and `exported`.

    Raises:
        UserError: one of `exported` holds nothing that could be compared.
    """
    code = found.model.trust_remote_code
    own = found.adapter or found.tokenizer or local_directory(found.model, weights=False)
    # The weights beside it are those that all others are compared with.
    sides = [Directory(own, device=device, compute=compute, answers=False, code=code)]
    # Of a checkpoint nothing was made.
    is_result = found.run is not None and own.resolve().parent == found.run.resolve()
    made = [found.run / name for name in (MERGED, EXPORT)] if found.run is not None and is_result else []
    for place in (*(path for path in made if path.is_dir()), *exported):
        sides += _sides_in(place, device=device, compute=compute, code=code)
    return sides


def _sides_in(place: Path, *, device: torch.device, compute: torch.dtype, code: bool) -> Iterator[Directory]:
    ggufs = [place] if place.suffix == ".gguf" else sorted(place.glob("*.gguf"))
    for file in ggufs:
        if not file.is_file():
            raise UserError("no such file", where=str(file), how="name what `ftkit export` has written")
        yield GgufFile(file, device=device, compute=compute)
    has_model = (place / CONFIG_NAME).is_file()
    if has_model or (place / ADAPTER_CONFIG_NAME).is_file():
        yield Directory(place, device=device, compute=compute, answers=has_model, code=code)
    elif not ggufs:
        raise UserError("there is neither a model nor an adapter here", where=str(place), how="name another directory")


def _as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
