"""What a decoder does with rows between its products: norms, gated activations, rotary positions.

Computed in float32 and rounded once to the dtype of the rows. The twins are in `reference.rows`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import DTYPES, address_of, native, rows_of

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]
ACTS: dict[Act, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}
Rotary = Literal["none", "half", "neighbours"]
ROTARY: dict[Rotary, int] = {"none": 0, "half": 1, "neighbours": 2}
MAX_HEAD = 256
"""Features of the largest head."""


class RowNorm:
    """RMSNorm (arXiv 1910.07467), y = x / sqrt(mean(x^2) + eps) * weight, or, centered, LayerNorm (arXiv 1607.06450).

    weight, bias  [width] or None; a gain that enters as 1 + weight is given as that sum
    """

    def __init__(
        self, width: int, weight: Tensor | None, bias: Tensor | None = None, *, eps: float, centered: bool = False
    ) -> None:
        """Raises KernelError for a weight or bias of another width."""
        for given in (weight, bias):
            if given is not None and given.shape != (width,):
                raise KernelError(f"a norm of {width} features has a weight of shape {tuple(given.shape)}")
        self.width, self.eps, self.centered = width, eps, centered
        self.weight, self.bias = _floats(weight), _floats(bias)
        self.handle: Any = native().Norm(width, address_of(self.weight), address_of(self.bias), eps, centered)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., width] float32, bfloat16 or float16 -> the same, normed. Raises KernelError for other inputs."""
        rows = rows_of(x, self.width)
        y = torch.empty(x.shape, dtype=x.dtype)
        native().norm_rows(
            self.handle, rows.data_ptr(), DTYPES[x.dtype], len(rows), rows.stride(0), y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y


class ModuleNorm:
    """RMSNorm with the very bits of transformers' modules, which torch computes in eight steps: in float32 up to
    x / sqrt(mean(x^2) + eps), rounded to the dtype of x, and again after `weight`.

    Raises KernelError where torch's sums are in no order that is known here.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        """weight: [width], read anew by each call."""
        self.weight, self.eps, self.lanes = weight, eps, _lanes_of_sums(weight.shape[0])
        if self.lanes == 0:
            raise KernelError(f"torch sums {weight.shape[0]} numbers in an unknown order")

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., width], contiguous, of the dtype of the weight -> the same, normed. Raises KernelError for others."""
        weight = self.weight
        if x.shape[-1:] != weight.shape or x.dtype != weight.dtype or x.dtype not in DTYPES or not x.is_contiguous():
            raise KernelError(f"a norm of {tuple(weight.shape)} {weight.dtype} cannot read {tuple(x.shape)} {x.dtype}")
        return _module_norm(x, weight, self.eps, self.lanes)


def _module_norm(x: Tensor, weight: Tensor, eps: float, lanes: int) -> Tensor:
    y, width = torch.empty_like(x), x.shape[-1]
    native().module_norm(
        x.data_ptr(), DTYPES[x.dtype], x.numel() // width, width, weight.data_ptr(), eps, lanes, y.data_ptr()
    )
    return y


@cache
def _lanes_of_sums(width: int) -> int:
    """Numbers in a vector of torch's sums over rows, found by summing; 0 where none gives its bits."""
    if not 0 < width < 32768:  # more are summed in several threads
        return 0
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + 1e-5) for row in x.split(1)])
    ones = torch.ones(width)
    return next((lanes for lanes in (8, 16, 4) if _module_norm(x, ones, 1e-5, lanes).equal(wanted)), 0)


def gated(gate: Tensor, up: Tensor | None, act: Act) -> Tensor:
    """act(gate) * up, or act(gate); gate and up [..., width]. Raises KernelError for shapes or dtypes that differ."""
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise KernelError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")
    width = gate.shape[-1]
    rows, other = rows_of(gate, width), None if up is None else rows_of(up, width)
    if other is not None and rows.stride(0) != other.stride(0):
        rows, other = rows.contiguous(), other.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype)
    native().gated_rows(
        rows.data_ptr(), address_of(other), DTYPES[gate.dtype], len(rows), rows.stride(0), width, ACTS[act],
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary, norm: RowNorm | None = None) -> Tensor:
    """Heads x [rows, heads, size] in place: normed where there is a norm, then turned (RoPE, arXiv 2104.09864).

    cos, sin  [positions, turned], turned <= size; row r takes position r % positions
    rotary    which two features turn together: "half", i and i + turned / 2, or "neighbours", 2 i and 2 i + 1
    Raises KernelError for shapes that do not fit.
    """
    rows, heads, size = x.shape
    fits = cos.shape == sin.shape and cos.dtype == sin.dtype and cos.ndim == 2 and cos.shape[1] <= size <= MAX_HEAD
    if not fits or cos.shape[1] % 2 or x.dtype not in DTYPES or cos.dtype not in DTYPES or not x.is_contiguous():
        raise KernelError(f"heads {tuple(x.shape)} {x.dtype} and positions {tuple(cos.shape)} {cos.dtype} do not fit")
    cos, sin = cos.contiguous(), sin.contiguous()
    native().rotate_rows(
        x.data_ptr(), DTYPES[x.dtype], rows, heads * size, heads, size, None if norm is None else norm.handle,
        ROTARY[rotary], cos.data_ptr(), sin.data_ptr(), DTYPES[cos.dtype], max(len(cos), 1), cos.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip
    return x


def _floats(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.detach().to("cpu", torch.float32).contiguous().clone()
