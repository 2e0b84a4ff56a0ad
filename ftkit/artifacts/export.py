"""What a trained model can be exported to. To add a format: one file with an `Exporter`, one line in EXPORTERS."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ftkit.artifacts.export_adapter import export_adapter
from ftkit.artifacts.export_hf import export_hf
from ftkit.artifacts.proof import Prompt
from ftkit.errors import UserError
from ftkit.models.load import BaseModel


class Exporter(Protocol):
    """Writes one format."""

    def __call__(
        self,
        model: BaseModel,
        adapter: Path | None,
        output: Path,
        *,
        tokenizer: Path | None = None,
        prompts: Sequence[Prompt] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write `output`, whole or not at all.

        Args:
            model: the base of an adapter, or the whole model.
            adapter: the adapter's directory, where there is one.
            tokenizer: directory of the tokenizer that goes with the tuned weights; None: the model's.
            prompts: token ids for the proof of a merge, besides those that ship with ftkit.
            chat_template_kwargs: of the run.
            dtype: precision of the result; None keeps the stored one.
            overwrite: move an `output` that exists to `NAME.old-1`.

        Raises:
            UserError: this cannot be exported so, or `output` exists.
            CheckFailedError: a check of the result failed; it is kept as `NAME.rejected`.
            StorageError: disk full.
        """


EXPORTERS: dict[str, Exporter] = {"hf": export_hf, "adapter": export_adapter}
"""`--format` -> what writes it."""

LATER = ("gguf", "onnx")


def find_exporter(name: str) -> Exporter:
    """The exporter of a `--format`.

    Raises:
        UserError: there is none.
    """
    if name in EXPORTERS:
        return EXPORTERS[name]
    what = f"export to {name}: not in this version" if name in LATER else f"there is no export format {name}"
    raise UserError(what, how=f"--format {' or '.join(EXPORTERS)}")
