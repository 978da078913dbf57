"""Stacked experts with packed matrices: products as dense ones make them, and nothing else."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitgrain.errors import SchemeError
from bitgrain.kernels.native import is_available
from bitgrain.numerics import quantize
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.recipes import PRESETS
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.linear_rows import INT8_INPUTS, find_linear
from bitgrain.runtime.quant_experts import QuantExperts
from bitgrain.runtime.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(not is_available(), reason="the native module was not built")

TOKEN = InputQuantizer(INT8_INPUTS)
X = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))


def stack(rows: tuple[int, ...] = (40, 24), transposed: bool = False) -> tuple[Any, torch.Tensor]:
    """Three experts of these rows, and the dense weights [3, out, in]."""
    row = find_linear(PRESETS["W4A8"].weight, INT8_INPUTS, "cpu")
    assert not isinstance(row, str)
    made = torch.Generator().manual_seed(0)
    qs = [[quantize(torch.randn(n, 128, generator=made), PRESETS["W4A8"].weight) for n in rows] for _ in range(3)]
    experts = [[QuantLinear(row.kernel(PackedMatrix.of(q), TOKEN)) for q in parts] for parts in qs]
    return QuantExperts(experts, transposed), torch.stack([torch.cat([q.dequantize() for q in one]) for one in qs])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_one_expert_at_a_time():
    experts, dense = stack()
    assert experts.shape == dense.shape
    assert (experts.dtype, experts.device.type, experts.size(0), len(experts)) == (torch.float32, "cpu", 3, 3)
    bias = torch.linspace(-1, 1, 64)
    for i in (0, torch.tensor(2), -1):
        assert experts[i].shape == dense[i].shape
        close(F.linear(X, experts[i]), TOKEN(X) @ dense[i].T)
        close(F.linear(X, experts[i], bias), TOKEN(X) @ dense[i].T + bias)
        close(F.linear(X, experts[i], bias=bias), TOKEN(X) @ dense[i].T + bias)
        close(X @ experts[i].T, TOKEN(X) @ dense[i].T)
        close(torch.matmul(X, experts[i].t()), TOKEN(X) @ dense[i].T)
    with pytest.raises(IndexError):
        _ = experts[3]


def test_stored_the_other_way():
    experts, dense = stack(transposed=True)
    dense = dense.transpose(1, 2)
    assert experts.shape == dense.shape
    close(X @ experts[1], TOKEN(X) @ dense[1])
    close(F.linear(X, experts[1].mT), TOKEN(X) @ dense[1])
    x = torch.stack([X, 2 * X, X + 1])
    close(torch.bmm(x, experts), torch.bmm(TOKEN(x), dense))
    close(x @ experts, torch.bmm(TOKEN(x), dense))


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w[torch.tensor([0, 1])],
        lambda w: w.sum(),
        lambda w: torch.einsum("ti,eoi->teo", X, w),
        lambda w: torch.bmm(torch.stack([X] * 3), w).T,
        lambda w: X @ w[0],
        lambda w: X[:1, :1] + w[0],
        lambda w: w[0].float(),
        lambda w: torch.cat([X, w[0]]),
    ],
)
def test_anything_else_is_refused(use: Any):
    experts, _ = stack()
    with pytest.raises(SchemeError, match="execution='dequantize'"):
        use(experts)


def test_states_and_copies():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj: Any = stack()[0]

    model, other = Experts(), Experts()
    assert "up_proj.2.1.packed_codes" in model.state_dict()
    expected = F.linear(X, model.up_proj[1])
    assert F.linear(X, copy.deepcopy(model).up_proj[1]).equal(expected)
    assert F.linear(X.bfloat16(), model.bfloat16().up_proj[1]).dtype == torch.bfloat16
    other.load_state_dict({key: value.flip(0) for key, value in model.state_dict().items()})
    assert not F.linear(X, other.up_proj[1]).equal(expected)
    other.load_state_dict(model.state_dict())
    assert F.linear(X, other.up_proj[1]).equal(expected)
