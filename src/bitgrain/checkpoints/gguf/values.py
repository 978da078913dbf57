"""The values of GGUF's metadata: kinds, long arrays as read, and the bytes of values that are written.

A kind is written `uint32`, `float32`, `string`, `bool`, ... or `array[kind]`. Format: the GGUF specification
(ggml/docs/gguf.md), section "File structure"; everything is little-endian.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, overload

from bitgrain.errors import PlanError

Value: TypeAlias = "str | bool | int | float | Sequence[Any]"

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: Mapping[int, tuple[str, str]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    BOOL: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
"""Kinds of one number: their number in files, name, and letter (of `struct` and of `array`)."""
_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING}


class Numbers(Sequence[Any]):
    """An array of numbers as it was read: as many bytes as in the file. Compares equal to a list."""

    def __init__(self, data: memoryview, letter: str) -> None:
        self._bool = letter == "?"
        self._items: array[Any] = array("B" if self._bool else letter)
        self._items.frombytes(data)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        found = self._items[index]
        if isinstance(found, array):
            return [bool(item) for item in found] if self._bool else found.tolist()
        return bool(found) if self._bool else found

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return _show(self)


class Strings(Sequence[str]):
    """An array of strings as it was read: UTF-8 in one piece, and where each ends. Compares equal to a list."""

    def __init__(self, text: bytearray, ends: array[int]) -> None:
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        start = self._ends[place - 1] if place else 0
        return self._text[start : self._ends[place]].decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends:
            yield self._text[start:end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return _show(self)


def encode_string(text: str) -> bytes:
    """Length and UTF-8. Raises UnicodeEncodeError for lone surrogates."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_value(key: str, value: Value, kind: str | None) -> bytes:
    """The kind and bytes of one value of the metadata.

    kind  None: uint32 for integers (int32 where one is negative, 64 bits where they are larger; int32 in arrays),
          float32 for numbers with a point
    Raises PlanError for a value that its kind cannot hold, or that has no kind.
    """
    try:
        kind = kind or _kind_of(value)
        if kind.startswith("array["):
            inner = kind.removeprefix("array[").removesuffix("]")
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"{type(value).__name__} is not a sequence")
            head = struct.pack("<IIQ", ARRAY, _NUMBERS[inner], len(value))
            return head + _encode_items(value, inner)
        return struct.pack("<I", _NUMBERS[kind]) + _encode_items([value], kind)
    except (struct.error, OverflowError, TypeError, KeyError, UnicodeEncodeError) as error:
        raise PlanError(
            f"metadata {key!r}: {_short(value)} cannot be stored as {kind or 'any kind of GGUF'} ({error}). Correct it."
        ) from error


def _encode_items(items: Sequence[Any], kind: str) -> bytes:
    if kind == "string":
        if not all(isinstance(item, str) for item in items):
            raise TypeError("not all are text")
        return b"".join(encode_string(item) for item in items)
    wanted = bool if kind == "bool" else (int, float) if kind.startswith("float") else int
    if not all(isinstance(item, wanted) and isinstance(item, bool) == (kind == "bool") for item in items):
        raise TypeError(f"not all are {kind}")
    return struct.pack(f"<{len(items)}{SCALARS[_NUMBERS[kind]][1]}", *items)


def _kind_of(value: Value) -> str:
    if isinstance(value, str):
        return "string"
    if isinstance(value, Sequence):
        if value and all(isinstance(item, str) for item in value):  # the long ones
            return "array[string]"
        kinds = {_kind_of(item) for item in value}
        if kinds <= {"uint32", "int32"} and kinds:
            return "array[int32]" if max(value) < 1 << 31 else "array[int64]"
        if kinds <= {"uint32", "int32", "int64", "uint64"} and kinds:
            return "array[uint64]" if max(value) >= 1 << 63 else "array[int64]"
        if len(kinds) != 1:
            raise TypeError("an empty array, or one of several kinds")
        (kind,) = kinds
        return f"array[{kind}]"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if value < 0:
            return "int32" if value >= -(1 << 31) else "int64"
        return "uint32" if value < 1 << 32 else "uint64"
    if not isinstance(value, float):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{type(value).__name__} has no kind")
    return "float32"


def _same(mine: Sequence[Any], other: object) -> bool:
    if not isinstance(other, Sequence) or isinstance(other, str):
        return NotImplemented
    return len(mine) == len(other) and all(a == b for a, b in zip(mine, other, strict=True))


def _show(items: Sequence[Any]) -> str:
    more = f", ... {len(items) - 3} more" if len(items) > 3 else ""
    return f"[{', '.join(repr(item) for item in items[:3])}{more}]"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
