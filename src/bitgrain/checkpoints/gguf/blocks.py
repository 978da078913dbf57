"""What all block types share: rows of blocks are taken apart, a cache's worth at a time, into codes, scales and minima.

A family of types (`legacy`, `k_quants`, ...) only says how the bytes of one block are laid out; it sees many blocks at
once, as uint8 [n, ..].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from bitgrain.checkpoints.gguf.storage import Storage
from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics.formats import CodebookFormat, Format
from bitgrain.numerics.granularity import matrix_shape
from bitgrain.numerics.packed import PackedMatrix, float_dtype
from bitgrain.numerics.packing import pack
from bitgrain.numerics.qtensor import QTensor, unsigned
from bitgrain.numerics.ranges.minmax import MinMax
from bitgrain.numerics.spec import QuantSpec

Parts: TypeAlias = "list[Tensor]"
"""n blocks, taken apart, each uint8 [n, ..]: codes, unsigned (code + offset of the format); scales, as bytes of their
storage, or as unsigned codes and then the bytes of their own scales; where there are minima, likewise."""

_PIECE = 1 << 19  # codes handled at once, so that the steps between stay in a core's cache


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF's tensors.

    spec   what its numbers are, as a QTensor's; None for plain floats, which have `dtype`
    join   blocks' bytes, uint8 [n, block bytes], of their parts, one argument each
    split  the inverse
    largest_scale  the largest byte of a scale that ggml reads as its number, for scales of one byte; None: all are
    pairs  `join` takes codes of four bits two in a byte, as they lie in a PackedMatrix: uint8 [n, block size / 2]
    """

    storage: Storage
    spec: QuantSpec | None = None
    dtype: torch.dtype | None = None
    join: Callable[..., Tensor] | None = None
    split: Callable[[Tensor], Parts] | None = None
    largest_scale: int | None = None
    pairs: bool = False

    @property
    def name(self) -> str:
        """As GGUF's own tools write it: "Q4_K"."""
        return self.storage.name

    @property
    def type_id(self) -> int:
        """ggml's number."""
        return self.storage.number

    @property
    def block_size(self) -> int:
        """Elements of one block; rows are whole blocks."""
        return self.storage.size

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.storage.nbytes

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` elements. Raises SchemeError where it is not whole blocks."""
        if cols % self.block_size:
            raise SchemeError(f"rows of {cols} are not whole blocks of {self.block_size}, as {self.name} needs")
        return cols // self.block_size * self.block_bytes

    def check_scales(self, scale: Tensor | QTensor) -> None:
        """SchemeError for stored scales that ggml would read as other numbers."""
        if self.largest_scale is None or isinstance(scale, QTensor) or not scale.numel():
            return
        if int(scale.contiguous().view(torch.uint8).amax().item()) > self.largest_scale:
            raise SchemeError(f"{self.name} has no scales that are negative or not a number")

    def pack(self, q: QTensor | PackedMatrix) -> Tensor:
        """uint8 [rows, bytes of a row] of a tensor whose spec is this type's (ranges apart).

        Raises SchemeError for another spec, shape or scales that are not held, NumericsError for codes that the format
        does not have.
        """
        spec = self.spec
        if spec is None or self.join is None or stored_spec(q.spec) != spec:
            holds = spec.describe() if spec else str(self.dtype)
            raise SchemeError(f"{self.name} holds {holds}, not {q.spec.describe()}")
        self.check_scales(q.scale)
        rows, cols = matrix_shape(q.shape)
        width = self.row_bytes(cols)
        count = rows * (cols // self.block_size)
        packed = torch.empty(count, self.block_bytes, dtype=torch.uint8)
        if count == 0:
            return packed.view(rows, width)
        sources = [self._codes(q).reshape(count, -1), *_sources(q.scale, count)]
        sources += [] if q.minimum is None else _sources(q.minimum, count)
        step = max(1, _PIECE // self.block_size)
        for i in range(0, count, step):
            codes, *others = [source[i : i + step] for source in sources]
            packed[i : i + step] = self.join(codes if self.pairs else _checked(codes, spec.format), *others)
        return packed.view(rows, width)

    def _codes(self, q: QTensor | PackedMatrix) -> Tensor:
        """As `join` wants them, apart from an offset."""
        if self.pairs:
            plain = isinstance(q, QTensor)
            return pack(_checked(q.codes, q.spec.format), 4, torch.uint8) if plain else q.words_as(torch.uint8)
        return q.codes if isinstance(q, QTensor) else q.unpack().codes

    def unpack(self, data: Tensor, shape: tuple[int, ...]) -> QTensor:
        """The inverse of `pack`: a QTensor of `shape` (torch's order) out of uint8 [rows, bytes of a row].

        Raises SchemeError for another shape of `data`, CheckpointError for blocks that no writer makes.
        """
        spec = self.spec
        if spec is None or self.split is None:
            raise SchemeError(f"{self.name} holds plain numbers, not codes")
        count = self._check_rows(data, shape)
        blocks = data.reshape(count, self.block_bytes)
        codes = torch.empty(count, self.block_size, dtype=torch.uint8)
        kept = [torch.empty(count, width, dtype=torch.uint8) for width in _widths(spec, self.block_size)]
        step = max(1, _PIECE // self.block_size)
        for i in range(0, count, step):
            first, *others = self.split(blocks[i : i + step])
            torch.sub(first, spec.format.code_offset, out=codes[i : i + step])
            for whole, part in zip(kept, others, strict=True):
                whole[i : i + step] = part
        tiles = spec.granularity.tiles(shape)
        scale = _stored(kept, spec.scale, tiles)
        minimum = None if spec.minimum is None else _stored(kept, spec.minimum, tiles)
        return QTensor(codes.view(spec.format.code_dtype).view(shape), scale, None, spec, minimum=minimum)

    def values(self, data: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The numbers: float32 for quantized types, else in the type's own dtype, without a copy where possible."""
        if self.dtype is None:
            return self.unpack(data, shape).dequantize()
        self._check_rows(data, shape)
        return words(data, self.dtype).view(shape)

    def store(self, values: Tensor) -> Tensor:
        """uint8 [rows, bytes of a row] of plain numbers, rounded to the type's dtype. Raises SchemeError for others."""
        if self.dtype is None:
            raise SchemeError(f"{self.name} holds codes, not plain numbers")
        rows, cols = matrix_shape(tuple(values.shape))
        return values.to(self.dtype).contiguous().view(rows, cols).view(torch.uint8)

    def _check_rows(self, data: Tensor, shape: tuple[int, ...]) -> int:
        """How many blocks there are."""
        rows, cols = matrix_shape(shape)
        want = (rows, self.row_bytes(cols))
        if data.dtype is not torch.uint8 or tuple(data.shape) != want:
            raise SchemeError(
                f"{self.name} of {list(shape)} is uint8 {list(want)}, not {data.dtype} {list(data.shape)}"
            )
        return rows * (cols // self.block_size)


def stored_spec(spec: QuantSpec) -> QuantSpec:
    """`spec` without what leaves no trace in a file: how ranges were chosen, and that a code is not used."""
    scale = stored_spec(spec.scale) if isinstance(spec.scale, QuantSpec) else spec.scale
    minimum = stored_spec(spec.minimum) if isinstance(spec.minimum, QuantSpec) else spec.minimum
    return replace(spec, range=MinMax(), restricted=False, scale=scale, minimum=minimum)


def merge(fields: Tensor, bits: int) -> Tensor:
    """uint8 [n, a, b]: byte j holds the fields [n, a, k, b] of `bits` bits, i from bit i * bits on. b is 8, 16, ..."""
    parts = words(fields)
    merged = parts[:, :, 0].clone()
    for i in range(1, parts.shape[2]):
        merged |= parts[:, :, i] << (bits * i)
    return merged.view(torch.uint8)


def spread(data: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `merge`: uint8 [n, a, count, b] out of [n, a, b]."""
    n, a, b = data.shape
    merged = words(data)
    fields = torch.empty(n, a, count, b, dtype=torch.uint8)
    places = fields.view(torch.int64)
    mask = repeated(2**bits - 1)
    for i in range(count):
        torch.bitwise_and(merged >> (bits * i), mask, out=places[:, :, i])
    return fields


def words(data: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """uint8 [.., k] as integers of more bytes, [.., k / bytes]; copied where it does not lie as they must."""
    data = data.contiguous().view(-1).view(data.shape)  # strides of axes of size 1 may be anything
    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    return data.view(dtype)


def repeated(byte: int) -> int:
    """A signed 64-bit integer all of whose bytes are `byte`."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


def _sources(stored: Tensor | QTensor, count: int) -> list[Tensor]:
    """Of scales or minima: plain bytes, or unsigned codes and outer bytes; [count, ..]."""
    if isinstance(stored, Tensor):
        return [_bytes(stored, count)]
    assert isinstance(stored.scale, Tensor)
    return [_checked(stored.codes.reshape(count, -1), stored.spec.format), _bytes(stored.scale, count)]


def _bytes(stored: Tensor, count: int) -> Tensor:
    return stored.contiguous().view(-1).view(torch.uint8).reshape(count, -1)


def _checked(codes: Tensor, format: Format) -> Tensor:
    """Unsigned codes, all of which the format has."""
    found = unsigned(codes, format)
    known = len(format.values) if isinstance(format, CodebookFormat) else 2**format.bits
    if known < 256 and found.numel() and int(found.amax().item()) >= known:
        raise NumericsError(f"there are codes beyond the {known} of {format}")
    return found


def _widths(spec: QuantSpec, size: int) -> list[int]:
    """Bytes that each of a block's parts takes, its codes apart."""
    tiles = spec.granularity.tiles((1, size))
    found: list[int] = []
    for storage in (spec.scale, spec.minimum):
        if isinstance(storage, QuantSpec):
            assert isinstance(storage.scale, Format)
            found += [tiles[1], storage.granularity.tiles(tiles)[1] * float_dtype(storage.scale).itemsize]
        elif storage is not None:
            found.append(tiles[1] * float_dtype(storage).itemsize)
    return found


def _stored(kept: list[Tensor], storage: Format | QuantSpec, tiles: tuple[int, int]) -> Tensor | QTensor:
    """Scales or minima [tiles down, tiles across], taken from the front of `kept`."""
    first = kept.pop(0)
    if not isinstance(storage, QuantSpec):
        return first.view(-1).view(float_dtype(storage)).view(tiles)
    assert isinstance(storage.scale, Format)
    codes = (first - storage.format.code_offset).view(storage.format.code_dtype).view(tiles)
    outer = kept.pop(0).view(-1).view(float_dtype(storage.scale)).view(storage.granularity.tiles(tiles))
    return QTensor(codes, outer, None, storage)
