"""Writes a Llama of random weights, tensor by tensor: something large to measure speed and memory with.

    python tools/make_random_llama.py OUT               # 1.1 billion parameters, 2.2 GB, the shape of TinyLlama 1.1B
    python tools/make_random_llama.py OUT --blocks 4    # the same with fewer blocks
    python tools/make_random_llama.py OUT --size tiny   # 3 million parameters

The weights are normal numbers of a usual size with a few large input channels, so that scales and errors are lifelike;
the model says nothing. There is no tokenizer. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.shard_writer import ShardWriter
from bitgrain.checkpoints.shards import TensorSpec, plan_shards

SIZES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 2048,
    },
}
SHARDS = 4


def tensor_specs(shape: dict[str, Any]) -> list[TensorSpec]:
    """Every tensor of the checkpoint, bfloat16, in the order of the model."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {
        "model.embed_tokens": (shape["vocab_size"], hidden),
        **{f"model.layers.{i}.{name}": dims for i in range(shape["num_hidden_layers"]) for name, dims in block.items()},
        "model.norm": (hidden,),
        "lm_head": (shape["vocab_size"], hidden),
    }
    return [TensorSpec(f"{name}.weight", torch.bfloat16, dims) for name, dims in shapes.items()]


def random_tensors(specs: list[TensorSpec], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time: norms near 1; matrices normal, every 256th input channel four times as large."""
    generator = torch.Generator().manual_seed(seed)
    for spec in specs:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if len(spec.shape) == 1:
            tensor.normal_(1.0, 0.05, generator=generator)
        else:
            tensor.normal_(0.0, 1 / math.sqrt(spec.shape[-1]), generator=generator)
            tensor[:, ::256] *= 4
        yield spec.name, tensor


def write_random_llama(out: Path, size: str, seed: int = 0, blocks: int | None = None) -> int:
    """Write the model of `size` into the new folder `out`; bytes of its weights. blocks: in place of the size's own."""
    shape = {**SIZES[size], **({} if blocks is None else {"num_hidden_layers": blocks})}
    specs = tensor_specs(shape)
    total = sum(spec.nbytes for spec in specs)
    layouts = plan_shards(specs, math.ceil(total / (SHARDS - 1)))
    out.mkdir(parents=True)
    with ShardWriter(out, layouts) as writer:
        for name, tensor in random_tensors(specs, seed):
            writer.write(name, tensor)
        writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--size", choices=sorted(SIZES), default="1.1b")
    parser.add_argument("--blocks", type=int, help="in place of those of the size")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already")
    nbytes = write_random_llama(arguments.out, arguments.size, arguments.seed, arguments.blocks)
    print(f"{arguments.out}: {nbytes / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
