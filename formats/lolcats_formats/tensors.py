"""safetensors files. Headers are read without torch. Data is written one tensor at a time, and always the same way.

The library's own `save_file` is not used for writing. It leaves mode 0600, does not fsync, and orders metadata at
random, and its bytes would have to be read again to be hashed. Files written here have the same bytes as the library's
own, except for the order of the metadata.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .canonical import parse
from .errors import Damaged, FormatError
from .limits import MAX_HEADER_BYTES, MAX_RANK

if TYPE_CHECKING:
    import torch

CHUNK = 2**20  # bytes hashed and written, or read and hashed, at a time

# Bytes of an element. The order is that of the data in a file (larger elements first keeps each aligned);
# names and order are those of the safetensors library.
ITEM_BYTES = {
    "U64": 8, "I64": 8, "F64": 8, "C64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2,
    "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_RANK = {name: i for i, name in enumerate(ITEM_BYTES)}
_TORCH_NAMES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path, where: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, from its header alone; `where` names the file in messages.

    Raises Damaged unless the header is well-formed and its tensors fill the file without gap or overlap.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
        if length < 2 or length > min(size - 8, MAX_HEADER_BYTES):
            raise Damaged(
                f"{where} is no safetensors file: its header would have {length} bytes, but the file has {size}, and "
                f"a header may have {MAX_HEADER_BYTES}."
            )
        header = parse(file.read(length).rstrip(b" "), f"The header of {where}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Damaged(f"The header of {where} is damaged: its __metadata__ is not a map from text to text.")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _entry(entry, f"The header of {where} is damaged: {name[:120]!r}")
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise Damaged(
                f"The header of {where} is damaged: at byte {end} of the data, tensors overlap or leave a gap."
            )
        end = stop
    if end != size - 8 - length:
        raise Damaged(
            f"{where} is truncated or too long: its tensors take {end} bytes, and it holds {size - 8 - length}."
        )
    return tensors


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None, where: str) -> Iterator[Any]:
    """The bytes of a safetensors file, in chunks; at most one tensor is copied at a time.

    The metadata defaults to {"format": "pt"}, which transformers expects. Raises FormatError for tensors that cannot
    be stored.
    """
    assert sys.byteorder == "little"
    metadata = {"format": "pt"} if metadata is None else metadata
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    infos = {name: _describe(tensor, f"{where}: tensor {name!r}") for name, tensor in tensors.items()}
    order = sorted(infos, key=lambda name: (_RANK[infos[name].dtype], name.encode()))
    offset = 0
    for name in order:
        if name == "__metadata__":
            raise FormatError(f"{where}: No tensor can have the name {name!r}.")
        dtype, shape, nbytes = infos[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"{where} would hold too many tensors: its header would take {len(text)} bytes.")
    return _chunks(struct.pack("<Q", len(text)) + text, [tensors[name] for name in order])


def load(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """The named tensors, on the CPU, mapped from the file: memory is taken only for what is touched."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in names}


def _chunks(header: bytes, tensors: list[torch.Tensor]) -> Iterator[Any]:
    import torch

    yield header
    for tensor in tensors:
        if not tensor.numel():
            continue
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        view = flat.view(torch.uint8).numpy().data
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]


def _describe(tensor: torch.Tensor, where: str) -> TensorInfo:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise FormatError(f"{where} is a {type(tensor).__name__}, not a tensor.")
    dtype = _TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.is_meta or tensor.dim() > MAX_RANK:
        raise FormatError(
            f"{where} cannot be stored. It is {tensor.dtype}, {tensor.layout}, on {tensor.device}, with "
            f"{tensor.dim()} dimensions."
        )
    return TensorInfo(dtype, tuple(tensor.shape), tensor.numel() * ITEM_BYTES[dtype])


def _entry(entry: Any, where: str) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"{where} must have dtype, shape and data_offsets and nothing else.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Damaged(f"{where} has the dtype {str(dtype)[:40]!r}, which is not one of {', '.join(ITEM_BYTES)}.")
    if not _counts(shape) or len(shape) > MAX_RANK or not _counts(offsets) or len(offsets) != 2:
        raise Damaged(f"{where} has a shape or data_offsets that are not lists of sizes.")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise Damaged(f"{where} has {offsets[1] - offsets[0]} bytes, but its shape {shape} of {dtype} needs {nbytes}.")
    return TensorInfo(dtype, tuple(shape), nbytes), (offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
