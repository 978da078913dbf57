"""GPTQ and AWQ layers dequantized bit by bit, as their makers document the layouts: slow, and with no code of ours."""

import numpy as np
import torch

AWQ_FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight each field of an AWQ word is, low bits first."""


def _fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` codes out of a line of words: as AutoGPTQ unpacks them."""
    found: list[int] = []
    line = [int(word) & 0xFFFFFFFF for word in words]
    if bits == 3:
        for a, b, c in zip(line[0::3], line[1::3], line[2::3], strict=True):
            found += [(a >> (3 * i)) & 7 for i in range(10)]
            found.append(((a >> 30) & 3) | ((b & 1) << 2))
            found += [(b >> (3 * i + 1)) & 7 for i in range(10)]
            found.append(((b >> 31) & 1) | ((c & 3) << 1))
            found += [(c >> (3 * i + 2)) & 7 for i in range(10)]
    else:
        for word in line:
            found += [(word >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return np.array(found[:count])


def _v1_zeros(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """What GPTQModel makes of v1: fields of 3 bits grow by 1 each, all fields of other words together."""
    if bits == 3:
        return (_fields(words, bits, count) + 1) % 8
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return _fields(np.array([(int(word) + ones) & 0xFFFFFFFF for word in words]), bits, count)


def gptq_weight(stored: dict[str, torch.Tensor], bits: int, version: int) -> np.ndarray:
    """float64 [out, in] of the tensors qweight, qzeros, scales and g_idx."""
    qweight, qzeros = stored["qweight"].numpy(), stored["qzeros"].numpy()
    scales, g_idx = stored["scales"].double().numpy(), stored["g_idx"].tolist()
    count, out = len(g_idx), qweight.shape[1]
    zeros = [(_v1_zeros if version == 1 else _fields)(row, bits, out) for row in qzeros]
    weight = np.empty((out, count))
    for row in range(out):
        codes = _fields(qweight[:, row], bits, count)
        for col, group in enumerate(g_idx):
            weight[row, col] = scales[group, row] * (int(codes[col]) - int(zeros[group][row]))
    return weight


def awq_weight(stored: dict[str, torch.Tensor], group: int) -> np.ndarray:
    """float64 [out, in] of the tensors qweight, qzeros and scales."""

    def outputs(words: np.ndarray) -> list[int]:
        found: list[int] = []
        for word in words:
            eight = [0] * 8
            for field, place in enumerate(AWQ_FIELDS):
                eight[place] = (int(word) >> (4 * field)) & 15
            found += eight
        return found

    scales = stored["scales"].double().numpy()
    zeros = [outputs(row) for row in stored["qzeros"].numpy()]
    columns = []
    for i, row in enumerate(stored["qweight"].numpy()):
        tile = i // group
        columns.append([s * (c - z) for s, c, z in zip(scales[tile], outputs(row), zeros[tile], strict=True)])
    return np.array(columns).T
