"""A decoder block equals its products, norms and activations one by one, bit for bit, whatever its weights are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import LEVELS, level
from torch import Tensor

from bitgrain.kernels.code_linear import CodeLinear
from bitgrain.kernels.decoder import AttentionPart, DecoderBlock, MlpPart, Weight
from bitgrain.kernels.decoder_caches import DenseCache
from bitgrain.kernels.dense_rows import DenseLinear
from bitgrain.kernels.int_linear import IntInputs, IntLinear
from bitgrain.kernels.rows import RowNorm, gated
from bitgrain.numerics.formats import FP4_E2M1, get_format

pytest.importorskip("bitgrain._native", reason="the native module was not built")
NF4 = get_format("nf4").grid().tolist()
E2M1 = FP4_E2M1.decode(torch.arange(16, dtype=torch.uint8)).tolist()
HIDDEN, HEADS, KV_HEADS, SIZE, WIDTH = 96, 4, 2, 24, 144
KINDS = (
    "W4A16", "W4A16 asymmetric", "W3A16", "W8A16", "NF4", "MXFP4", "NVFP4", "W4A8", "W4A8 asymmetric", "W8A8",
    "W8A8 static", "dense float32", "dense bfloat16", "dense float16",
)  # fmt: skip


def weight_of(kind: str, n: int, k: int, made: torch.Generator) -> Weight:
    def scales(group: int) -> Tensor:
        return 0.02 + 0.02 * torch.rand(n, -(-k // group), generator=made)

    if kind.startswith("dense"):
        weight, bias = torch.randn(n, k, generator=made) / 8, torch.randn(n, generator=made)
        return DenseLinear(weight.to(getattr(torch, kind.split()[1])), bias)
    bits = 8 if "8A" in kind else 3 if "3A" in kind else 4
    codes = torch.randint(0, 2**bits, (n, k), generator=made).to(torch.uint8)
    bias = torch.randn(n, generator=made) if bits == 8 else None
    zero = torch.randint(0, 16, (n, -(-k // 32)), generator=made).to(torch.uint8) if "asymmetric" in kind else None
    if "A8" in kind:
        static = "static" in kind
        inputs = IntInputs(0, 255, scales=(0.02,), zeros=(120,)) if static else IntInputs()
        if bits == 8:
            return IntLinear.pack(codes.view(torch.int8), scales(k) / 16, 8, inputs, bias=bias)
        lengths = [min(32, k - first) for first in range(0, k, 32)]
        return IntLinear.pack(codes, scales(32), 4, inputs, lengths=lengths, zero=8 if zero is None else zero)
    if kind == "NF4":
        return CodeLinear.pack(codes, scales(16), 4, NF4, group=16)
    if kind == "MXFP4":
        return CodeLinear.pack(codes, scales(32).to(torch.float8_e8m0fnu), 4, E2M1, group=32)
    if kind == "NVFP4":
        return CodeLinear.pack(codes, (8 * scales(16)).to(torch.float8_e4m3fn), 4, E2M1, group=16, outer=0.125)
    if bits == 8:
        return CodeLinear.pack(codes.view(torch.int8), scales(k) / 16, 8, None, bias=bias)
    table = range(16) if zero is not None else range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return CodeLinear.pack(codes, scales(32).bfloat16(), bits, table, group=32, zero=zero)


def block_of(kinds: list[str], made: torch.Generator) -> DecoderBlock:
    """kinds: of q, k, v, o, gate, up and down."""
    q, kv = HEADS * SIZE, KV_HEADS * SIZE
    shapes = ((q, HIDDEN), (kv, HIDDEN), (kv, HIDDEN), (HIDDEN, q), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    w = [weight_of(kind, n, k, made) for kind, (n, k) in zip(kinds, shapes, strict=True)]
    norms = [RowNorm(HIDDEN, torch.rand(HIDDEN, generator=made), eps=1e-6) for _ in range(2)]
    attention = AttentionPart(norms[0], (w[0], w[1], w[2]), w[3], HEADS, KV_HEADS, SIZE, "none", SIZE**-0.5)
    return DecoderBlock(attention, MlpPart(norms[1], (w[4], w[5]), w[6], "silu"))


def expected_start(block: DecoderBlock, x: Tensor) -> Tensor:
    part = block.attention
    normed = part.norm(x.float())
    return torch.cat([one(normed) for one in part.qkv], -1).to(x.dtype)


def expected_finish(block: DecoderBlock, x: Tensor, attended: Tensor) -> Tensor:
    part = block.mlp
    assert part is not None
    h = x.float() + block.attention.o(attended.float())
    normed = part.norm(h)
    gate, up = (one(normed).to(x.dtype) for one in part.gate_up)
    return (h + part.down(gated(gate.float(), up.float(), part.act))).to(x.dtype)


@pytest.mark.parametrize("isa", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    kinds=st.one_of(
        st.sampled_from(KINDS).map(lambda kind: [kind] * 7), st.lists(st.sampled_from(KINDS), min_size=7, max_size=7)
    ),
    m=st.sampled_from([1, 2, 5, 7, 8, 13, 17, 60]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_equals_its_parts_bit_for_bit(isa: str, kinds: list[str], m: int, dtype: torch.dtype, seed: int):
    made = torch.Generator().manual_seed(seed)
    block = block_of(kinds, made)
    x = torch.randn(1, m, HIDDEN, generator=made).to(dtype)
    attended = torch.randn(1, m, HEADS * SIZE, generator=made).to(dtype)
    with level(isa):
        start, finish = block.start(x, None, None), block.finish(x, attended)
        assert start.equal(expected_start(block, x))
        assert finish.equal(expected_finish(block, x, attended))


@pytest.mark.parametrize("isa", LEVELS)
@settings(max_examples=10, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=7, max_size=7),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_whole_block_equals_torch_attention_between_its_parts(
    isa: str, kinds: list[str], batch: int, tokens: int, seed: int
):
    made = torch.Generator().manual_seed(seed)
    block, past = block_of(kinds, made), 5
    x = torch.randn(batch, tokens, HIDDEN, generator=made)
    keys, values = torch.randn(2, batch, KV_HEADS, past + tokens, SIZE, generator=made)
    with level(isa):
        parts = expected_start(block, x).split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], -1)
        q, k, v = (one.unflatten(-1, (-1, SIZE)).transpose(1, 2) for one in parts)
        all_keys, all_values = torch.cat([keys[:, :, :past], k], 2), torch.cat([values[:, :, :past], v], 2)
        seen = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, all_keys, all_values, attn_mask=seen, enable_gqa=True
        )
        y = block.run(x, None, None, DenseCache(keys, values))
        assert y is not None
        assert keys.equal(all_keys)
        assert values.equal(all_values)
        wanted = expected_finish(block, x, attended.transpose(1, 2).flatten(2))
    # last bits of attention may move an input of o to the next code
    assert ((y - wanted).abs() <= 0.02 * wanted.abs().max()).all()
