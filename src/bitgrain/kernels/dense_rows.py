"""x W^T + b for a dense weight as it lies in memory: the head of a model while it decodes, and those layers of a
decoder block that were not quantized.

torch's own product of one bfloat16 row reads a weight at two thirds of the speed of memory, and leaves the threads of
OpenMP spinning on the cores that the next kernels need. The twin is `torch.nn.functional.linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import DTYPES, address_of, native, rows_of

MOST_ROWS = 8
"""Beyond so many rows torch's product of matrices is faster."""
EXACT_ROWS = 16


class DenseLinear:
    """A weight [n, k] and bias [n], float32, bfloat16 or float16 on the CPU, where they are: what is written to the
    weight later counts, a bias is copied.

    Called with x [..., k] float32, bfloat16 or float16 it gives [..., n] in the dtype of x. Products and sums are in
    float32: |y - twin| <= (k / 16 + 8) 2^-24 |x| |w|, and one rounding to its dtype. More than EXACT_ROWS rows are
    rounded to bfloat16 first where the weight is bfloat16 and `code_linear.rounds_inputs(1)`. Raises KernelError for
    other weights and inputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.n, self.k = weight.shape
        if weight.dtype not in DTYPES or weight.device.type != "cpu" or weight.stride(1) != 1:
            raise KernelError(f"a dense weight {tuple(weight.shape)} {weight.dtype} on {weight.device} has no kernel")
        self.weight, self.bias = (
            weight,
            None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous(),
        )
        self.handle: Any = native().DenseWeight(
            weight.data_ptr(), DTYPES[weight.dtype], self.n, self.k, weight.stride(0), address_of(self.bias)
        )

    def __call__(self, x: Tensor) -> Tensor:
        rows = rows_of(x, self.k)
        y = torch.empty((*x.shape[:-1], self.n), dtype=x.dtype)
        self.handle.run(
            rows.data_ptr(), DTYPES[x.dtype], len(rows), rows.stride(0), y.data_ptr(), DTYPES[x.dtype], self.n,
            torch.get_num_threads(),
        )  # fmt: skip
        return y


def dense_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A `DenseLinear` of weight and bias, called once."""
    return DenseLinear(weight, bias)(x)
