"""Rows of packed matrices: the numbers of `QTensor.dequantize`, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import KernelError
from bitgrain.kernels.code_linear import SCALE_DTYPES
from bitgrain.kernels.embedding import CodeEmbedding
from bitgrain.kernels.reference.embedding import look_up
from bitgrain.numerics import QuantSpec, per_group, quantize
from bitgrain.numerics.formats import BF16, FP8_E4M3, IntFormat, get_format
from bitgrain.numerics.packed import pack_qtensor
from bitgrain.numerics.packing import pack
from bitgrain.numerics.spec import mxfp4

pytest.importorskip("bitgrain._native", reason="the native module was not built")


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 150)),
    group=st.sampled_from([16, 32, 7, None]),
    scale_dtype=st.sampled_from(list(SCALE_DTYPES)),
    zero_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8]),
    minimum_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    word=st.sampled_from([torch.uint8, torch.int32]),
    outer=st.sampled_from([1.0, 0.3]),
    ids=st.lists(st.integers(0, 10**6), max_size=40),
)
def test_equals_its_twin(seed, bits, shape, group, scale_dtype, zero_dtype, minimum_dtype, dtype, word, outer, ids):
    made = torch.Generator().manual_seed(seed)
    (n, k), groups = shape, -(-shape[1] // (group or shape[1]))
    codes = torch.randint(0, 2**bits, (n, k), generator=made).to(torch.uint8)
    table = torch.randn(2**bits, generator=made).tolist()
    scale = torch.rand(n, groups, generator=made).to(scale_dtype)
    zero = None if zero_dtype is None else torch.randint(0, 9, (n, groups), generator=made).to(zero_dtype)
    minimum = None if minimum_dtype is None else torch.randn(n, groups, generator=made).to(minimum_dtype)
    rows = torch.tensor(ids, dtype=torch.int64) % n
    how = {"group": group, "zero": zero, "minimum": minimum, "outer": outer}
    embedding = CodeEmbedding(pack(codes, bits, word), scale, bits, table, k=k, **how)
    found, twin = embedding(rows, dtype), look_up(codes, scale, table, rows, dtype, **how)
    assert found.dtype == dtype
    assert found.equal(twin)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(IntFormat(8), per_group(32), scale=BF16),
        QuantSpec(IntFormat(4), per_group(32), zero_point="integer", scale=BF16),
        QuantSpec(get_format("nf4"), per_group(64)),
        QuantSpec(FP8_E4M3, per_group(64)),
        mxfp4(),
    ],
    ids=QuantSpec.describe,
)
def test_equals_what_the_numerics_say(spec):
    q = quantize(torch.randn(40, 130, generator=torch.Generator().manual_seed(1)), spec)
    stored = pack_qtensor(q)
    offset = spec.format.code_offset
    every = torch.arange(2**spec.format.bits) - offset
    table = spec.format.decode(every.to(spec.format.code_dtype)).tolist()
    ids = torch.arange(40).view(2, 20)
    found = CodeEmbedding(
        stored["codes"], stored["scale"], spec.format.bits, table, k=130, group=spec.granularity.cols, zero=q.zero
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert found(ids, dtype).equal(q.dequantize(dtype)[ids])


def test_wrong_inputs_are_told():
    words, scale = torch.zeros(3, 4, dtype=torch.uint8), torch.ones(3, 1)
    embedding = CodeEmbedding(words, scale, 4, [0.0] * 16, k=8)
    for bad in (-1, 3):
        with pytest.raises(KernelError, match=f"{bad} is no row of an embedding of 3"):
            embedding(torch.tensor([0, bad]))
    with pytest.raises(KernelError, match="float64"):
        embedding(torch.tensor([0]), torch.float64)
    with pytest.raises(KernelError, match="do not fit 4-bit codes"):
        CodeEmbedding(words, scale, 4, [0.0] * 16, k=8, group=4)
