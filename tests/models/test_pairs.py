"""Pairs are found in real blocks of many architectures, and nothing that would change the output is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bitgrain.models.pairs import find_pairs, gain_of
from bitgrain.models.trace import trace
from block_views import Blocks, build

QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
LLAMA = {
    "input_layernorm": QKV,
    "post_attention_layernorm": GATE_UP,
    "self_attn.v_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.up_proj.weight": ("mlp.down_proj.weight",),
}
MOE = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ("mlp.gate.weight", "mlp.experts.gate_up_proj"),
    "self_attn.v_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.experts.gate_up_proj": ("mlp.experts.down_proj",),
}
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": LLAMA,
    "qwen3": LLAMA,  # norms of q and k are none
    "gemma": LLAMA,
    "mixtral": MOE,
    "qwen3-moe": MOE,
    "phi3": {
        "input_layernorm": ("self_attn.qkv_proj.weight",),
        "post_attention_layernorm": ("mlp.gate_up_proj.weight",),
        "self_attn.qkv_proj.weight": ("self_attn.o_proj.weight",),
        "mlp.gate_up_proj.weight": ("mlp.down_proj.weight",),
    },
    "gpt2": {  # GELU hands on no scale
        "ln_1": ("attn.c_attn.weight",),
        "ln_2": ("mlp.c_fc.weight",),
        "attn.c_attn.weight": ("attn.c_proj.weight",),
    },
    "opt": {  # ReLU does
        "self_attn_layer_norm": QKV,
        "final_layer_norm": ("fc1.weight",),
        "self_attn.v_proj.weight": ("self_attn.out_proj.weight",),
        "fc1.weight": ("fc2.weight",),
    },
    "phi": {  # attention and MLP side by side read one norm
        "input_layernorm": (*QKV, "mlp.fc1.weight"),
        "self_attn.v_proj.weight": ("self_attn.dense.weight",),
    },
    "bert": {"attention.self.value.weight": ("attention.output.dense.weight",)},  # norms are added to, too
    "gpt-oss": {  # (up + 1) x glu hands on no scale
        "input_layernorm": QKV,
        "post_attention_layernorm": ("mlp.router.weight", "mlp.experts.gate_up_proj"),
        "self_attn.v_proj.weight": ("self_attn.o_proj.weight",),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_pairs_of_architectures(name: str):
    block, run = Blocks(build(name)).runner(1)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    pairs = find_pairs(block, lambda: run(0))
    assert {pair.writer: pair.readers for pair in pairs} == EXPECTED[name]
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    by_writer = {pair.writer: pair for pair in pairs}
    attention = next(pair for pair in pairs if pair.mixes)
    assert attention.head == 32
    grouped = name not in ("gpt2", "opt", "phi", "bert")
    assert (attention.repeats, attention.width) == ((2, 64) if grouped else (1, 128))
    for pair in pairs:
        assert pair.offset == (1.0 if name == "gemma" and pair.kind == "norm" else 0.0)
        assert pair.kind == ("norm" if pair.gain else "linear")
        assert pair is attention or not pair.mixes
    if name == "phi3":  # v is the last part of q/k/v, up of gate/up
        assert attention.start == 128 + 64
        assert by_writer["mlp.gate_up_proj.weight"].start == 256
    if name == "gpt2":
        assert attention.start == 256
        assert attention.bias == "attn.c_attn.bias"
        assert attention.transposed == {"attn.c_attn.weight", "attn.c_proj.weight"}
        assert by_writer["ln_1"].bias == "ln_1.bias"


def test_heads_with_rows_of_their_own():
    """GPT-NeoX stores q, k and v of one head next to each other."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )
    model: Any = transformers.GPTNeoXForCausalLM(config).eval()
    block, run = Blocks(model).runner(0)
    pair = next(pair for pair in find_pairs(block, lambda: run(0)) if pair.mixes)
    assert (pair.width, pair.start, pair.span, pair.stride, pair.head) == (64, 32, 16, 48, 16)


def test_outside_the_blocks_the_final_norm_is_found():
    assert [pair.writer for pair in Blocks(build("llama")).outside().stream.norms] == ["model.norm"]
    tied = Blocks(build("llama-tied")).outside().stream
    assert tied.norms == ()
    assert "lm_head is tied with the embeddings" in tied.doubt


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*size) for size in ((8, 12), (8, 12), (12, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class _Mixture(nn.Module):
    """A list of experts, a module each, of which the last is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(_Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        choice = self.gate(y)[..., :2].argmax(-1)
        out = x.clone()
        for index in range(2):
            rows = choice == index
            out[rows] = out[rows] + self.experts[index](y[rows])
        return out


def test_lists_of_experts():
    torch.manual_seed(0)
    block, x = _Mixture(), torch.randn(40, 8)
    pairs = find_pairs(block, lambda: block(x))
    norm = next(pair for pair in pairs if pair.kind == "norm")
    of_experts = {f"experts.{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up")}
    assert set(norm.readers) == {"gate.weight", *of_experts}
    linear = {pair.writer: pair for pair in pairs if pair.kind == "linear"}
    assert {pair.readers[0] for pair in linear.values()} == {f"experts.{i}.down_proj.weight" for i in range(3)}
    assert linear["experts.2.up_proj.weight"].bias == "experts.2.up_proj.bias"


class _Norm(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        y = x / x.square().mean(-1, keepdim=True).sqrt()
        match self.form:
            case "plain":
                return y * self.weight + self.bias
            case "one plus":
                return y * (1 + self.weight) + self.bias
            case "exponent":
                return y * self.weight.exp() + self.bias
            case _:
                return y * self.weight * self.bias


@pytest.mark.parametrize(
    ("form", "found"),
    [
        ("plain", ("weight", 0.0, "bias")),
        ("one plus", ("weight", 1.0, "bias")),
        ("exponent", None),
        ("product", None),
    ],
)
def test_form_of_the_gain(form: str, found: tuple[str, float, str] | None):
    torch.manual_seed(0)
    norm = nn.Sequential(_Norm(form))
    x = torch.randn(5, 6)
    (call,) = trace(norm, lambda: norm(x), (), ["0"]).norms
    with torch.no_grad():
        assert gain_of(norm[0], call) == found


class _Twice(nn.Module):
    """The norm's output is read by a matrix, and added to the stream as well."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.norm, self.read, self.alone = nn.RMSNorm(8), nn.Linear(8, 8), alone

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.read(y) + (0 if self.alone else y)


@pytest.mark.parametrize("alone", [True, False])
def test_output_that_goes_elsewhere_too_is_no_pair(alone: bool):
    torch.manual_seed(0)
    block, x = _Twice(alone), torch.randn(20, 8)
    assert len(find_pairs(block, lambda: block(x))) == alone
