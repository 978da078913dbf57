"""Packed keys and values: what is read back, in which pieces it came, what is dropped, and never rounded twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError
from bitgrain.numerics import quantize
from bitgrain.runtime.kv_cache.held import Held
from bitgrain.runtime.kv_cache.schemes import SCHEMES, CacheScheme

DYNAMIC = [name for name in SCHEMES if name != "fp8"]


def held(scheme: CacheScheme, keys: bool = True) -> Held:
    spec = scheme.keys if keys else scheme.values
    scale = None if spec.dynamic else torch.full((1, 1), 0.02)
    return Held(spec, recent=scheme.recent, step=scheme.step, scale=scale)


def states(tokens: int, seed: int = 0, batch: int = 2, heads: int = 3, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, size, generator=generator) + torch.arange(size) / 16


def expected(x: torch.Tensor, scheme: CacheScheme, keys: bool) -> torch.Tensor:
    """Each head on its own, by `quantize`, as far as the scheme rounds."""
    spec = scheme.keys if keys else scheme.values
    whole = max(0, x.shape[2] - scheme.recent) // scheme.step * scheme.step
    out = x.clone()
    scale = None if spec.dynamic else torch.full((1, 1), 0.02)
    for row in range(x.shape[0]):
        for head in range(x.shape[1]):
            if whole:
                out[row, head, :whole] = quantize(x[row, head, :whole], spec, scale=scale).dequantize()
    return out


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_what_is_read_back_is_what_quantize_gives(name: str, keys: bool):
    scheme, x = SCHEMES[name], states(150)
    one = held(scheme, keys)
    one.append(x)
    again = one.append(x[:, :, :0])
    torch.testing.assert_close(again, expected(x, scheme, keys), rtol=1e-6, atol=1e-6)
    assert one.tokens == 150


@pytest.mark.parametrize("name", list(SCHEMES))
@given(pieces=st.lists(st.integers(1, 70), min_size=1, max_size=8), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_pieces_do_not_matter(name: str, pieces: list[int], seed: int):
    """What is held depends on the tokens, not on how they came; each call sees at least what is held before it."""
    scheme, x = SCHEMES[name], states(sum(pieces), seed)
    one, at = held(scheme), 0
    for piece in pieces:
        seen = one.append(x[:, :, at : at + piece])
        at += piece
        assert seen.shape[2] == one.tokens == at
    whole = held(scheme)
    whole.append(x)
    torch.testing.assert_close(one.append(x[:, :, :0]), whole.append(x[:, :, :0]), rtol=0, atol=0)
    assert one.nbytes == whole.nbytes


@pytest.mark.parametrize("name", list(SCHEMES))
def test_bytes_are_as_predicted_and_packed(name: str):
    scheme, x = SCHEMES[name], states(300, size=64)
    keys, values = held(scheme), held(scheme, keys=False)
    for at in range(0, 300, 7):
        keys.append(x[:, :, at : at + 7])
        values.append(x[:, :, at : at + 7])
    total = keys.nbytes + values.nbytes
    assert total == 2 * 3 * scheme.count_bytes(300, 64, 64, torch.float32)
    packed = 300 - scheme.recent - scheme.step if scheme.recent else 300
    bits = 8 * total / x.numel() / 2
    assert bits < scheme.keys.format.bits * packed / 300 + 32 * (300 - packed) / 300 + 1.1  # scales: at most a bit


def test_every_number_type_is_given_back():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in SCHEMES:
            one = held(SCHEMES[name])
            one.append(states(100).to(dtype))
            again = one.append(states(3).to(dtype))
            assert again.dtype == dtype
            assert again.shape[2] == 103


@pytest.mark.parametrize("name", list(SCHEMES))
@given(steps=st.lists(st.tuples(st.sampled_from(["append", "crop", "drop"]), st.integers(1, 90)), max_size=10))
@settings(max_examples=25, deadline=None)
def test_what_is_dropped_is_gone_and_the_rest_stays(name: str, steps: list[tuple[str, int]]):
    """Against a plain list of tokens: lengths agree, and each token is its own value, rounded at most once."""
    scheme = SCHEMES[name]
    one = held(scheme)
    plain, seed = states(0), 0
    one.append(states(40, 99))
    plain = states(40, 99)
    for what, count in steps:
        if what == "append":
            seed += 1
            more = states(count, seed)
            one.append(more)
            plain = torch.cat([plain, more], dim=2)
        elif what == "crop":
            count = min(count, plain.shape[2])
            one.crop(count)
            plain = plain[:, :, : plain.shape[2] - count]
        else:
            count = min(count, plain.shape[2])
            one.drop_oldest(count)
            plain = plain[:, :, count:]
        assert one.tokens == plain.shape[2]
    seen = one.append(states(0))
    again = one.append(states(0))
    assert torch.equal(seen, again)
    step = {8: 0.05, 4: 0.6, 2: 3.0}[scheme.keys.format.bits] if name != "fp8" else 0.4
    if plain.shape[2]:
        assert float((seen - plain).abs().max()) < step  # a wrong token would be off by several


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_batch_may_change(name: str):
    scheme, x = SCHEMES[name], states(100)
    one = held(scheme)
    one.append(x)
    before = one.append(x[:, :, :0])
    one.select(torch.tensor([1, 1, 0]))
    assert torch.equal(one.append(x[:1, :, :0].expand(3, -1, -1, -1)), before[[1, 1, 0]])
    one.repeat(2)
    assert torch.equal(one.append(x[:1, :, :0].expand(6, -1, -1, -1)), before[[1, 1, 1, 1, 0, 0]])


def test_memory_is_taken_in_pieces_and_given_back():
    one = held(SCHEMES["int8"])
    for _ in range(40):
        one.append(states(50))
        one.drop_oldest(max(0, one.tokens - 60))
    assert one._codes is not None
    assert len(one._codes) <= 256
    assert one.tokens == 60


def test_numbers_that_are_none():
    one = held(SCHEMES["int8"])
    with pytest.raises(NumericsError, match="keys or values of a cache holds 1 NaN"):
        one.append(states(3).index_fill(2, torch.tensor([1]), 0.0).put_(torch.tensor([5]), torch.tensor([torch.nan])))
