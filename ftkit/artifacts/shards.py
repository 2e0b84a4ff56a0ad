"""Writing one safetensors file tensor by tensor: none but the one at hand is in memory.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of length, a JSON header that says dtype, shape
and place of every tensor, the tensors one after another. `safetensors.torch.save_file` wants all of them at once, and
writes a header of its own: a file of other tools, copied through it, would not have the same bytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_METADATA = "__metadata__"


def transform_file(
    source: Path,
    target: Path,
    transform: Callable[[str, Tensor], Tensor],
    *,
    dtype: torch.dtype | None,
    rows: Mapping[str, int] | None = None,
) -> int:
    """Write `transform(name, tensor)` of every tensor of `source` to `target`; returns their bytes in all.

    Where neither precision nor shape changes, all but the changed tensors is the same byte for byte, the header too.

    Args:
        transform: keeps shape, `rows` aside, and, where `dtype` is None, precision.
        dtype: precision that it gives floating-point tensors.
        rows: name of a tensor -> rows that it has at least afterwards.
    """
    rows = rows or {}
    raw = _read_header(source)
    header: dict[str, Any] = json.loads(raw)
    by_place = sorted((name for name in header if name != _METADATA), key=lambda name: header[name]["data_offsets"])
    with safe_open(source, framework="pt") as file, target.open("wb") as output:
        growing = any(name in rows and rows[name] > header[name]["shape"][0] for name in by_place)
        if dtype is not None or growing:
            raw = _recast(header, by_place, {name: file.get_tensor(name) for name in by_place}, dtype, rows)
        output.write(len(raw).to_bytes(8, "little") + raw)
        total = 0
        for name in by_place:
            written = transform(name, file.get_tensor(name)).contiguous()
            total += output.write(written.reshape(-1).view(torch.uint8).numpy().data)
    return total


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _recast(
    header: dict[str, Any],
    by_place: list[str],
    mapped: dict[str, Tensor],
    dtype: torch.dtype | None,
    rows: Mapping[str, int],
) -> bytes:
    """The header of the same tensors in another precision or with more rows; `mapped` ones are not read."""
    recast, end = dict(header), 0
    for name in by_place:
        tensor, entry = mapped[name], header[name]
        cast = dtype is not None and tensor.is_floating_point()
        code = _CODES[dtype] if dtype is not None and cast else entry["dtype"]
        shape = list(entry["shape"])
        if name in rows:
            shape[0] = max(shape[0], rows[name])
        size = math.prod(shape) * (dtype.itemsize if dtype is not None and cast else tensor.itemsize)
        recast[name] = {**entry, "dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(recast, separators=(",", ":")).encode()
    # Padded, as safetensors does it, so that the tensors begin at a multiple of 8 bytes.
    return raw + b" " * (-len(raw) % 8)
