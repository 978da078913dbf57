"""X^T X in float32, of which only the upper triangle is computed. The twin is `reference.gram`."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import DTYPES, native, rows_of, serves
from bitgrain.kernels.reference import gram as reference


def add_gram(hessian: Tensor, x: Tensor) -> Tensor:
    """`hessian` [k, k] float32 becomes hessian + x^T x on and above the diagonal; what is below means nothing until
    `mirror`.

    x  [tokens, k]: float32, bfloat16 or float16. Products of bfloat16 are exact and summed in float32.
    Sums run over 512 tokens at most before they are added. Without the native module, and on other devices, torch
    multiplies in float32. Raises KernelError for another shape of `hessian`.
    """
    if tuple(hessian.shape) != (x.shape[-1], x.shape[-1]) or hessian.dtype != torch.float32:
        raise KernelError(f"the moments of {x.shape[-1]} features do not fit {hessian.dtype} {tuple(hessian.shape)}")
    if not (serves(hessian, x) and hessian.is_contiguous() and x.dtype in DTYPES):
        return reference.add_gram(hessian, x)
    rows = rows_of(x, hessian.shape[0])
    native().add_gram(
        rows.data_ptr(), DTYPES[x.dtype], rows.shape[0], hessian.shape[0], rows.stride(0), hessian.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return hessian


def gram(x: Tensor) -> Tensor:
    """x^T x of x [tokens, k], float32 [k, k]; only on and above the diagonal, see `add_gram`."""
    return add_gram(torch.zeros(x.shape[-1], x.shape[-1], device=x.device), x)


def mirror(hessian: Tensor) -> Tensor:
    """`hessian` [k, k] float32 with its upper triangle on both sides, in place."""
    if not (serves(hessian) and hessian.is_contiguous() and hessian.dtype == torch.float32):
        return reference.mirror(hessian)
    native().mirror(hessian.data_ptr(), hessian.shape[0], torch.get_num_threads())
    return hessian
