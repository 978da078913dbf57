"""Dense bit packing of codes of 1 to 8 bits.

The codes of one row are one little-endian stream of bits: element i takes the bits [i * bits, (i + 1) * bits), the
least significant bit first, and may straddle two words. A row of n codes takes ceil(n * bits / word bits) words; the
bits that are left over are 0. This is the layout of compressed-tensors' `pack-quantized` weights, and for 4 bits in
uint8 words that of its FP4 formats (the first element in the low nibble).

Eight codes at a time are handled as one 64-bit integer whose fields are moved together in three steps, so that all
widths share one path and no element is touched by Python; 4 bits have a shorter one over pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError

_EIGHT = 8
_PIECE = 1 << 20  # codes packed at once, so that the steps between stay in a core's cache
_SQUARES = 64, 256  # squares of 8 x 8 codes, down and across, that are transposed at once
_WORDS = {torch.uint8: 1, torch.int32: 4}
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # eight codes of so many bits make one such integer


def packed_length(length: int, bits: int, word: torch.dtype = torch.int32) -> int:
    """Words that one row of `length` codes takes."""
    return math.ceil(length * bits / (8 * _WORDS[word]))


def pack(codes: Tensor, bits: int, word: torch.dtype = torch.int32, axis: int = -1) -> Tensor:
    """Words of dtype `word` (int32 or uint8) that hold `codes` along `axis`.

    codes  unsigned codes in [0, 2**bits) of any integer dtype: for a QTensor, `codes + format.code_offset`
    Raises SchemeError (bits, word), NumericsError (a code out of range).
    """
    _check(bits, word)
    if codes.dtype is not torch.uint8:
        if codes.numel() and not 0 <= int(codes.amin().item()) <= int(codes.amax().item()) < 2**bits:
            raise NumericsError(f"codes from {int(codes.amin())} to {int(codes.amax())} do not fit in {bits} bits")
        codes = codes.to(torch.uint8)
    elif bits < 8 and codes.numel() and int(codes.amax().item()) >= 2**bits:
        raise NumericsError(f"codes up to {int(codes.amax())} do not fit in {bits} bits")
    if axis not in (-1, codes.ndim - 1):
        return pack(codes.movedim(axis, -1), bits, word).movedim(-1, axis).contiguous()
    *lead, length = codes.shape
    if not codes.numel():
        return torch.zeros(*lead, packed_length(length, bits, word), dtype=word, device=codes.device)
    matrix = codes.reshape(-1, length)
    step = max(1, _PIECE // length)
    if step >= len(matrix):
        return _pack_rows(matrix, bits, word).view(*lead, -1)
    packed = torch.empty(len(matrix), packed_length(length, bits, word), dtype=word, device=codes.device)
    for i in range(0, len(matrix), step):
        packed[i : i + step] = _pack_rows(matrix[i : i + step], bits, word)
    return packed.view(*lead, -1)


def _pack_rows(codes: Tensor, bits: int, word: torch.dtype) -> Tensor:
    """`pack` of a few rows uint8 [m, length], checked and not empty."""
    rows, length = codes.shape
    stream = _aligned(codes)
    if bits == 4 and not length % 2:
        pairs = stream.view(torch.int16)
        stream = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    elif bits < 8:
        if length % _EIGHT:
            stream = F.pad(stream, (0, -length % _EIGHT))
        stream = _squeeze(stream.view(torch.int64), bits).view(rows, -1)
    size = packed_length(length, bits, word) * _WORDS[word]
    if stream.shape[-1] != size:  # whole words; what is cut off are bits of the padding
        stream = F.pad(stream, (0, size - stream.shape[-1])).contiguous()
    if stream.data_ptr() == codes.data_ptr():
        stream = stream.clone()
    return stream.reshape(-1).view(word).view(rows, -1)


def rewrap(words: Tensor, bits: int, length: int, word: torch.dtype) -> Tensor:
    """The words [.., n] that hold `length` codes of `bits` bits along the last axis, as words of another dtype; a view
    where that is possible."""
    if words.dtype is word:
        return words
    stream, nbytes = words.contiguous().view(torch.uint8), packed_length(length, bits, word) * _WORDS[word]
    if stream.shape[-1] < nbytes:
        stream = F.pad(stream, (0, nbytes - stream.shape[-1]))
    return _aligned(stream[..., :nbytes]).view(word)


def unpack(words: Tensor, bits: int, length: int, axis: int = -1) -> Tensor:
    """The `length` unsigned codes (uint8) that `pack` put into `words` along `axis`.

    Raises SchemeError if the words are too few or too many for `length` codes.
    """
    _check(bits, words.dtype)
    if axis not in (-1, words.ndim - 1):
        return unpack(words.movedim(axis, -1), bits, length).movedim(-1, axis).contiguous()
    if words.shape[-1] != packed_length(length, bits, words.dtype):
        raise SchemeError(
            f"{length} codes of {bits} bits take {packed_length(length, bits, words.dtype)} words of {words.dtype}, "
            f"not {words.shape[-1]}"
        )
    if not words.numel():
        return torch.zeros(*words.shape[:-1], length, dtype=torch.uint8, device=words.device)
    matrix = words.reshape(-1, words.shape[-1])
    step = max(1, _PIECE // length)
    if bits == 4 and length == 2 * matrix.shape[1] * matrix.element_size():
        codes = _unpack_nibbles(matrix).view(len(matrix), length)
    elif step >= len(matrix):
        codes = _unpack_rows(matrix, bits, length).contiguous()
        codes = codes.clone() if codes.data_ptr() == words.data_ptr() else codes
    else:
        codes = torch.empty(len(matrix), length, dtype=torch.uint8, device=words.device)
        for i in range(0, len(matrix), step):
            codes[i : i + step] = _unpack_rows(matrix[i : i + step], bits, length)
    return codes.view(*words.shape[:-1], length)


def _unpack_nibbles(words: Tensor) -> Tensor:
    """`unpack` of codes of 4 bits that fill all words: uint8, flat."""
    stream = words.contiguous().view(torch.uint8).reshape(-1)
    pairs = torch.empty(len(stream), dtype=torch.int16, device=words.device)
    for i in range(0, len(stream), _PIECE // _EIGHT):
        wide = stream[i : i + _PIECE // _EIGHT].to(torch.int16)
        torch.bitwise_and((wide << 4).bitwise_or_(wide), 0x0F0F, out=pairs[i : i + _PIECE // _EIGHT])
    return pairs.view(torch.uint8)


def _unpack_rows(words: Tensor, bits: int, length: int) -> Tensor:
    """`unpack` of a few rows [m, n], checked and not empty; 8 bits may be a view."""
    stream = _aligned(words).view(torch.uint8)
    if bits == 4:
        pairs = stream.to(torch.int16)
        stream = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)
    elif bits < 8:
        groups = math.ceil(length / _EIGHT)
        if stream.shape[-1] != groups * bits:
            stream = F.pad(stream, (0, groups * bits - stream.shape[-1])).contiguous()
        stream = _spread(stream, bits).view(torch.uint8).view(len(words), groups * _EIGHT)
    return stream[:, :length]


def transpose_nibbles(words: Tensor) -> Tensor:
    """Codes of four bits [m, n], packed as uint8 [m, n / 2], as [n, m]: uint8 [n, m / 2]. m and n are multiples of 8.

    Eight rows of int32 words are squares of 8 x 8 nibbles; each is transposed in three steps, which swap halves,
    quarters and single nibbles between rows (Warren, Hacker's Delight, 7-3).
    """
    rows, cols = len(words), 2 * words.shape[1]
    source = _aligned(words).view(torch.int32).view(rows // _EIGHT, _EIGHT, cols // _EIGHT)
    found = torch.empty(cols // _EIGHT, _EIGHT, rows // _EIGHT, dtype=torch.int32, device=words.device)
    for top in range(0, rows // _EIGHT, _SQUARES[0]):
        for left in range(0, cols // _EIGHT, _SQUARES[1]):
            part = source[top : top + _SQUARES[0], :, left : left + _SQUARES[1]].clone(
                memory_format=torch.contiguous_format
            )
            eight = part.unflatten(1, (2, 2, 2))
            for axis, width, mask in ((1, 16, 0x0000FFFF), (2, 8, 0x00FF00FF), (3, 4, 0x0F0F0F0F)):
                upper, lower = eight.unbind(axis)
                swapped = (upper >> width).bitwise_xor_(lower).bitwise_and_(mask)
                lower ^= swapped
                upper ^= swapped << width
            found[left : left + part.shape[2], :, top : top + len(part)] = part.permute(2, 1, 0)
    return found.view(torch.uint8).view(cols, rows // 2)


def _check(bits: int, word: torch.dtype) -> None:
    if not 1 <= bits <= 8:
        raise SchemeError(f"codes of 1 to 8 bits can be packed, not {bits}")
    if word not in _WORDS:
        raise SchemeError(f"codes are packed into int32 or uint8 words, not {word}")


def _aligned(x: Tensor) -> Tensor:
    """`x` contiguous, at an address where 64-bit integers may begin."""
    x = x.contiguous().view(-1).view(x.shape)  # strides of axes of size 1 may be anything in a contiguous tensor
    return x.clone() if x.data_ptr() % _EIGHT or x.storage_offset() * x.element_size() % _EIGHT else x


def _mask(bits: int, stride: int) -> int:
    """`bits` ones at the start of every `stride` bits, as a signed 64-bit integer."""
    ones = sum((2**bits - 1) << shift for shift in range(0, 64, stride))
    return ones - 2**64 if ones >= 2**63 else ones


def _squeeze(eights: Tensor, bits: int) -> Tensor:
    """int64 [..., m] of eight 8-bit fields -> uint8 [m * bits] with the low `bits` of each field side by side."""
    v = eights
    for width, stride in ((bits, 8), (2 * bits, 16), (4 * bits, 32)):
        # fields of `width` at every `stride` bits; the odd ones move down next to the even ones
        if 2 * width <= stride:
            v = (v | (v >> (stride - width))).bitwise_and_(_mask(2 * width, 2 * stride))
        else:  # a field would meet its own copy: the two kinds are moved apart first
            even = _mask(width, 2 * stride)
            v = ((v >> stride) & even).bitwise_left_shift_(width).bitwise_or_(v & even)
    if bits in _WHOLE:
        return v.to(_WHOLE[bits]).view(torch.uint8)
    return v.view(torch.uint8).view(-1, _EIGHT)[:, :bits].contiguous()


def _spread(stream: Tensor, bits: int) -> Tensor:
    """The inverse of `_squeeze`: uint8 [..., m * bits] -> int64 [..., m]."""
    if bits in _WHOLE:
        v = stream.view(_WHOLE[bits]).to(torch.int64).bitwise_and_(2 ** (8 * bits) - 1)
    else:
        padded = torch.zeros(
            *stream.shape[:-1], stream.shape[-1] // bits, _EIGHT, dtype=torch.uint8, device=stream.device
        )
        padded[..., :bits] = stream.unflatten(-1, (-1, bits))
        v = padded.view(torch.int64).squeeze(-1)
    for width, stride in ((4 * bits, 32), (2 * bits, 16), (bits, 8)):
        if 2 * width <= stride:
            v = (v | (v << (stride - width))).bitwise_and_(_mask(width, stride))
        else:
            even = _mask(width, 2 * stride)
            v = ((v >> width) & even).bitwise_left_shift_(stride).bitwise_or_(v & even)
    return v
