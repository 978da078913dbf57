import math
from itertools import pairwise

import pytest
import scalar_twin as twin
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import CodebookFormat, FloatFormat, IntFormat, get_format
from bitgrain.numerics.formats import BF16, E8M0, FP4_E2M1, FP8_E4M3, FP8_E5M2, FP16

FP8 = [(FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)]
SMALL = ["int1", "int2", "int3", "int4", "int8", "uint1", "uint4", "uint8", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2"]
SMALL += ["nf4", "bnb_fp4", "iq4_nl", "ternary", "binary", "dynamic8", "udynamic8"]


def interesting_floats() -> torch.Tensor:
    """All bfloat16 values, random float32 bit patterns, and every FP8 tie with both its neighbours."""
    every_bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    near = torch.randn(100_000, generator=generator) * torch.logspace(-6, 5, 100_000)
    ties = []
    for format, _ in FP8:
        grid = format.grid().double()
        middle = ((grid[1:] + grid[:-1]) / 2).float()
        ties += [middle, middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))]
    x = torch.cat([every_bf16, patterns, near, *ties])
    return x[torch.isfinite(x)]


@pytest.mark.parametrize(("format", "dtype"), FP8)
def test_fp8_is_torchs_bit_for_bit(format, dtype):
    x = interesting_floats()
    expected = x.clamp(-format.maximum, format.maximum).to(dtype)
    assert torch.equal(format.to_codes(x), expected.view(torch.uint8))
    assert torch.equal(format.round(x), expected.float())
    assert torch.equal(format.encode(format.round(x)), expected.view(torch.uint8))
    every_code = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(format.decode(every_code).nan_to_num(), every_code.view(dtype).float().nan_to_num())
    assert torch.equal(format.decode(every_code).isnan(), every_code.view(dtype).float().isnan())


@pytest.mark.parametrize(("format", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16)])
def test_sixteen_bit_storage_is_torchs(format, dtype):
    x = interesting_floats().clamp(-format.maximum, format.maximum)
    assert torch.equal(format.round(x), x.to(dtype).float())
    finite = format.round(x)
    assert torch.equal(format.decode(format.encode(finite)), finite)


def test_e8m0_decodes_as_torch_does():
    codes = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(E8M0.decode(codes), codes.view(torch.float8_e8m0fnu).float())
    assert E8M0.decode(torch.tensor([255], dtype=torch.uint8)).isnan().all()
    assert (E8M0.minimum, E8M0.maximum, E8M0.has_zero) == (2.0**-127, 2.0**127, False)


@pytest.mark.parametrize("name", SMALL)
def test_every_code_round_trips(name):
    format = get_format(name)
    codes = torch.arange(2**format.bits, dtype=torch.int32) - format.code_offset
    if isinstance(format, CodebookFormat):
        codes = codes[: len(format.values)]
    codes = codes.to(format.code_dtype)
    values = format.decode(codes)
    finite = values.isfinite()
    assert torch.equal(format.encode(values[finite]), codes[finite])
    assert torch.equal(format.round(values[finite]), values[finite])
    assert torch.equal(format.to_codes(values[finite]), codes[finite])
    grid = format.grid()
    assert (grid.min().item(), grid.max().item()) == (format.minimum, format.maximum)
    assert bool((grid.diff() > 0).all())


@pytest.mark.parametrize("name", ["int3", "uint4", "int8", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "ternary", "binary"])
@given(data=st.data())
def test_rounding_is_the_scalar_twins(name, data):
    format = get_format(name)
    middles = ((format.grid()[1:].double() + format.grid()[:-1].double()) / 2).tolist()
    number = st.one_of(
        st.sampled_from(middles),
        st.floats(-2, 2, width=32).map(lambda v: v * format.maximum),
        st.floats(-2, 2, width=32),
    )
    values = [twin.f32(v) for v in data.draw(st.lists(number, min_size=1, max_size=30))]
    x = torch.tensor(values, dtype=torch.float32)
    assert format.round(x).tolist() == [twin.nearest(name, v) for v in values]
    assert torch.equal(format.decode(format.to_codes(x)), format.round(x) + 0.0 * x.sign())


def test_derived_numbers():
    facts = {f.name: (f.bits, f.minimum, f.maximum, f.overflow) for f in (FP4_E2M1, FP8_E4M3, FP8_E5M2)}
    assert facts["fp4_e2m1"] == (4, -6.0, 6.0, 7.0)
    assert facts["fp8_e4m3"] == (8, -448.0, 448.0, 464.0)
    assert facts["fp8_e5m2"] == (8, -57344.0, 57344.0, 61440.0)
    for bits in range(1, 17):
        signed, unsigned = IntFormat(bits), IntFormat(bits, False)
        assert (signed.minimum, signed.maximum) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert (unsigned.minimum, unsigned.maximum) == (0, 2**bits - 1)
    assert FP4_E2M1.grid().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FP8_E4M3.smallest_positive == 2.0**-9
    assert FP8_E5M2.smallest_positive == 2.0**-16


def test_nf4_is_the_published_codebook():
    # QLoRA, arXiv 2305.14314, appendix E
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert torch.equal(get_format("nf4").grid(), torch.tensor(published))


def test_codebook_middles_go_to_the_smaller_entry_and_what_lies_above_does_not():
    format = get_format("nf4")
    grid = format.grid().double()
    for low, high in pairwise(grid):
        middle = (low + high) / 2
        x = torch.tensor([float(middle)])
        around = torch.cat([x.nextafter(torch.tensor(-math.inf)), x, x.nextafter(torch.tensor(math.inf))])
        expected = [float(low) if v.double() <= middle else float(high) for v in around]
        assert format.round(around).tolist() == expected


def test_unknown_names_and_bad_formats_are_errors():
    with pytest.raises(SchemeError, match="known formats: int1"):
        get_format("int9000")
    with pytest.raises(SchemeError, match="1 to 16 bits"):
        IntFormat(17)
    assert get_format("NF4") is get_format("nf4")
    with pytest.raises(SchemeError, match="too many to list"):
        FloatFormat("float32", 8, 23, "ieee").grid()


def test_torchao_rounds_to_fp4_the_same():
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels", reason="this torchao has no FP4 kernels")
    x = interesting_floats()
    assert torch.equal(FP4_E2M1.to_codes(x), kernels.f32_to_f4_unpacked(x.clamp(-6, 6)))
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(FP4_E2M1.decode(codes), kernels.f4_unpacked_to_f32(codes))


def test_torchao_has_the_same_nf4_codebook():
    nf4 = pytest.importorskip(
        "torchao.quantization.quantize_.workflows.nf4.nf4_tensor", reason="this torchao has no NF4 tensor"
    )
    tensor = nf4.NF4Tensor.from_tensor(torch.randn(512, 512), 64, 256)
    # torchao rounds the published numbers to four digits
    assert torch.allclose(tensor.nf4.float().sort().values, get_format("nf4").grid(), atol=6e-5, rtol=0)


@pytest.mark.parametrize("name", ["ternary", "bnb_fp4"])
def test_codes_that_a_codebook_does_not_have_are_refused(name: str):
    format = get_format(name)
    with pytest.raises(NumericsError, match="a damaged file"):
        format.decode(torch.tensor([0, 2**format.bits - 1], dtype=torch.uint8))
