"""Models whose linear layers hold packed weights: the same logits as dequantized ones, fewer bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitgrain
import zoo
from bitgrain.runtime.low_bit_linear import LowBitLinear, held_nbytes, hold_low_bit_, low_bit_layers

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model(IDS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize(
    ("name", "scheme", "packed"),
    [
        ("llama", "NF4", 14),
        ("llama", "W8A8", 14),
        ("llama", "GGUF_Q4_1", 14),
        ("gpt2", "W4A16", 8),
        ("phi3", "NF4", 8),
        ("mixtral", "NF4", 8),  # experts are 3-D in memory
        ("bert", "W4A16_ASYM", 13),
    ],
)
def test_the_same_logits_as_dequantized(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, scheme: str, packed: int
):
    out = tmp_path / "out"
    bitgrain.quantize(tiny(name), out, scheme)
    dense, low = bitgrain.load(out, execution="dequantize"), bitgrain.load(out, low_bit=True)
    assert len(list(low_bit_layers(low))) == packed
    assert torch.equal(logits(low), logits(dense))
    assert held_nbytes(low) < held_nbytes(dense)
    assert all(p.device.type == "cpu" for p in low.parameters())


def test_a_tied_head_stays_dense(tiny: Callable[[str], Path], tmp_path: Path):
    out = tmp_path / "out"
    bitgrain.quantize(tiny("llama-tied"), out, "W8A16", include=["model.embed_tokens"])
    low: Any = bitgrain.load(out, low_bit=True)
    assert type(low.lm_head) is nn.Linear
    assert low.lm_head.weight is low.model.embed_tokens.weight
    assert torch.equal(logits(low), logits(bitgrain.load(out, execution="dequantize")))


def test_a_head_that_is_quantized_is_packed_and_casts_follow(tiny: Callable[[str], Path], tmp_path: Path):
    out = tmp_path / "out"
    bitgrain.quantize(tiny("llama"), out, "NF4", include=["lm_head"])
    low: Any = bitgrain.load(out, low_bit=True, dtype=torch.bfloat16)
    assert isinstance(low.lm_head, LowBitLinear)
    assert torch.equal(logits(low), logits(bitgrain.load(out, dtype=torch.bfloat16, execution="dequantize")))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_never_holds_the_dense_weights(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "NF4")
    sizes = []

    def spy(model: nn.Module, weights: dict[str, Any], stored: Any) -> list[str]:
        sizes.extend(model.get_submodule(path).weight.untyped_storage().nbytes() for path in weights)
        return hold_low_bit_(model, weights, stored)

    monkeypatch.setattr("bitgrain.pipeline.load.hold_low_bit_", spy)
    bitgrain.load(tmp_path / "out", low_bit=True, dtype=dtype)
    assert len(sizes) == 14
    assert max(sizes) <= 8


def test_a_plain_checkpoint_loads_as_it_is(tiny: Callable[[str], Path]):
    low = bitgrain.load(tiny("llama"), low_bit=True)
    assert not list(low_bit_layers(low))


@pytest.mark.parametrize("scheme", ["NF4", "W4A8"])
def test_in_memory(scheme: str):
    dense, low = zoo.build("qwen3-moe"), zoo.build("qwen3-moe")
    bitgrain.quantize_(dense, scheme)
    left = bitgrain.low_bit_(low, scheme)
    assert set(left) == {f"model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")}
    assert len(list(low_bit_layers(low))) == 8
    assert torch.equal(logits(low), logits(dense))
