"""Models on the device of the jobs: loaded, run, generating, evaluated; what cannot run there says so in one line."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import bitgrain
import bitgrain.hf
import zoo
from bitgrain.errors import SchemeError
from bitgrain.kernels.native import is_available
from bitgrain.runtime.attention import SCHEMES as ATTENTION
from bitgrain.runtime.attention import attention_of, get_attention_scheme
from bitgrain.runtime.kv_cache import SCHEMES, KVCache, past_argument
from bitgrain.runtime.low_bit_linear import low_bit_layers

Tiny = Callable[[str], Path]
NEAR = 1e-4
"""Of the largest logit, in float32: products in another order."""


def place_of(model: Any) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def near(found: torch.Tensor, expected: torch.Tensor, bound: float = NEAR) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))


def numbers_in(found: Any) -> Iterator[float]:
    """All that are finite, wherever they stand."""
    if isinstance(found, (dict, list, tuple)):
        for one in found.values() if isinstance(found, dict) else found:
            yield from numbers_in(one)
    elif isinstance(found, (int, float)) and math.isfinite(found):
        yield float(found)


@torch.no_grad()
def pieces(model: Any, ids: torch.Tensor, past: Any) -> torch.Tensor:
    """Logits of a text that comes in pieces of 1 to 20 tokens, with a cache."""
    parts = ids.to(model.device).split([20, 1, 1, 13, 1], dim=1)
    return torch.cat([model(input_ids=one, use_cache=True, **{past_argument(model): past}).logits for one in parts], 1)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "bert", "mixtral", "gpt-oss"])
def test_a_checkpoint_as_it_is(tiny: Tiny, name: str, device: str):
    model = bitgrain.load(tiny(name), device=device)
    assert place_of(model) == {device}
    ids = zoo.ids_for(model)
    near(zoo.outputs(model, ids), zoo.outputs(bitgrain.load(tiny(name), device="cpu"), ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("scheme", ["W4A16", "NF4", "W8A8", "NVFP4", "FP8_DYNAMIC", "LLM_INT8"])
def test_quantized_and_loaded_there(tiny: Tiny, tmp_path: Path, name: str, scheme: str, device: str):
    """The files are those that the CPU writes. Of rounded inputs some lie between two codes and take the other one:
    relative to the logits' norm, 3 % of 8 bits and 20 % of 4."""
    bitgrain.quantize(tiny(name), tmp_path / "out", scheme, device=device)
    bitgrain.quantize(tiny(name), tmp_path / "cpu", scheme, device="cpu")
    mine, theirs = (zoo.read_tensors(tmp_path / one) for one in ("out", "cpu"))
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    model = bitgrain.load(tmp_path / "out", device=device, execution="dequantize")
    assert place_of(model) == {device}
    ids = zoo.ids_for(model)
    expected = zoo.outputs(bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize"), ids)
    found = zoo.outputs(model, ids)
    if scheme in ("W4A16", "NF4"):
        near(found, expected)
    assert (found - expected).norm() < (0.2 if scheme == "NVFP4" else 0.03) * expected.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_packed_weights_there(tiny: Tiny, tmp_path: Path, name: str, device: str):
    bitgrain.quantize(tiny(name), tmp_path / "out", "W4A16", device=device)
    low = bitgrain.load(tmp_path / "out", device=device, low_bit=True)
    assert list(low_bit_layers(low))
    assert place_of(low) == {device}
    dense = bitgrain.load(tmp_path / "out", device=device, execution="dequantize")
    ids = zoo.ids_for(low)
    near(zoo.outputs(low, ids), zoo.outputs(dense, ids))
    near(zoo.outputs(low.cpu(), ids), zoo.outputs(dense.cpu(), ids))


@pytest.mark.skipif(not is_available(), reason="the native module was not built")
def test_kernels_of_the_cpu_stay_there(tiny: Tiny, tmp_path: Path, device: str):
    if device == "cpu":
        pytest.skip("this is the CPU")
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", device=device)
    with pytest.raises(SchemeError, match=rf"no kernel on {device} for .*execution='dequantize'"):
        bitgrain.load(tmp_path / "out", device=device)
    with pytest.raises(SchemeError, match=r"packed weights run on the CPU, not on .*execution='dequantize'"):
        bitgrain.load(tmp_path / "out", device=device, execution="reference")
    packed = bitgrain.load(tmp_path / "out", device="cpu")
    with pytest.raises(SchemeError, match=r"packed weights run on the CPU, not on .*execution='dequantize'"):
        packed.to(device)


def test_from_pretrained(tiny: Tiny, tmp_path: Path, device: str):
    """On a CPU its kernels round inputs: 2 %."""
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "NF4", device=device)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=device)
    assert model.device.type == device
    ids = zoo.ids_for(model)
    expected = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    near(zoo.outputs(model, ids), zoo.outputs(expected, ids), 0.02 if device == "cpu" else NEAR)
    assert model.generate(ids.to(device), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 27)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_caches(name: str, scheme: str, device: str):
    """In double precision: noise would move numbers over the edge between two codes."""
    model = zoo.build(name).double()
    ids = zoo.ids_for(model, 36)
    expected = pieces(model, ids, KVCache(scheme, model.config))
    model.to(device)
    past = KVCache(scheme, model.config)
    near(pieces(model, ids, past).cpu(), expected)
    for change in (lambda: past.crop(-3), lambda: past.batch_repeat_interleave(2), past.layers[0].offload):
        change()
    past.layers[0].prefetch()
    with torch.no_grad():
        more = model(input_ids=ids[:, :3].repeat_interleave(2, 0).to(device), **{past_argument(model): past}).logits
    assert (more.device.type, past.get_seq_length()) == (device, 36)
    assert torch.equal(more[0], more[1])


def test_generating_with_a_cache_of_the_checkpoint(tiny: Tiny, device: str):
    model: Any = bitgrain.load(tiny("llama"), device=device, kv_cache="kivi-int4")
    ids = zoo.ids_for(model).to(device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
    found = model.generate(ids, **options, num_beams=2)
    plain = model.generate(ids, **options, **{past_argument(model): KVCache("int8", model.config)})
    assert found.shape == plain.shape == (2, 64)


@pytest.mark.parametrize("scheme", ATTENTION)
def test_attention(scheme: str, device: str):
    """Probabilities in a few codes may take the other neighbour: 2 %."""
    model = zoo.build("llama")
    ids = zoo.ids_for(model, 30)
    found: list[torch.Tensor] = []
    for place in ("cpu", device):
        model.to(place)
        with attention_of(model, get_attention_scheme(scheme)), torch.no_grad():
            assert torch.isfinite(pieces(model, zoo.ids_for(model, 36), DynamicCache(config=model.config))).all()
            found.append(zoo.outputs(model, ids))
    near(found[1], found[0], 0.02)


def test_evaluation(readable: Tiny, text: Path, tmp_path: Path, device: str):
    bitgrain.quantize(readable("llama"), tmp_path / "out", "W4A16", device=device)
    settings: dict[str, Any] = {"text": text, "seqlen": 24, "windows": 6, "against": readable("llama")}
    found, expected = (bitgrain.evaluate(tmp_path / "out", device=one, **settings) for one in (device, "cpu"))
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert found.kl == pytest.approx(expected.kl, rel=1e-2)
    checks = bitgrain.verify(tmp_path / "out", against=readable("llama"), device=device)
    assert not [check for check in checks if check.ok is False]


def test_inspection(readable: Tiny, text: Path, device: str):
    """Every figure of every layer, but for the order in which layers that hardly differ are listed."""

    def figures(place: str) -> list[float]:
        found = bitgrain.inspect(readable("llama"), text=text, seqlen=24, windows=2, device=place).to_json()
        return sorted(numbers_in(found))

    assert figures(device) == pytest.approx(figures("cpu"), rel=1e-2, abs=1e-3)


def test_one_block_at_a_time(readable: Tiny, text: Path, tmp_path: Path, device: str):
    """A job of many blocks needs no more of the GPU than one of two: what it has solved is gone from there."""
    if device == "cpu":
        pytest.skip("torch counts what a GPU holds, not what the CPU does")
    peaks: list[int] = []
    for blocks in (2, 2, 10):  # the first time, libraries take memory of their own and keep it
        model = readable("llama", num_hidden_layers=blocks)
        calibration = {"text": str(text), "windows": 2, "seqlen": 24}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        solver = {"name": "gptq", "order": "act"}
        out = tmp_path / str(len(peaks))
        bitgrain.quantize(model, out, "W4A16", solver=solver, calibration=calibration, device=device)
        peaks.append(torch.cuda.max_memory_allocated() - held)
        assert len(peaks) == 1 or torch.cuda.memory_allocated() <= held + 1_000_000
    block = 4 * 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)  # two of them, in float32
    assert peaks[2] < peaks[1] + block
