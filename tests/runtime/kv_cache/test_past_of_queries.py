"""Keys and values in name only: attention reads the packed codes, everything else the numbers."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import zoo
from bitgrain.errors import ModelError, NumericsError
from bitgrain.kernels.native import is_available
from bitgrain.runtime.kv_cache import KVCache, past, past_argument, tiled
from bitgrain.runtime.kv_cache.layers import QuantizedLayer, QuantizedSlidingLayer
from bitgrain.runtime.kv_cache.past import Past
from bitgrain.runtime.kv_cache.schemes import SCHEMES
from bitgrain.runtime.operators import find_operator

if not is_available():
    pytest.skip("the native module is not built", allow_module_level=True)


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, tokens, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each run of the kernel has read."""
    found = list[int]()

    def count(operation: str, formats: tuple[str, ...], device: str) -> Any:
        row = find_operator(operation, formats, device)

        class Counted:
            @staticmethod
            def kernel(*args: Any, **kwargs: Any) -> Any:
                found.append(kwargs["place"][1])
                return row.kernel(*args, **kwargs)

        return Counted

    monkeypatch.setattr(past, "find_operator", count)
    return found


def test_is_a_tensor_to_everyone(calls: list[int]):
    layer = QuantizedLayer(SCHEMES["int8"])
    layer.update(states(30), states(30, 1))
    keys, values = layer.update(states(3, 2), states(3, 3))
    assert isinstance(keys, Past)
    assert (keys.shape, keys.dtype, keys.device.type, keys.ndim) == ((2, 2, 33, 32), torch.float32, "cpu", 4)
    numbers = keys.numbers()
    assert not isinstance(numbers, Past)
    assert torch.equal(keys + 0, numbers)
    assert torch.equal(torch.cat([keys, values])[:2], numbers)
    assert torch.equal(keys[:, :, -1], numbers[:, :, -1])
    q = torch.randn(2, 4, 3, 32)
    expected = scaled_dot_product_attention(q, numbers, values.numbers(), enable_gqa=True)
    assert not calls
    torch.testing.assert_close(scaled_dot_product_attention(q, keys, values, enable_gqa=True), expected)
    assert calls == [33]
    causal = scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)  # the kernel does not
    assert calls == [33]
    assert causal.shape == expected.shape


def test_a_past_that_is_gone_is_told():
    layer = QuantizedLayer(SCHEMES["int4"])
    keys, _ = layer.update(states(5), states(5))
    assert isinstance(keys, Past)
    before = keys.numbers()
    layer.update(states(200, 1), states(200, 1))
    assert torch.equal(keys.numbers(), before)  # what was added behind it changes nothing
    layer.crop(-203)
    with pytest.raises(ModelError, match="returned before the cache was cropped"):
        keys.sum()


def test_a_window_shows_what_it_drops(calls: list[int]):
    layer = QuantizedSlidingLayer(SCHEMES["int8"], 9)
    layer.update(states(100), states(100))
    keys, values = layer.update(states(2, 1), states(2, 1))
    assert keys.shape[2] == 10
    assert layer.held_keys.tokens == 8
    q = torch.randn(2, 2, 1, 32)
    expected = scaled_dot_product_attention(q, keys + 0, values + 0)
    torch.testing.assert_close(scaled_dot_product_attention(q, keys, values), expected)
    assert calls == [10]


@pytest.mark.parametrize("scheme", ["int8", "int4", "int2"])
@torch.no_grad()
def test_decoding_reads_packed_codes_only(scheme: str, calls: list[int], monkeypatch: pytest.MonkeyPatch):
    """The logits are those of dequantized keys and values."""
    model: Any = zoo.build("llama").eval()
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = list[torch.Tensor]()
    for served in (True, False):
        if not served:
            monkeypatch.setattr("bitgrain.runtime.kv_cache.layers.is_served", lambda *_: False)
        cache = KVCache(scheme, model.config)
        with monkeypatch.context() as inside:
            for first, last in ((0, 30), *((at, at + 1) for at in range(30, 40))):
                past_of: dict[str, Any] = {past_argument(model): cache}
                logits = model(input_ids=ids[:, first:last], attention_mask=mask[:, :last], **past_of).logits
                inside.setattr(tiled.Tiled, "newest", None)  # nothing is unpacked from now on
        found.append(logits)
    assert len(calls) == 10 * model.config.num_hidden_layers
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_cache_can_be_copied():
    cache = KVCache("int4", zoo.build("llama").config)
    cache.update(states(70), states(70, 1), 0)
    twin = copy.deepcopy(cache)
    cache.update(states(1, 2), states(1, 2), 0)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (70, 71)


def test_numbers_that_are_none():
    layer = QuantizedLayer(SCHEMES["int8"])
    with pytest.raises(NumericsError, match=r"keys or values of a cache holds 512 NaN.*: run the model in bfloat16"):
        layer.update(states(4).mul(torch.nan), states(4))
