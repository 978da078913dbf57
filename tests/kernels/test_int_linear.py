"""int8 products of packed weights: every level equals the twin, whatever the shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import KernelError
from bitgrain.kernels.int_linear import BITS, IntInputs, IntLinear
from bitgrain.kernels.native import native
from bitgrain.kernels.packed_linear import panel_bits
from bitgrain.kernels.reference.int_linear import IntLinearTwin, int_linear, quantize_inputs
from bitgrain.numerics.packing import pack

STATIC = st.sampled_from([(-128, 127), (0, 255), (-8, 7)])


@st.composite
def cases(draw):
    """Arguments of the kernel and its twin."""
    seed = draw(st.integers(0, 2**31))
    made = torch.Generator().manual_seed(seed)
    bits = draw(st.sampled_from(BITS))
    n = draw(st.integers(1, 70))
    lengths = draw(st.lists(st.integers(1, 140), min_size=1, max_size=4))
    k, spans = sum(lengths), len(lengths)
    code_type = torch.int8 if bits == 8 else torch.uint8
    low = -128 if bits == 8 else 0
    codes = torch.randint(low, low + 2**bits, (n, k), generator=made).to(code_type)
    scale_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale = (torch.rand(n, spans, generator=made) + 0.1).to(scale_dtype)
    kind = draw(st.sampled_from(["constant", "codes", "real", "minima"]))
    zero = 2 ** (bits - 1) if bits < 8 else 0
    if kind == "codes":
        zero = torch.randint(0, 2 ** min(bits, 7), (n, spans), generator=made).to(torch.uint8)
    elif kind == "real":
        zero = torch.randn(n, spans, generator=made)
    minimum = torch.randn(n, spans, generator=made).to(scale_dtype) if kind == "minima" else None
    if minimum is not None and draw(st.booleans()):
        scale[::2] = 0
    zeros_and_minima = {"zero": zero, "minimum": minimum}
    inputs = IntInputs()
    if draw(st.booleans()):
        low, high = draw(STATIC)
        zeros = tuple(torch.randint(low, high + 1, (spans,), generator=made).tolist())
        scales = tuple((torch.rand(spans, generator=made) / 20 + 0.01).tolist())
        inputs = IntInputs(low, high, scales=scales, zeros=zeros)
    m = draw(st.sampled_from([0, 1, 2, 3, 5, 6, 7, 12, 13, 17, 40]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = torch.randn(m, k, generator=made).to(dtype)
    bias = torch.randn(n, generator=made) if draw(st.booleans()) else None
    return x, codes, scale, bits, inputs, lengths, zeros_and_minima, bias


@pytest.fixture(params=native().isas())
def level(request: pytest.FixtureRequest):
    before = native().isa()
    native().use_isa(request.param)
    yield request.param
    native().use_isa(before)


@pytest.mark.parametrize("isa", native().isas())
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_equals_its_twin(isa, case):
    x, codes, scale, bits, inputs, lengths, how, bias = case
    zero = how["zero"]
    before = native().isa()
    native().use_isa(isa)
    try:
        packed = IntLinear.pack(codes, scale, bits, inputs, lengths=lengths, **how, bias=bias)
        y = packed(x)
    finally:
        native().use_isa(before)
    twin = int_linear(x.float(), codes, scale, inputs, lengths=lengths, **how, bias=bias)
    assert y.dtype == x.dtype
    assert y.shape == (len(x), len(codes))
    sizes = torch.tensor(lengths)
    shift = abs(zero) if isinstance(zero, int) else zero.double().abs().repeat_interleave(sizes, 1)
    weight = (codes.double().abs() + shift) * scale.double().repeat_interleave(sizes, 1)
    if how["minimum"] is not None:
        weight += how["minimum"].double().abs().repeat_interleave(sizes, 1)
    q, row, column = quantize_inputs(x, inputs, lengths)
    bound = (q.abs() * column.double()) @ weight.T * row.double() + (0 if bias is None else bias.abs())
    error = (y.double() - twin.double()).abs()
    assert (error <= (len(lengths) + 4) * 2.0**-23 * bound + torch.finfo(x.dtype).eps * twin.abs()).all()


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_unpacks_to_what_was_packed(case):
    _, codes, scale, bits, inputs, lengths, how, _ = case
    found = IntLinear.pack(codes, scale, bits, inputs, lengths=lengths, **how).unpack()
    assert found[0].equal(codes)
    assert found[1].equal(scale.float())
    zeros = how["zero"] if how["minimum"] is None else how["minimum"].float()
    assert isinstance(zeros, int) or (found[2] is not None and found[2].equal(zeros))


@settings(max_examples=60, deadline=None)
@given(case=cases(), bits=st.integers(1, 8), word=st.sampled_from([torch.uint8, torch.int32]), seed=st.integers(0, 99))
def test_words_are_packed_as_their_codes_are(case, bits, word, seed):
    _, codes, scale, _, inputs, lengths, how, bias = case
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, codes.shape, generator=made).to(torch.uint8)
    words = pack(codes, bits, word)
    wide = panel_bits(bits, lengths)
    offset = 2 ** (bits - 1) if wide == 8 else 0
    plain = (codes.int() - offset).to(torch.int8) if wide == 8 else codes
    zeros = torch.randint(0, 2**bits, scale.shape, generator=made).to(torch.uint8)
    for zero, same in ((None, 2 ** (bits - 1) - offset), (zeros, zeros if wide < 8 else zeros.float() - offset)):
        more = {"lengths": lengths, "minimum": how["minimum"] if zero is None else None, "bias": bias}
        found = IntLinear.pack_words(words, scale, bits, inputs, k=codes.shape[1], zero=zero, **more)
        expected = IntLinear.pack(plain, scale, wide, inputs, zero=same, **more)
        assert found.panels.equal(expected.panels)
        assert found.zero == expected.zero


@settings(max_examples=60, deadline=None)
@given(case=cases(), ids=st.lists(st.integers(0, 10**6), max_size=20))
def test_rows_are_those_of_the_twin(case, ids):
    x, codes, scale, bits, inputs, lengths, how, _ = case
    rows = torch.tensor(ids, dtype=torch.int64).view(-1, 1) % len(codes)
    kernel = IntLinear.pack(codes, scale, bits, inputs, lengths=lengths, **how)
    twin = IntLinearTwin(codes, scale, how["zero"], how["minimum"], tuple(lengths), inputs)
    found = kernel.rows(rows, x.dtype)
    assert found.dtype == x.dtype
    assert found.equal(twin.rows(rows, x.dtype))
    assert found.equal(twin.rows(rows).to(x.dtype))
    features = torch.tensor(ids[:5], dtype=torch.int64) % codes.shape[1]
    assert kernel.dequantize_features(features).equal(twin.dequantize_features(features))


def test_rows_that_are_not_finite_become_nan(level):
    packed = IntLinear.pack(torch.ones(3, 8, dtype=torch.uint8), torch.ones(3, 1), 4, IntInputs())
    x = torch.ones(3, 8)
    x[1, 5] = torch.inf
    x[2, 7] = torch.nan
    y = packed(x)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()


def test_wrong_inputs_are_told():
    packed = IntLinear.pack(torch.ones(3, 8, dtype=torch.uint8), torch.ones(3, 1), 4, IntInputs())
    with pytest.raises(KernelError, match="inputs have 7 features, the weight has 8"):
        packed(torch.ones(2, 7))
    with pytest.raises(KernelError, match="float64"):
        packed(torch.ones(2, 8, dtype=torch.float64))
    with pytest.raises(KernelError, match="3 is no row of an embedding of 3"):
        packed.rows(torch.tensor([0, 3]))
    with pytest.raises(KernelError, match="5-bit"):
        IntLinear(3, [8], 5, IntInputs())
    words = torch.zeros(3, 4, dtype=torch.uint8)
    with pytest.raises(KernelError, match="9 codes of 4 bits take rows of 5 words"):
        IntLinear.pack_words(words, torch.ones(3, 1), 4, IntInputs(), k=9)
    with pytest.raises(KernelError, match="float32"):
        IntLinear.pack_words(words.float(), torch.ones(3, 1), 4, IntInputs(), k=8)
    with pytest.raises(KernelError, match="do not fit spans"):
        IntLinear.pack_words(words, torch.ones(3, 3), 4, IntInputs(), k=8)
