"""x W^T + b for a few rows and a dense weight as it lies in memory: the head of a model while it decodes.

torch's own product of one bfloat16 row reads a weight at two thirds of the speed of memory, and leaves the threads of
OpenMP spinning on the cores that the next kernels need. The twin is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import DTYPES, address_of, native, rows_of

MOST_ROWS = 8
"""Beyond so many rows torch's product of matrices is faster."""


def dense_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k], weight [n, k] and bias [n] float32, bfloat16 or float16 on the CPU -> [..., n] in the dtype of x.

    Products and sums are in float32: |y - twin| <= (k / 16 + 8) 2^-24 |x| |w|, and one rounding to its dtype. Raises
    KernelError for other inputs.
    """
    n, k = weight.shape
    rows = rows_of(x, k)
    if weight.dtype not in DTYPES or weight.device.type != "cpu" or weight.stride(1) != 1:
        raise KernelError(f"a dense weight {tuple(weight.shape)} {weight.dtype} on {weight.device} has no kernel")
    bias = None if bias is None else bias.detach().float().contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    native().dense_rows(
        weight.data_ptr(), DTYPES[weight.dtype], n, k, weight.stride(0), rows.data_ptr(), DTYPES[x.dtype], len(rows),
        rows.stride(0), address_of(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
