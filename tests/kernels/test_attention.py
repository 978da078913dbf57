"""Decode attention: every level equals the twin, whatever the shapes, masks and strides; any number of threads."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import VECTOR_LEVELS

from bitgrain.errors import KernelError
from bitgrain.kernels.attention import attend_dense, attend_packed
from bitgrain.kernels.native import is_available, native
from bitgrain.kernels.packed_states import BITS, PackedStates
from bitgrain.kernels.reference.attention import attend
from bitgrain.numerics import QuantSpec, per_token, quantize
from bitgrain.numerics.formats import FP16, IntFormat

if not is_available():
    pytest.skip("the native module is not built", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=VECTOR_LEVELS)
def level(request: pytest.FixtureRequest):
    before = native().isa()
    native().use_isa(request.param)
    yield request.param
    native().use_isa(before)


def options_of(draw: Any, made: torch.Generator, batch: int, heads: int, queries: int, tokens: int) -> dict[str, Any]:
    """Mask, causal, softcap and sinks."""
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    mask = draw(st.sampled_from(["none", "seen", "added", "lowest"]))
    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), queries, tokens)
    if mask == "seen":
        options["mask"] = torch.rand(shape, generator=made) > 0.3
    elif mask != "none":
        options["mask"] = torch.randn(shape, generator=made)
        if mask == "lowest":
            low = torch.finfo(torch.float32).min
            options["mask"] = options["mask"].masked_fill(options["mask"] > 0.5, low)
    if draw(st.booleans()):
        options["softcap"] = 5.0
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads, generator=made)
    return options


@st.composite
def cases(draw: Any):
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, groups, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    queries, tokens = draw(st.sampled_from([1, 1, 2, 5])), draw(st.sampled_from([1, 3, 63, 64, 65, 255, 257, 530]))
    size, v_size = draw(st.sampled_from([(16, 16), (64, 64), (24, 40), (33, 7), (96, 64)]))
    dtype, past = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    options = options_of(draw, made, batch, groups * shared, queries, tokens)
    q = torch.randn(batch, queries, groups * shared, size, generator=made).to(dtype).transpose(1, 2)
    k = torch.randn(batch, groups, tokens + 3, size, generator=made).to(past)[:, :, 2:-1]
    v = torch.randn(batch, tokens, groups, v_size, generator=made).to(past).transpose(1, 2)
    return q, k, v, options


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_equals_its_twin(isa: str, case: Any):
    q, k, v, options = case
    before = native().isa()
    native().use_isa(isa)
    try:
        found = attend_dense(q, k, v, scaling=0.2, **options)
    finally:
        native().use_isa(before)
    twin = attend(q.double(), k, v, scaling=0.2, **options)
    assert found.dtype == q.dtype
    error = (found.double() - twin).abs()
    assert (error <= 2e-6 + 1.01 * torch.finfo(q.dtype).eps * twin.abs()).all()


def test_any_number_of_threads_gives_the_same():
    q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 3000, 64), torch.randn(1, 2, 3000, 64)
    before, found = torch.get_num_threads(), list[torch.Tensor]()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(attend_dense(q, k, v, scaling=0.125))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_exp_to_an_ulp(level: str):
    x = torch.cat(
        [torch.linspace(-87, 88.7, 100001), torch.tensor([0.0, -200.0, 200.0, torch.inf, -torch.inf, torch.nan])]
    )
    y = torch.empty_like(x)
    native().exp_floats(x.data_ptr(), y.data_ptr(), x.numel())
    exact = x[:-6].double().exp()
    assert float(((y[:-6] - exact) / exact).abs().max()) < 2.0**-23
    assert y[-6:-1].tolist() == [1.0, 0.0, torch.inf, torch.inf, 0.0]
    assert y[-1].isnan()


def test_nan_comes_through(level: str):
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16)
    k[0, 0, 4, 3] = torch.nan
    assert attend_dense(q, k, v, scaling=1.0).isnan().all()


def test_wrong_shapes_are_told():
    q, k = torch.randn(1, 3, 1, 16), torch.randn(1, 2, 9, 16)
    with pytest.raises(KernelError, match="do not fit each other"):
        attend_dense(q, k, k[:, :, :5], scaling=1.0)
    with pytest.raises(KernelError, match="cannot read the keys of 1 texts with 2 heads"):
        attend_dense(q, k, k, scaling=1.0)
    with pytest.raises(KernelError, match="mask of shape"):
        attend_dense(q[:, :2], k, k, scaling=1.0, mask=torch.ones(1, 1, 1, 8, dtype=torch.bool))
    with pytest.raises(KernelError, match="sinks of shape"):
        attend_dense(q[:, :2], k, k, scaling=1.0, sinks=torch.ones(3))
    with pytest.raises(KernelError, match="float64"):
        attend_dense(q[:, :2].double(), k, k, scaling=1.0)


@st.composite
def packed_cases(draw: Any):
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, groups, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    queries, tokens = draw(st.sampled_from([1, 1, 2, 5])), draw(st.sampled_from([1, 3, 63, 64, 65, 255, 257, 530]))
    size, v_size = draw(st.sampled_from([(16, 16), (64, 64), (48, 80), (128, 32)]))
    dtype, bits = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(BITS))
    dropped = draw(st.integers(0, min(100, tokens - 1)))
    options = options_of(draw, made, batch, groups * shared, queries, tokens - dropped)
    q = torch.randn(batch, queries, groups * shared, size, generator=made).to(dtype).transpose(1, 2)
    k = torch.randn(batch, tokens, groups, size, generator=made).to(dtype).transpose(1, 2)
    v = torch.randn(batch, groups, tokens, v_size, generator=made).to(dtype)
    return q, k + k.new_ones(size).cumsum(0) / 16, v, bits, dropped, draw(st.integers(1, tokens)), options


def spec_of(bits: int) -> QuantSpec:
    return QuantSpec(IntFormat(bits, is_signed=False), per_token(), zero_point="real", scale=FP16, dynamic=True)


def packed(x: torch.Tensor, bits: int, *, values: bool, piece: int = 1000) -> PackedStates:
    states = PackedStates(x.shape[0], x.shape[1], x.shape[3], bits, values=values)
    assert all(states.append(part) for part in x.split(piece, dim=2))
    return states


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(max_examples=40, deadline=None)
@given(case=packed_cases())
def test_packed_equals_its_twin(isa: str, case: Any):
    """Codes are those of `quantize`; the result is that of the numbers they stand for."""
    q, k, v, bits, dropped, piece, options = case
    before = native().isa()
    native().use_isa(isa)
    try:
        keys, values = packed(k, bits, values=False, piece=piece), packed(v, bits, values=True, piece=piece)
        k, v = (quantize(x, spec_of(bits)).dequantize().view(x.shape)[:, :, dropped:] for x in (k, v))
        for states, numbers in ((keys, k), (values, v)):
            states.drop_oldest(dropped)
            assert torch.equal(states.read(torch.float32), numbers)
        found = attend_packed(q, keys, values, scaling=0.1, **options)
    finally:
        native().use_isa(before)
    twin = attend(q.double(), k, v, scaling=0.1, **options)
    error = (found.double() - twin).abs()
    within = 5e-6 if q.dtype == torch.float32 else 1e-3
    assert (error <= within + 1.01 * torch.finfo(q.dtype).eps * twin.abs()).all()


@pytest.mark.parametrize("values", [False, True])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "add", "crop", "drop", "select"]), st.integers(1, 90)), max_size=10
    )
)
@settings(max_examples=25, deadline=None)
def test_tokens_come_and_go(values: bool, steps: list[tuple[str, int]]):
    """Against a plain tensor: dropped, cropped, overwritten, reordered, and copied."""
    made = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 3, 40, 32, generator=made)
    states = packed(plain, 4, values=values)
    for what, count in steps:
        if what == "add":
            more = torch.randn(len(plain), 3, count, 32, generator=made)
            assert states.append(more)
            plain = torch.cat([plain, more], dim=2)
        elif what == "crop":
            states.crop(count)
            plain = plain[:, :, : max(0, plain.shape[2] - count)]
        elif what == "drop":
            states.drop_oldest(count)
            plain = plain[:, :, count:]
        else:
            rows = torch.randint(0, len(plain), (1 + count % 3,), generator=made)
            states.select(rows)
            plain = plain[rows]
        expected = quantize(plain, spec_of(4)).dequantize().view(plain.shape) if plain.numel() else plain
        assert torch.equal(states.read(torch.float32), expected)
        assert torch.equal(copy.deepcopy(states).read(torch.float32), expected)
        assert states.nbytes == plain.numel() // 2 + plain.numel() // 32 * 4


@pytest.mark.parametrize("bits", BITS)
def test_rounds_what_is_hard_to_round_as_quantize_does(level: str, bits: int):
    tiny, huge = torch.full((16,), 1e-9), torch.linspace(-7e6, 7e6, 16) * (2**bits - 1) / 255
    rows = torch.stack(
        [torch.zeros(16), tiny, huge, torch.arange(16.0), -torch.arange(16.0), torch.linspace(-1, 1, 16)]
    )
    x = rows.view(1, 1, -1, 16)
    states = packed(x, bits, values=False)
    assert torch.equal(states.read(torch.float32), quantize(x, spec_of(bits)).dequantize())
    for bad in (torch.nan, torch.inf, 1e9):
        assert not states.append(torch.full((1, 1, 1, 16), bad))
    assert states.tokens == len(rows)


def test_what_no_kernel_fits_is_told():
    with pytest.raises(KernelError, match="no kernel for 8-bit keys and values with heads of 24 channels"):
        PackedStates(1, 1, 24, 8, values=False)
    with pytest.raises(KernelError, match="no kernel for 3-bit"):
        PackedStates(1, 1, 16, 3, values=False)
    keys, values = packed(torch.randn(1, 2, 9, 16), 8, values=False), packed(torch.randn(1, 2, 8, 16), 8, values=True)
    with pytest.raises(KernelError, match="do not belong together"):
        attend_packed(torch.randn(1, 2, 1, 16), keys, values, scaling=1.0)
    with pytest.raises(KernelError, match="do not fit 1 texts, 2 heads"):
        keys.append(torch.randn(2, 2, 1, 16))
