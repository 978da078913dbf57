"""Every format on the device of the jobs, by torch, against the CPU and its kernels: codes, scales, packed words."""

import pytest
import torch

from bitgrain.kernels.native import torch_only
from bitgrain.numerics import QTensor, QuantSpec, dequantize, fake_quantize, get_format, per_group, quantize
from bitgrain.numerics.hadamard import Rotation
from bitgrain.numerics.measures import code_use, measure
from bitgrain.numerics.packed import pack_qtensor, unpack_qtensor
from bitgrain.numerics.packing import pack, unpack
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.ranges import get_range
from bitgrain.pipeline.layers import to_cpu
from bitgrain.recipes import PRESETS

FORMATS = ("int2", "int5", "int8", "int16", "uint3", "uint8", "uint16", "fp8_e5m2", "nf4", "ternary", "binary")
EXACT = {
    name: one.weight for name, one in PRESETS.items() if one.weight.columns is None and not name.startswith("GGUF_")
} | {name: QuantSpec(get_format(name), per_group(32)) for name in FORMATS}
"""Their scales are extremes, which no order of sums changes."""
SEARCHED = {
    **{name: one.weight for name, one in PRESETS.items() if name.startswith("GGUF_")},
    **{f"int4 {name}": QuantSpec(get_format("int4"), per_group(32), range=get_range(name))
       for name in ("mse", "percentile", "weighted")},
}  # fmt: skip


def numbers(rows: int = 24, columns: int = 512) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.02
    x[::5, ::37] *= 20
    x[7] = 0
    return x


def both(x: torch.Tensor, spec: QuantSpec, device: str) -> tuple[QTensor, QTensor]:
    """Rounded by the CPU, and by torch alone on the device, brought back."""
    expected = quantize(x, spec)
    with torch_only():
        found = quantize(x.to(device), spec)
    assert found.codes.device.type == device
    assert found.dequantize().device.type == device
    return expected, to_cpu(found)


@pytest.mark.parametrize("name", EXACT)
def test_the_same_codes_and_scales(name: str, device: str):
    expected, found = both(numbers(), EXACT[name], device)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(scale_values(found.scale), scale_values(expected.scale))
    assert (found.zero is None) == (expected.zero is None)
    assert found.zero is None or torch.equal(found.zero, expected.zero)
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_ends_as_near(name: str, device: str):
    """Where scales are searched for, candidates are compared by sums, whose order differs: of two that lose equally
    much, another may be taken. All that is lost grows by a thousandth at most."""
    x = numbers()
    expected, found = both(x, SEARCHED[name], device)
    lost, before = ((x - q.dequantize()).double().square().sum() for q in (found, expected))
    assert lost <= 1.001 * before
    assert (found.codes == expected.codes).double().mean() > 0.99


@pytest.mark.parametrize("name", EXACT)
def test_packed_and_unpacked(name: str, device: str):
    expected, _ = both(numbers(), EXACT[name], device)
    with torch_only():
        mine = pack_qtensor(quantize(numbers().to(device), EXACT[name]))
        again = unpack_qtensor(mine, EXACT[name], tuple(expected.codes.shape))
    theirs = pack_qtensor(expected)
    assert {key: part.device.type for key, part in mine.items()} == dict.fromkeys(theirs, device)
    assert all(torch.equal(part.cpu().view(torch.uint8), theirs[key].view(torch.uint8)) for key, part in mine.items())
    assert torch.equal(dequantize(again).cpu(), expected.dequantize())


@pytest.mark.parametrize("name", ["W4A16", "NF4", "FP8_DYNAMIC", "TERNARY"])
def test_measures(name: str, device: str):
    expected, _ = both(numbers(), EXACT[name], device)
    with torch_only():
        found = quantize(numbers().to(device), EXACT[name])
    assert code_use(found) == code_use(expected)
    mine, theirs = measure(numbers().to(device), found.dequantize()), measure(numbers(), expected.dequantize())
    assert (mine.max_error, mine.elements) == (theirs.max_error, theirs.elements)
    assert mine.sqnr_db == pytest.approx(theirs.sqnr_db, abs=1e-9)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", [torch.uint8, torch.int32])
def test_words(bits: int, word: torch.dtype, device: str):
    codes = torch.randint(0, 2**bits, (5, 77), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes.to(device), bits, word)
    assert words.cpu().equal(pack(codes, bits, word))
    assert unpack(words, bits, 77).cpu().equal(codes)
    down = pack(codes.to(device), bits, word, axis=0)
    assert unpack(down, bits, 5, axis=0).cpu().equal(codes)


@pytest.mark.parametrize("name", [name for name, one in PRESETS.items() if one.input is not None and one.input.dynamic])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_inputs(name: str, dtype: torch.dtype, device: str):
    spec, x = PRESETS[name].input, numbers().to(dtype)
    assert spec is not None
    with torch_only():
        found = fake_quantize(x.to(device), spec)
    assert (found.device.type, found.dtype) == (device, dtype)
    assert torch.equal(found.cpu(), fake_quantize(x, spec))


@pytest.mark.parametrize("size", [64, 96, 172])
def test_rotations(size: int, device: str):
    """Products in another order: 1e-6 of the largest number."""
    x = torch.randn(9, size, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(size, seed=5)
    found = rotation(x.to(device))
    torch.testing.assert_close(found.cpu(), rotation(x), rtol=0, atol=1e-6 * float(x.abs().max()) * size**0.5)
    torch.testing.assert_close(rotation.undo(found).cpu(), x, rtol=0, atol=1e-5)
