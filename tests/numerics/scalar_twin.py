"""A slow scalar twin of numerics, written from the definitions in plain Python: the oracle of the property tests.

Nothing here comes from the product code. Numbers are Python floats that stand for float32 values: `f32` rounds after
each operation (a float64 +, -, *, / of float32 operands, rounded to float32, is the correctly rounded float32 result).
"""

import math
import struct
from fractions import Fraction


def f32(x):
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def float_grid(exponent_bits, mantissa_bits, top):
    """Non-negative numbers of a binary format in code order: 0, subnormals, normals up to `top`."""
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = Fraction(mantissa, 2**mantissa_bits)
            if exponent == 0:
                number = fraction * Fraction(2) ** (1 - bias)
            else:
                number = (1 + fraction) * Fraction(2) ** (exponent - bias)
            if number <= top:
                numbers.append(number)
    return numbers


GRIDS = {
    "fp4_e2m1": float_grid(2, 1, 6),
    "fp8_e4m3": float_grid(4, 3, 448),
    "fp8_e5m2": float_grid(5, 2, 57344),
}
BOOKS = {"ternary": [-1.0, 0.0, 1.0], "binary": [-1.0, 1.0]}


def bounds(name, restricted=False):
    """Smallest and largest number of a format."""
    if name in GRIDS:
        top = float(GRIDS[name][-1])
        return -top, top
    if name in BOOKS:
        return BOOKS[name][0], BOOKS[name][-1]
    bits = int(name.removeprefix("u").removeprefix("int"))
    if name.startswith("u"):
        return 0.0, float(2**bits - 1)
    top = 2 ** (bits - 1) - 1
    return float(-top if restricted else -top - 1), float(top)


def nearest(name, v, restricted=False):
    """The format's number nearest to v; ties to the even code, for lists to the smaller number."""
    low, high = bounds(name, restricted)
    v = min(max(v, low), high)
    exact = Fraction(v)
    if name in GRIDS:
        grid = GRIDS[name]
        best = min(range(len(grid)), key=lambda code: (abs(grid[code] - abs(exact)), code % 2))
        return math.copysign(float(grid[best]), v)
    if name in BOOKS:
        return min(BOOKS[name], key=lambda entry: (abs(Fraction(entry) - exact), entry))
    return float(round(exact))  # Python rounds ties to even


def quantize(x, name, tile, zero_point="none", restricted=False):
    """(numbers v, scales, zeros, x_hat) of a matrix (list of rows) with min-max ranges and float32 scales.

    tile  (rows, columns) of a tile. v and x_hat are matrices; scales and zeros are matrices with one entry for each
          tile.
    """
    rows, cols = len(x), len(x[0])
    low_code, high_code = bounds(name, restricted)
    v = [[0.0] * cols for _ in range(rows)]
    x_hat = [[0.0] * cols for _ in range(rows)]
    scales, zeros = [], []
    for top in range(0, rows, tile[0]):
        scales.append([])
        zeros.append([])
        for left in range(0, cols, tile[1]):
            places = [
                (i, j) for i in range(top, min(rows, top + tile[0])) for j in range(left, min(cols, left + tile[1]))
            ]
            low = min(0.0, min(x[i][j] for i, j in places))
            high = max(0.0, max(x[i][j] for i, j in places))
            zero = None
            if zero_point == "none":
                scale = f32(high / high_code)
                if low_code < 0:
                    scale = max(scale, f32(low / low_code))
            else:
                scale = f32(f32(high - low) / f32(high_code - low_code))
                zero = f32(low_code - f32(low / scale)) if scale > 0 else low_code
                zero = f32(low_code + f32(zero - low_code))
                if zero_point == "integer":
                    zero = nearest(name, zero)
            step = scale if scale > 0 else (0.0 if name == "binary" else 1.0)
            for i, j in places:
                ratio = f32(x[i][j] / (step or 1.0))
                v[i][j] = nearest(name, ratio if zero is None else f32(ratio + zero), restricted)
                x_hat[i][j] = f32((v[i][j] if zero is None else f32(v[i][j] - zero)) * step)
            scales[-1].append(step)
            zeros[-1].append(zero)
    return v, scales, zeros, x_hat


def pack(codes, bits, word_bits):
    """Words of a little-endian stream, bit by bit, as unsigned integers."""
    stream = [(code >> k) & 1 for code in codes for k in range(bits)]
    stream += [0] * (-len(stream) % word_bits)
    return [
        sum(bit << k for k, bit in enumerate(stream[start : start + word_bits]))
        for start in range(0, len(stream), word_bits)
    ]


def mean_squared_error(x, x_hat):
    pairs = [(a, b) for row, row_hat in zip(x, x_hat, strict=True) for a, b in zip(row, row_hat, strict=True)]
    return float(sum((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs) / len(pairs))
