"""Decode attention over packed caches beside torch's: one step's attention, and whole decode steps.

    make bench-attention
    make bench-attention ARGS="--steps 512,2048,8192 --rounds 9"

Attention: one query token over 8192 tokens of the past, in the shapes of a 1.1B and an 8B Llama; the caches of several
layers take turns, more than the processor's caches hold, and the memory's read bandwidth is measured in the same
rounds. torch's scaled_dot_product_attention runs on a bfloat16 cache in the three ways that transformers may call it
(enable_gqa, keys repeated, query heads as queries of their group); the fastest counts.
Steps: a Llama of the 1.1B shape with few layers and random weights, in bfloat16 and in W4A8 (all decoder layers in one
native call); the caches take turns token by token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine_line, table, write_results

import bitgrain
from bitgrain.kernels.attention import attend_dense, attend_packed
from bitgrain.kernels.packed_states import PackedStates
from bitgrain.kernels.probes import measure_bandwidth
from bitgrain.models.fused_blocks import fuse_blocks
from bitgrain.runtime.kv_cache import KVCache, past_argument
from bitgrain.runtime.kv_cache.growing import GrowingCache

SHAPES = ((32, 4, 64), (32, 8, 128))
"""Heads of queries, heads of keys and values, channels."""
BITS = (8, 4, 2)
PLAIN = ("transformers' own", "growing")
"""Caches in bfloat16; the faster one is what others are compared with."""
MEMORY = 96 << 20
"""Bytes that the caches of one kind rotate through."""


def repeated(x: Tensor, times: int) -> Tensor:
    """Keys or values as transformers repeats them for the heads of queries."""
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def measure_attention(heads: int, groups: int, size: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way to compute it: milliseconds, bytes of the cache, GB/s."""
    made = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, 1, size, generator=made).bfloat16()
    keys, values = torch.randn(2, 1, groups, tokens, size, generator=made).bfloat16().unbind()
    scaling, shared = size**-0.5, heads // groups
    nbytes = keys.nbytes + values.nbytes
    plain = [(keys.clone(), values.clone()) for _ in range(max(2, MEMORY // nbytes))]
    sdpa = scaled_dot_product_attention
    ways: dict[str, tuple[Callable[[Any, Any], Tensor], list[Any], int]] = {
        "torch, enable_gqa": (lambda k, v: sdpa(query, k, v, enable_gqa=True), plain[:2], nbytes),
        "torch, repeated": (lambda k, v: sdpa(query, repeated(k, shared), repeated(v, shared)), plain[:2], nbytes),
        "torch, heads as queries": (lambda k, v: sdpa(query.view(1, groups, shared, size), k, v), plain, nbytes),
        "bitgrain bf16": (lambda k, v: attend_dense(query, k, v, scaling=scaling), plain, nbytes),
    }
    for bits in BITS:
        caches: list[Any] = []
        while sum(k.nbytes + v.nbytes for k, v in caches) < MEMORY:
            sides = [PackedStates(1, groups, size, bits, values=which) for which in (False, True)]
            sides[0].append(keys)
            sides[1].append(values)
            caches.append(sides)
        held = sum(one.nbytes for one in caches[0])
        ways[f"bitgrain int{bits}"] = (lambda k, v: attend_packed(query, k, v, scaling=scaling), caches, held)
    memory, read = torch.ones(2 * MEMORY, dtype=torch.uint8), list[float]()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        read.append(measure_bandwidth(memory, torch.get_num_threads()))
        for name, (run, past, _) in ways.items():
            began = time.perf_counter()
            for k, v in past:
                run(k, v)
            times[name].append((time.perf_counter() - began) / len(past))
    bandwidth = statistics.median(read)
    medians = {name: statistics.median(times[name]) for name in ways}
    best = min(took for name, took in medians.items() if name.startswith("torch"))
    return [
        {
            "shape": [heads, groups, size], "tokens": tokens, "way": name, "ms": 1e3 * medians[name], "bytes": held,
            "speedup": best / medians[name], "bandwidth": held / medians[name] / bandwidth,
            "memory_gbs": bandwidth / 1e9,
        }
        for name, (_, _, held) in ways.items()
    ]  # fmt: skip


def filled(cache: Any, config: LlamaConfig, tokens: int) -> Any:
    """The cache with random keys and values."""
    made = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        for start in range(0, tokens, 512):
            shape = (1, config.num_key_value_heads, min(512, tokens - start), config.head_dim)
            cache.update(*(torch.randn(shape, generator=made).bfloat16() for _ in range(2)), layer)
    return cache


@torch.inference_mode()
def measure_steps(layers: int, tokens: int, rounds: int, weights: str) -> list[dict[str, Any]]:
    """One row for each cache: milliseconds of a decode step. weights: "bfloat16" or "W4A8"."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=16384,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    if weights != "bfloat16":
        bitgrain.quantize_(model, "w4a8", execution="kernels")
        fuse_blocks(model)
    kinds: dict[str, Callable[[], Any]] = {
        "transformers' own": lambda: DynamicCache(config=config),
        "growing": lambda: GrowingCache(config),
        **{f"int{bits}": lambda bits=bits: KVCache(f"int{bits}", config) for bits in BITS},
    }
    caches = {name: filled(make(), config, tokens) for name, make in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, cache in caches.items():
            began = time.perf_counter()
            model(input_ids=torch.tensor([[turn]]), use_cache=True, **{past_argument(model): cache})
            if turn:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    plain = min(statistics.median(times[name]) for name in PLAIN)
    return [
        {"weights": weights, "tokens": tokens, "layers": layers, "cache": name, "ms": statistics.median(took)}
        | {"of_plain": statistics.median(took) / plain}
        for name, took in times.items()
    ]


def report(attention: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    first = [
        [
            "{}/{} heads of {}".format(*row["shape"]), row["way"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}",
            f"{row['bytes'] / row['ms'] / 1e6:.1f}", f"{100 * row['bandwidth']:.0f} %",
        ]
        for row in attention
    ]  # fmt: skip
    second = [
        [row["weights"], str(row["tokens"]), row["cache"], f"{row['ms']:.2f}", f"{row['of_plain']:.2f}"]
        for row in steps
    ]
    return (
        "# Decode attention\n\n"
        f"{machine_line()}, {torch.get_num_threads()} threads. One query token over {attention[0]['tokens']} tokens; "
        "medians, and the read bandwidth of memory in the same rounds "
        f"({statistics.median(row['memory_gbs'] for row in attention):.0f} GB/s).\n\n"
        + table(["shape", "way", "ms", "times the best of torch", "GB/s", "of memory's"], first)
        + f"\nA whole decode step of a random Llama with {steps[0]['layers']} layers of the 1.1B shape.\n\n"
        + table(["weights", "tokens held", "cache", "ms a step", "of the best bfloat16 cache"], second)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the past, for attention alone")
    parser.add_argument("--steps", default="512,2048,8192", help="tokens held in whole steps, with commas between them")
    parser.add_argument("--layers", type=int, default=4, help="of the model in whole steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="attention", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    attention: list[dict[str, Any]] = []
    for heads, groups, size in SHAPES:
        attention += measure_attention(heads, groups, size, arguments.tokens, arguments.rounds)
    steps: list[dict[str, Any]] = []
    for weights in ("bfloat16", "W4A8"):
        for tokens in map(int, arguments.steps.split(",")):
            turns = arguments.rounds * (3 if weights == "bfloat16" else 20)
            steps += measure_steps(arguments.layers, tokens, turns, weights)
    write_results(arguments.name, {"attention": attention, "steps": steps}, report(attention, steps))


if __name__ == "__main__":
    main()
