"""compressed-tensors as the foreign oracle: the same codes and the same numbers from the same scales."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize

from bitgrain.numerics import QuantSpec, get_format, per_block, per_channel, per_group, per_tensor, quantize
from bitgrain.numerics.spec import int_weight

E4M3 = get_format("fp8_e4m3")
CASES = {
    "int4 group": (int_weight(4, 16), {"num_bits": 4, "strategy": "group", "group_size": 16}),
    "int4 asymmetric": (
        int_weight(4, 16, asymmetric=True),
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int3 group": (int_weight(3, 16), {"num_bits": 3, "strategy": "group", "group_size": 16}),
    "int8 channel": (int_weight(8), {"num_bits": 8, "strategy": "channel"}),
    "int8 tensor": (QuantSpec(get_format("int8"), per_tensor()), {"num_bits": 8, "strategy": "tensor"}),
    "fp8 channel": (QuantSpec(E4M3, per_channel()), {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 block": (
        QuantSpec(E4M3, per_block(16, 16)),
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    ),
    "fp4 group": (
        QuantSpec(get_format("fp4_e2m1"), per_group(16)),
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 16},
    ),
}


@pytest.mark.parametrize(("spec", "settings"), CASES.values(), ids=CASES.keys())
def test_same_codes_and_numbers(spec, settings):
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(**settings)
    q = quantize(x, spec)
    assert isinstance(q.scale, torch.Tensor)
    zero = torch.zeros_like(q.scale) if q.zero is None else q.zero.to(torch.float32)
    codes = ct_quantize(x, q.scale, zero, args)
    assert torch.equal(codes.float(), spec.format.decode(q.codes))
    assert torch.equal(ct_dequantize(codes, q.scale, zero, args), q.dequantize())
