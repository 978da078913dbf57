"""The safetensors header: strict parsing, and canonical writing.

Format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes, an unsigned little-endian 64-bit N; N bytes
of UTF-8 JSON that begins with `{` and may be padded with trailing spaces, `{name: {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": {str: str}}`, no duplicate keys; then one byte buffer that the
tensors cover entirely, with neither holes nor overlaps. Offsets are relative to the end of the header. Tensors
are little-endian and row-major.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitgrain.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
_GIT_LFS = b"version "  # a Git LFS pointer file begins so

# In the order in which the reference writer lays tensors out: widest first, so that every tensor is aligned to
# its element size; the order inside one width is the reference writer's too, which makes our bytes its bytes.
DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_RANK: Mapping[torch.dtype, int] = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor; `offset` counts from the start of the *file*."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """`nbytes` is the header's whole length, the 8 bytes of its length included; entries are by offset."""

    nbytes: int
    entries: tuple[HeaderEntry, ...]
    metadata: Mapping[str, str]


def shape_nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def header_length(first_bytes: bytes, file_bytes: int, label: str) -> int:
    """Length of the JSON, from a file's first 8 bytes. `label` names the file. Raises CheckpointError."""
    if len(first_bytes) < 8:
        raise _corrupt(label, f"it has {file_bytes} bytes, too few for a safetensors file")
    if first_bytes[:8] == _GIT_LFS:
        raise CheckpointError(f"{label}: this is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder.")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(label, f"its header claims {length} bytes, over the format's limit of {MAX_HEADER_BYTES}")
    if 8 + length > file_bytes:
        raise _corrupt(label, f"its header needs {8 + length} bytes, but the file has {file_bytes}")
    return length


def parse_header(text: bytes, file_bytes: int, label: str) -> Header:
    """Parse the header's JSON (without the 8 length bytes) of a file of `file_bytes` bytes, trusting nothing.

    Raises CheckpointError, naming `label`, for anything that the format does not allow, a size that does not
    agree with shape and dtype, or a dtype that torch cannot hold.
    """
    table = _load_json(text, label)
    metadata = table.pop(METADATA_KEY, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(label, f"{METADATA_KEY} is not a table of strings")
    start = 8 + len(text)
    entries = [_entry(name, info, start, label) for name, info in table.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes, entry.name))
    position = start
    for entry in entries:
        if entry.offset != position:
            what = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise _corrupt(label, f"tensor {entry.name!r} {what} (at byte {entry.offset}, expected {position})")
        position += entry.nbytes
    if position > file_bytes:
        raise CheckpointError(
            f"{label}: truncated, it has {file_bytes} of the {position} bytes that its header describes. "
            "Download or copy it again."
        )
    if position < file_bytes:
        raise _corrupt(label, f"{file_bytes - position} bytes follow its last tensor")
    return Header(start, tuple(entries), metadata)


def build_header(entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header's bytes (length included, space-padded to 8) for tensors laid one after the other as given.

    The caller orders them by `layout_key`. Metadata is sorted by key: the same input gives the same bytes.
    """
    table: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in entries:
        end = position + shape_nbytes(dtype, shape)
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def layout_key(name: str, dtype: torch.dtype) -> tuple[int, str]:
    """Sort key of the canonical order: element width descending (ties as the reference writer), then name."""
    return DTYPE_RANK[dtype], name


def strict_json(text: bytes) -> Any:
    """JSON without duplicate keys, NaN or Infinity. Raises ValueError (RecursionError becomes ValueError)."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _load_json(text: bytes, label: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _corrupt(label, "its header does not begin with '{'")
    try:
        table = strict_json(text)
    except ValueError as error:
        raise _corrupt(label, f"its header is not valid JSON: {error}") from error
    return table


def is_unicode(text: str) -> bool:
    """False for a lone surrogate: JSON can spell one, UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(name: str, info: Any, start: int, label: str) -> HeaderEntry:
    if not is_unicode(name):
        raise _corrupt(label, f"the tensor name {name!r} is not Unicode text")
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(label, f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    shape, offsets = info["shape"], info["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise _corrupt(label, f"tensor {name!r} has an impossible shape or data_offsets")
    if not isinstance(info["dtype"], str) or info["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{label}: tensor {name!r} has dtype {info['dtype']!r}, which cannot be read here. "
            f"Convert it to one of {', '.join(DTYPES)}."
        )
    dtype = DTYPES[info["dtype"]]
    # Zero sizes count as one here: an empty tensor's strides must fit 64 bits too.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise _corrupt(label, f"tensor {name!r} has an impossible shape")
    nbytes = shape_nbytes(dtype, shape)
    if offsets[1] - offsets[0] != nbytes:
        raise _corrupt(
            label,
            f"tensor {name!r} holds {offsets[1] - offsets[0]} bytes, but {info['dtype']} {shape} needs {nbytes}",
        )
    return HeaderEntry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {twice!r}")
    return table


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _corrupt(label: str, why: str) -> CheckpointError:
    return CheckpointError(f"{label}: not a sound safetensors file: {why}. Download or copy it again.")
