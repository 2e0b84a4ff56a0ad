"""What a trained model can be exported to. To add a format: one file with an `Exporter`, one line in EXPORTERS."""

from pathlib import Path
from typing import Protocol

import torch

from ftkit.artifacts.export_adapter import export_adapter
from ftkit.artifacts.export_gguf import export_gguf
from ftkit.artifacts.export_hf import export_hf
from ftkit.errors import UserError
from ftkit.runs import Target


class Exporter(Protocol):
    """Writes one format."""

    def __call__(
        self, target: Target, output: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> None:
        """Write `output`, whole or not at all.

        Args:
            dtype: precision of the result; None keeps the stored one.
            overwrite: move an `output` that exists to `NAME.old-1`.

        Raises:
            UserError: this cannot be exported so, or `output` exists.
            CheckFailedError: a check of the result failed; it is kept as `NAME.rejected`.
            StorageError: disk full.
        """


EXPORTERS: dict[str, Exporter] = {"hf": export_hf, "adapter": export_adapter, "gguf": export_gguf}
"""`--format` -> what writes it."""

LATER = ("onnx",)


def find_exporter(name: str) -> Exporter:
    """The exporter of a `--format`.

    Raises:
        UserError: there is none.
    """
    if name in EXPORTERS:
        return EXPORTERS[name]
    what = f"export to {name}: not in this version" if name in LATER else f"there is no export format {name}"
    raise UserError(what, how=f"--format {' or '.join(EXPORTERS)}")
