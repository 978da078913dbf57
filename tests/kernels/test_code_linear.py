"""Weights that are looked up in a table: every level equals the twin, whatever the shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import KernelError
from bitgrain.kernels.code_linear import FLOAT8, SCALE_DTYPES, CodeLinear, rounds_inputs
from bitgrain.kernels.float_inputs import FORMATS, KINDS, FloatInputs
from bitgrain.kernels.int_linear import BITS
from bitgrain.kernels.native import DTYPES, native
from bitgrain.kernels.packed_linear import panel_bits
from bitgrain.kernels.reference.code_linear import code_linear, dequantize
from bitgrain.kernels.reference.embedding import look_up
from bitgrain.kernels.reference.float_inputs import round_inputs
from bitgrain.numerics.formats import FP4_E2M1, get_format
from bitgrain.numerics.packing import pack

pytest.importorskip("bitgrain._native", reason="the native module was not built")
NF4 = get_format("nf4").grid().tolist()
E2M1 = FP4_E2M1.decode(torch.arange(16, dtype=torch.uint8)).tolist()


@st.composite
def weights(draw):
    """Positional and keyword arguments of `pack`."""
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bits = draw(st.sampled_from(BITS))
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 330))
    group = draw(st.sampled_from([16, 32, 64, 128, 7, None]))
    tables = {4: [NF4, E2M1, range(-8, 8)], 3: [NF4[4:12], range(-4, 4)], 2: [[-1.0, 0.0, 1.0], NF4[::5]]}
    tables[8] = [None, *FLOAT8]
    table = draw(st.sampled_from(tables[bits]))
    codes = torch.randint(-128, 128, (n, k), generator=made).to(torch.int8)
    if isinstance(table, torch.dtype):
        codes = torch.randn(n, k, generator=made).mul_(10).to(table).view(torch.uint8)
    elif table is not None:
        codes = torch.randint(0, len(table), (n, k), generator=made).to(torch.uint8)
    shape = (n, -(-k // (group or k)))
    kind = draw(st.sampled_from(["none", "codes", "real", "minima"]))
    dtype = draw(st.sampled_from(list(DTYPES if kind == "minima" else SCALE_DTYPES)))
    scale = (torch.randn(shape, generator=made) if dtype.is_signed else torch.rand(shape, generator=made)).to(dtype)
    minimum = torch.randn(shape, generator=made).to(dtype) if kind == "minima" else None
    if minimum is not None and draw(st.booleans()):
        scale[::2] = 0  # whole tiles are minus their minimum
    zero = torch.randint(0, 16, shape, generator=made).to(torch.uint8) if kind == "codes" else None
    zero = torch.randn(shape, generator=made) if kind == "real" else zero
    bias = torch.randn(n, generator=made) if draw(st.booleans()) else None
    if minimum is not None:
        zero = draw(st.sampled_from([None, -16.0, -128.0]))
    how = {"group": group, "zero": zero, "minimum": minimum, "outer": draw(st.sampled_from([1.0, 0.3]))}
    return (codes, scale, bits, table), how, bias


ROUNDED = st.builds(
    FloatInputs, st.sampled_from(list(FORMATS)), st.sampled_from(list(KINDS)), st.booleans(), st.sampled_from([0.25, 1])
)


@pytest.mark.parametrize("isa", native().isas())
@settings(max_examples=60, deadline=None)
@given(
    weight=weights(),
    m=st.sampled_from([0, 1, 2, 3, 5, 6, 7, 11, 12, 13, 17, 50]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
    inputs=st.none() | ROUNDED,
)
def test_equals_its_twin(isa, weight, m, dtype, seed, inputs):
    (codes, scale, bits, table), how, bias = weight
    x = torch.randn(m, codes.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = native().isa()
    native().use_isa(isa)
    try:
        rounded = rounds_inputs(m)
        y = CodeLinear.pack(codes, scale, bits, table, **how, bias=bias, inputs=inputs)(x)
    finally:
        native().use_isa(before)
    assert rounded == (isa == "avx512bf16" or (isa == "amx" and m >= 4))
    assert y.dtype == dtype
    twin = code_linear(x.float(), codes, scale, table, **how, bias=bias, rounded=rounded, inputs=inputs)
    same, nothing = {"group": how["group"], "outer": how["outer"]}, torch.zeros_like(codes)
    magnitude = dequantize(codes, scale, table, **same).abs()
    if how["zero"] is not None:
        magnitude += dequantize(nothing, scale, [0.0], **same, zero=how["zero"]).abs()
    if how["minimum"] is not None:
        magnitude += dequantize(nothing, scale, [0.0], **same, minimum=how["minimum"]).abs()
    if rounded and m <= 2 and bits == 8 and table is None:  # in two parts
        magnitude += dequantize(nothing, scale, [512.0], **same).abs()
    if inputs is not None:
        values, steps = round_inputs(x, inputs, how["group"])
        x = values * steps
    bound = x.float().abs().double() @ magnitude.T * (1 + 2.0**-7) + (0 if bias is None else bias.abs())
    steps = (how["group"] or codes.shape[1]) + scale.shape[1] + 8
    error = (y.double() - twin.double()).abs()
    largest = torch.finfo(dtype).max
    assert (
        (error <= steps * 2.0**-24 * bound + torch.finfo(dtype).eps * twin.abs() + 1e-7)
        .logical_or(twin.abs() >= largest)
        .all()
    )


@settings(max_examples=60, deadline=None)
@given(weight=weights())
def test_unpacks_to_what_was_packed(weight):
    (codes, scale, bits, table), how, _ = weight
    found = CodeLinear.pack(codes, scale, bits, table, **how).unpack()
    assert found[0].equal(codes)
    assert found[1].view(torch.uint8).equal(scale.view(torch.uint8))
    zeros = how["zero"] if how["minimum"] is None else how["minimum"].float()
    assert (found[2] is None) if zeros is None else (found[2] is not None and found[2].equal(zeros))


@settings(max_examples=60, deadline=None)
@given(weight=weights(), bits=st.integers(1, 8), word=st.sampled_from([torch.uint8, torch.int32]))
def test_words_are_packed_as_their_codes_are(weight, bits, word):
    (codes, scale, _, _), how, _ = weight
    codes = codes.view(torch.uint8) & (2**bits - 1)
    table = NF4[: 2**bits] if bits <= 4 else None
    k = codes.shape[1]
    group = how["group"] or k
    wide = panel_bits(bits, [min(group, k - i) for i in range(0, k, group)])
    plain = codes if bits <= 4 else (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    found = CodeLinear.pack_words(pack(codes, bits, word), scale, bits, table, k=codes.shape[1], **how)
    assert found.panels.equal(CodeLinear.pack(plain, scale, wide, table, **how).panels)


@settings(max_examples=60, deadline=None)
@given(
    weight=weights(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ids=st.lists(st.integers(0, 10**6), max_size=20),
)
def test_rows_are_those_of_the_twin(weight, dtype, ids):
    (codes, scale, bits, table), how, _ = weight
    rows = torch.tensor(ids, dtype=torch.int64) % len(codes)
    found = CodeLinear.pack(codes, scale, bits, table, **how).rows(rows, dtype)
    plain = (codes.view(torch.uint8) + 128) if table is None else codes
    expected = look_up(plain, scale, list(range(-128, 128)) if table is None else table, rows, dtype, **how)
    assert found.dtype == dtype
    assert found.equal(expected)


def test_panels_take_the_least():
    made = torch.Generator().manual_seed(0)
    for bits, group, wide in ((3, 16, 4), (3, 32, 3), (2, 16, 2), (1, 8, 2), (5, 16, 8), (4, 4, 4)):
        assert panel_bits(bits, [group] * 4) == wide
        codes = torch.randint(0, 2**bits, (32, 4 * group), generator=made).to(torch.uint8)
        table = list(range(2**bits)) if bits <= 4 else None
        scale = torch.ones(32, 4)
        found = CodeLinear.pack_words(pack(codes, bits, torch.uint8), scale, bits, table, k=4 * group, group=group)
        others = [CodeLinear.pack(codes, scale, b, table, group=group) for b in (2, 3, 4) if bits <= b and table]
        assert found.bits == wide
        assert all(found.panels.nbytes <= one.panels.nbytes for one in others)


def test_wrong_inputs_are_told():
    codes, scale = torch.ones(3, 8, dtype=torch.uint8), torch.ones(3, 1)
    packed = CodeLinear.pack(codes, scale, 4, NF4)
    with pytest.raises(KernelError, match="inputs have 7 features, the weight has 8"):
        packed(torch.ones(2, 7))
    with pytest.raises(KernelError, match="a table of 16"):
        CodeLinear.pack(codes, scale, 3, NF4)
    with pytest.raises(KernelError, match="a table of none"):
        CodeLinear.pack(codes, scale, 4, None)
    with pytest.raises(KernelError, match=r"a table of torch.float16: .*float8_e5m2"):
        CodeLinear.pack(codes, scale, 8, torch.float16)
    with pytest.raises(KernelError, match=r"a table of torch\.float8_e5m2"):
        CodeLinear.pack(codes, scale, 4, torch.float8_e5m2)
    with pytest.raises(KernelError, match=r"minima \(3, 2\) take scales of that shape"):
        CodeLinear.pack(codes, scale, 4, NF4, minimum=torch.ones(3, 2))
    with pytest.raises(KernelError, match=r"minima \(3, 1\)"):
        CodeLinear.pack(codes, scale, 4, NF4, zero=scale, minimum=scale)
    with pytest.raises(KernelError, match="not to fp8_e3m4"):
        FloatInputs("fp8_e3m4")
    with pytest.raises(KernelError, match="has to be positive"):
        FloatInputs("fp8_e4m3", "fixed", outer=0.0)
    with pytest.raises(KernelError, match="do not fit codes"):
        CodeLinear.pack(codes, scale, 4, NF4, group=4)
    with pytest.raises(KernelError, match="5-bit"):
        CodeLinear(3, 8, 5, None)
