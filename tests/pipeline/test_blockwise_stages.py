"""The stages of a block: what reads one input, in which order, and what writes into the residual stream."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import zoo
from bitgrain.models.stream import Call
from bitgrain.pipeline.blockwise.stages import BLOCK_INPUT, Stage, find_stages
from block_zoo import open_block

pytestmark = pytest.mark.usefixtures("device")

Tiny = Callable[[str], Path]

QKV = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
OUT, DOWN = "self_attn.o_proj.weight", "mlp.down_proj.weight"
ATTENTION = [Stage(QKV, True), Stage((OUT,), True, {OUT: BLOCK_INPUT})]
EXPERTS = [Stage(("mlp.experts.gate_up_proj",), False), Stage(("mlp.experts.down_proj",), False)]
GATED = [*ATTENTION, Stage(("mlp.gate_proj.weight", "mlp.up_proj.weight"), True), Stage((DOWN,), True, {DOWN: OUT})]
OPT_OUT = "self_attn.out_proj.weight"
BERT_OUT = "attention.output.dense.weight"

EXPECTED = {
    "llama": GATED,
    "gemma": GATED,
    "qwen3": GATED,
    "phi3": [
        Stage(("self_attn.qkv_proj.weight",), True),
        Stage((OUT,), True, {OUT: BLOCK_INPUT}),
        Stage(("mlp.gate_up_proj.weight",), True),
        Stage((DOWN,), True, {DOWN: OUT}),
    ],
    # attention and MLP side by side; their outputs are added to each other first, and so to no stream
    "phi": [
        Stage((*QKV, "mlp.fc1.weight"), True),
        Stage(("self_attn.dense.weight",), True),
        Stage(("mlp.fc2.weight",), True),
    ],
    "gpt2": [
        Stage(("attn.c_attn.weight",), True),
        Stage(("attn.c_proj.weight",), True, {"attn.c_proj.weight": BLOCK_INPUT}),
        Stage(("mlp.c_fc.weight",), True),
        Stage(("mlp.c_proj.weight",), True, {"mlp.c_proj.weight": "attn.c_proj.weight"}),
    ],
    "opt": [
        Stage(QKV, True),
        Stage((OPT_OUT,), True, {OPT_OUT: BLOCK_INPUT}),
        Stage(("fc1.weight",), True),
        Stage(("fc2.weight",), True, {"fc2.weight": OPT_OUT}),
    ],
    # a norm stands between the first sum and the second: the stream is another one
    "bert": [
        Stage(tuple(f"attention.self.{part}.weight" for part in ("query", "key", "value")), True),
        Stage((BERT_OUT,), True, {BERT_OUT: BLOCK_INPUT}),
        Stage(("intermediate.dense.weight",), True),
        Stage(("output.dense.weight",), True),
    ],
    "mixtral": [*ATTENTION, *EXPERTS],
    "gpt-oss": [*ATTENTION, *EXPERTS],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_stages(tiny: Tiny, name: str):
    block = open_block(tiny(name), index=1, batches=1)
    assert block.stages() == EXPECTED[name]


def test_only_what_is_asked_for(tiny: Tiny):
    """Layers that are kept are no part of any stage, and a sum with them ends the known stream."""
    block = open_block(tiny("llama"), batches=1)
    block.names = ["self_attn.v_proj.weight", "mlp.up_proj.weight", DOWN]
    assert block.stages() == [
        Stage(("self_attn.v_proj.weight",), True),
        Stage(("mlp.up_proj.weight",), True),
        Stage((DOWN,), True),
    ]


class Choosing(nn.Module):
    """Experts as a list of modules, of which the first batch chooses only the second; and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({k: nn.Linear(4, 4) for k in ("up", "down")}) for _ in range(3))
        self.idle = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        expert = self.experts[1]
        return hidden + expert["down"](expert["up"](hidden).relu())  # type: ignore[index]


def test_experts_in_a_list_and_layers_without_use():
    block = Choosing()
    names = [f"experts.{i}.{part}.weight" for i in range(3) for part in ("up", "down")] + ["idle.weight"]
    up, down, idle = find_stages(block, names, torch.randn(2, 3, 4), Call((), {}))
    assert set(up.names) == {f"experts.{i}.up.weight" for i in range(3)}
    assert set(down.names) == {f"experts.{i}.down.weight" for i in range(3)}
    assert not up.shared
    assert not down.shared
    assert (up.reached, down.reached, idle.reached) == (True, True, False)
    assert idle == Stage(("idle.weight",), False, reached=False)


def test_a_scaled_output_is_not_written_as_it_is(tmp_path: Path):
    """Granite multiplies what goes into the stream: a target for the stream would have to be scaled, too."""
    settings = {**zoo.GROUPED, "residual_multiplier": 0.5}
    torch.manual_seed(0)
    transformers.GraniteForCausalLM(transformers.GraniteConfig(**settings)).save_pretrained(tmp_path / "granite")
    stages = open_block(tmp_path / "granite", batches=1).stages()
    assert [stage.names for stage in stages] == [stage.names for stage in GATED]
    assert all(not stage.residual for stage in stages)
