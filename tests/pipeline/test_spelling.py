"""In which dtype the numbers of a conversion are compared."""

from __future__ import annotations

import torch

from bitgrain.checkpoints.gguf.types import spec_of
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.linear_layers import linear_layer
from bitgrain.checkpoints.mlx import MLX
from bitgrain.checkpoints.onnx.forms import FORMS
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, per_group
from bitgrain.numerics.formats import FP16, FP32
from bitgrain.pipeline.spelling import spell
from conversion_steps import Held


def with_minima(spec: QuantSpec, step: float) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=generator).to(torch.uint8)
    scale = torch.full((8, 2), step, dtype=torch.float16 if spec.scale == FP16 else torch.float32)
    return QTensor(codes, scale, None, spec, minimum=scale * 3)


def test_onnx_compares_in_float32_whatever_the_layer_is():
    """s * v - m with m = 3 s is s * (v - 3) in bfloat16, but float32 has rounded m, and s * v."""
    spec = QuantSpec(IntFormat(4, False), per_group(32), zero_point="minimum", scale=FP32, minimum=FP32)
    held = Held.of(linear_layer("m.up", 8, 64, spec, torch.bfloat16), with_minima(spec, 0.1))
    for form in FORMS.values():
        assert isinstance(spell(held, held.layer, form), StoredLayer)  # type: ignore[arg-type]
        assert isinstance(spell(held, held.layer, form, torch.float32), str)  # type: ignore[arg-type]


def test_mlx_multiplies_in_no_less_than_the_layers_dtype():
    """It takes the dtype of the scales: float16 ones of a GGUF file, whose numbers are float32, are widened."""
    spec = spec_of("Q4_1")
    assert spec is not None
    for dtype, scale in ((torch.float32, FP32), (torch.float16, FP16), (torch.bfloat16, FP32)):
        held = Held.of(linear_layer("m.up", 8, 64, spec, dtype), with_minima(spec, 0.1))
        found = spell(held, held.layer, MLX())  # type: ignore[arg-type]
        assert isinstance(found, StoredLayer)
        assert (found.scheme.weight.scale, found.scheme.weight.minimum) == (scale, scale)
