"""Going through the header of a GGUF file, which tells its length nowhere: what is needed is read, piece by piece."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import Any

from bitgrain.checkpoints.durable import pread_into
from bitgrain.checkpoints.gguf.values import ARRAY, BOOL, SCALARS, STRING, Numbers, Strings, Value
from bitgrain.errors import CheckpointError

MAX_HEADER_BYTES = 1 << 28
MAX_DEPTH = 4
"""How deep arrays may be nested."""
MOST_ARRAYS = 1 << 16
MAX_NAME_BYTES = (1 << 16) - 1
"""The longest key or name (specification, "File structure")."""

MAX_STRING_BYTES = 1 << 24
"""The longest string: decoded, one takes up to four times as much."""

_PIECE = 1 << 20


class Cursor:
    """A place in the header of the file open as `fd`, of `size` bytes; `label` names it in errors.

    No count or length is believed before so many bytes are known to be there, and the header is held once.
    """

    def __init__(self, fd: int, size: int, label: str) -> None:
        self.size, self.label, self.position = size, label, 0
        self._fd = fd
        self._bytes = bytearray()
        self._arrays = 0

    def peek(self, nbytes: int) -> bytes:
        """The next bytes, fewer where the file ends."""
        nbytes = min(nbytes, self.size - self.position)
        self._need(nbytes, "its first bytes")
        return bytes(self._bytes[self.position : self.position + nbytes])

    def number(self, letter: str, what: str) -> Any:
        """One number, by its letter of `struct`."""
        nbytes = struct.calcsize(letter)
        self._need(nbytes, what)
        (number,) = struct.unpack_from(f"<{letter}", self._bytes, self.position)
        self.position += nbytes
        return number

    def text(self, what: str) -> str:
        """A name or key."""
        length = self.number("Q", what)
        if length > MAX_NAME_BYTES:
            raise unsound(self.label, f"{what} claims {length} bytes")
        return self._string(length, what)

    def value(self, key: str) -> tuple[str, Value]:
        """One value of the metadata, after its key: its kind and itself."""
        key = key[:80]  # as errors name it
        return self._value(self.number("I", f"the kind of {key!r}"), key)

    def _value(self, kind: int, key: str) -> tuple[str, Value]:
        if kind == STRING:
            return "string", self._string(self.number("Q", repr(key)), repr(key))
        if kind == ARRAY:
            return self._array(key, 1)
        name, letter = self._scalar(kind, key)
        if kind != BOOL:
            return name, self.number(letter, repr(key))
        flag = self.number("B", repr(key))
        if flag > 1:
            raise unsound(self.label, f"{key!r} is a bool of {flag}")
        return name, flag == 1

    def _array(self, key: str, depth: int) -> tuple[str, Value]:
        self._arrays += 1
        if depth > MAX_DEPTH or self._arrays > MOST_ARRAYS:
            raise unsound(self.label, f"{key!r} has arrays nested too deep, or there are too many")
        kind, count = self.number("I", f"the kind of {key!r}"), self.number("Q", f"the length of {key!r}")
        if kind == STRING:
            return "array[string]", self._strings(count, key)
        if kind == ARRAY:
            self._need(12 * count, repr(key))
            return "array[array]", [self._array(key, depth + 1)[1] for _ in range(count)]
        name, letter = self._scalar(kind, key)
        nbytes = count * struct.calcsize(letter)
        self._need(nbytes, repr(key))
        with memoryview(self._bytes) as whole, whole[self.position : self.position + nbytes] as data:
            if kind == BOOL and any(bytes(piece).translate(None, b"\0\1") for piece in _pieces(data)):
                raise unsound(self.label, f"{key!r} holds bools that are neither 0 nor 1")
            numbers = Numbers(data, letter)
        self.position += nbytes
        return f"array[{name}]", numbers

    def _scalar(self, kind: int, key: str) -> tuple[str, str]:
        if kind not in SCALARS:
            raise unsound(self.label, f"{key!r} has a value of the unknown kind {kind}")
        return SCALARS[kind]

    def _string(self, length: int, what: str) -> str:
        if length > MAX_STRING_BYTES:
            raise unsound(self.label, f"{what} claims a string of {length} bytes")
        self._need(length, what)
        self.position += length
        try:
            with memoryview(self._bytes) as whole, whole[self.position - length : self.position] as data:
                return str(data, "utf-8")
        except UnicodeDecodeError:
            raise unsound(self.label, f"{what} is not UTF-8") from None  # the cause would hold the header

    def _strings(self, count: int, key: str) -> Strings:
        self._within(8 * count, repr(key))
        text, ends, what = bytearray(), array("Q"), repr(key)
        for _ in range(count):
            self._need(8, what)
            length = int.from_bytes(self._bytes[self.position : self.position + 8], "little")
            self.position += 8
            self._string(length, what)
            text += self._bytes[self.position - length : self.position]
            ends.append(len(text))
        return Strings(text, ends)

    def _within(self, nbytes: int, what: str) -> None:
        end = self.position + nbytes
        if end > self.size:
            raise unsound(self.label, f"{what} needs {nbytes} bytes, of which {self.size - self.position} are there")
        if end > MAX_HEADER_BYTES:
            raise unsound(self.label, f"with {what} its header has over {MAX_HEADER_BYTES} bytes")

    def _need(self, nbytes: int, what: str) -> None:
        end = self.position + nbytes
        if end <= len(self._bytes):
            return
        self._within(nbytes, what)
        while len(self._bytes) < end:
            piece = bytearray(min(_PIECE, self.size - len(self._bytes)))
            if pread_into(self._fd, memoryview(piece), len(self._bytes)) < len(piece):
                raise CheckpointError(
                    f"{self.label}: changed while it was being read. Start again when it is complete."
                )
            self._bytes += piece


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]


def unsound(label: str, why: str) -> CheckpointError:
    """The error for a file that breaks the format's rules."""
    return CheckpointError(f"{label}: not a sound GGUF file: {why}. Download or copy it again.")
