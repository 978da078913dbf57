import pytest
import torch

from bitgrain.errors import NumericsError
from bitgrain.numerics import QuantSpec, get_format, mxfp4, nvfp4, per_channel, per_tensor, quantize
from bitgrain.numerics.formats import BF16, E8M0, FP4_E2M1, FP8_E4M3, FP16, FP32
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import store_scale
from bitgrain.numerics.scales import round_scale


@pytest.mark.parametrize("storage", [FP16, BF16, FP8_E4M3])
def test_underflow_becomes_the_smallest_positive_number(storage):
    spec = QuantSpec(get_format("int8"), per_channel(), scale=storage)
    stored = store_scale(torch.tensor([[1e-42], [0.5]]), spec)
    assert isinstance(stored, torch.Tensor)
    assert scale_values(stored).tolist() == [[storage.smallest_positive], [0.5]]


@pytest.mark.parametrize("storage", [FP16, BF16, FP32])
def test_negative_scales_are_stored_like_positive_ones(storage):
    spec = QuantSpec(get_format("int8"), per_channel(), scale=storage)
    scale = torch.tensor([[1e-40], [0.3], [0.0]])
    stored, negative = store_scale(scale, spec), store_scale(-scale, spec)
    assert isinstance(stored, torch.Tensor)
    assert isinstance(negative, torch.Tensor)
    assert torch.equal(scale_values(negative)[:2], -scale_values(stored)[:2])
    assert scale_values(negative)[2] == 1
    if storage is FP16:
        with pytest.raises(NumericsError, match=r"1 of 1 scales overflow float16 \(largest 1e\+08"):
            store_scale(torch.tensor([[-1e8]]), spec)


def test_overflow_names_tensor_count_and_remedy():
    spec = QuantSpec(get_format("int8"), per_channel(), scale=FP16)
    x = torch.tensor([[1e8, 2.0], [1.0, 2.0]])
    with pytest.raises(NumericsError, match=r"up_proj: 1 of 2 scales overflow float16.*float32 or bfloat16"):
        quantize(x, spec, name="up_proj")
    # 65519 rounds to the largest half, 65520 would round past it
    quantize(torch.tensor([[65504.0 * 128, 0.0]]) * -1, spec)


def test_e8m0_is_the_smallest_power_under_which_the_largest_does_not_overflow():
    spec = mxfp4()
    for exponent in range(-40, 40):
        for top in (1.0, 1.0001, 6.0, 6.9999995, 7.0, 7.0000005, 3.5, 3.4999998):
            largest = torch.tensor([top * 2.0**exponent], dtype=torch.float32)
            step = float(round_scale(largest / 6, spec))
            assert float(largest) / step < 7.0
            assert float(largest) / (step / 2) >= 7.0 * (1 - 1e-6)  # the scale itself is rounded to float32


def test_mx_scales_and_codes_are_compressed_tensors():
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 64, generator=generator) * 2.0 ** torch.randint(-30, 30, (512, 1), generator=generator)
    x[:8] = torch.tensor([3.5, 7.0, 1.75, 6.999999, 7.000001, 6.0, 1.0, 0.4375]).view(-1, 1)
    q = quantize(x, mxfp4())
    assert isinstance(q.scale, torch.Tensor)
    largest = x.view(512, 2, 32).abs().amax(-1)
    assert torch.equal(q.scale.view(torch.uint8), generate_mx_scales(largest).to(torch.uint8))


def test_torchao_mx_even_mode_is_the_same():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="this torchao has no MX formats")
    modes = pytest.importorskip("torchao.prototype.mx_formats.config", reason="this torchao has no MX formats")
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    scale, packed = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, modes.ScaleCalculationMode.EVEN)
    q = quantize(x, mxfp4())
    assert isinstance(q.scale, torch.Tensor)
    assert torch.equal(scale.view(torch.uint8).view(64, 4), q.scale.view(torch.uint8))
    from bitgrain.numerics.packing import pack

    assert torch.equal(pack(q.codes, 4, torch.uint8), packed.view(torch.uint8).view(64, 64))


@pytest.mark.parametrize("code", [0, 1, 126, 127, 128, 254])
def test_every_e8m0_scale_survives_storage(code):
    expected = 2.0 ** (code - 127)
    spec = QuantSpec(get_format("int8"), per_tensor(), scale=E8M0)
    stored = torch.tensor([[code]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert scale_values(stored).item() == expected
    if code > 1:
        assert torch.equal(store_scale(torch.tensor([[expected]]), spec).view(torch.uint8), stored.view(torch.uint8))


def test_nested_scales_are_never_zero_and_share_a_power_of_two():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    x[0, :16] = 0
    x[1, :16] = 1e-20  # its scale underflows E4M3
    q = quantize(x, nvfp4())
    assert not isinstance(q.scale, torch.Tensor)
    assert isinstance(q.scale.scale, torch.Tensor)
    assert q.scale.scale.dtype is torch.float8_e8m0fnu
    assert bool((scale_values(q.scale) > 0).all())
    assert bool((q.scale.dequantize() > 0).all())
    assert torch.equal(q.dequantize()[0, :16], torch.zeros(16))
    shared = quantize(x, nvfp4(), outer_scale=q.scale.scale)
    assert torch.equal(shared.codes, q.codes)


def test_nvfp4_is_exact_in_bfloat16():
    q = quantize(torch.randn(16, 64, generator=torch.Generator().manual_seed(4)), nvfp4())
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize())


def test_nvfp4_decodes_as_compressed_tensors_does():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    q = quantize(torch.randn(16, 64, generator=torch.Generator().manual_seed(4)), nvfp4())
    assert not isinstance(q.scale, torch.Tensor)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    decoded = dequantize(
        FP4_E2M1.decode(q.codes),
        FP8_E4M3.decode(q.scale.codes),
        None,
        args,
        global_scale=1 / scale_values(q.scale.scale).view(1),
    )
    assert torch.equal(decoded, q.dequantize())


def test_float32_scales_are_kept():
    spec = QuantSpec(get_format("int8"), per_channel(), scale=FP32)
    scale = torch.rand(7, 1)
    assert torch.equal(scale_values(store_scale(scale, spec)), scale)
