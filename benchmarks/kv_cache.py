"""Decoding with a quantized KV cache beside a plain one: time of a token, and bytes held beside bytes predicted.

    make bench-kv-cache
    make bench-kv-cache ARGS="--tokens 1024,8192 --schemes int8,kivi-int4"

A Llama of 1.1 billion random parameters in float32. The past is filled with random keys and values, since their
numbers do not matter here, then tokens are decoded one by one; the schemes take turns, token by token, so that all see
the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine_line, table, write_results

from bitgrain.models.past import Past
from bitgrain.pipeline.context import count_bytes
from bitgrain.runtime.kv_cache import SCHEMES, KVCache, past_argument

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
}
PIECE = 512


def filled(cache: Cache, tokens: int) -> Cache:
    """The cache with random keys and values, the same for every cache."""
    generator = torch.Generator().manual_seed(0)
    size = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    for layer in range(SHAPE["num_hidden_layers"]):
        for start in range(0, tokens, PIECE):
            shape = (1, SHAPE["num_key_value_heads"], min(PIECE, tokens - start), size)
            keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
            cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def measure(model: LlamaForCausalLM, names: list[str], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each cache; "none" is transformers' own."""
    config = model.config
    caches = {n: filled(DynamicCache(config=config) if n == "none" else KVCache(n, config), tokens) for n in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, cache in caches.items():
            began = time.perf_counter()
            model(input_ids=torch.tensor([[turn]]), use_cache=True, **{past_argument(model): cache})
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    past = [Past(SHAPE["num_key_value_heads"], 64, 64, None)] * SHAPE["num_hidden_layers"]
    plain = statistics.median(times["none"])
    rows: list[dict[str, Any]] = []
    for name, cache in caches.items():
        now = cache.get_seq_length()
        row: dict[str, Any] = {"tokens": tokens, "cache": name, "ms_per_token": 1000 * statistics.median(times[name])}
        row["ratio"] = row["ms_per_token"] / 1000 / plain
        if isinstance(cache, KVCache):
            row["bytes"], row["predicted"] = cache.nbytes, count_bytes(SCHEMES[name], past, now, torch.float32)
            row["allocated"] = sum(layer.allocated for layer in cache.layers)
        else:
            row["bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    header = ["tokens held", "cache", "ms a token", "of none", "held MB", "of predicted", "memory, of predicted"]
    lines = [
        [
            str(row["tokens"]),
            row["cache"],
            f"{row['ms_per_token']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            *(
                [f"{row[key] / row['predicted']:.4f}" for key in ("bytes", "allocated")]
                if "predicted" in row
                else ["", ""]
            ),
        ]
        for row in rows
    ]
    return (
        "# KV cache: time and memory\n\n"
        f"{machine_line()}, {torch.get_num_threads()} threads. A random Llama of 1.1 billion float32 parameters, keys "
        "and values of the given number of tokens, then tokens decoded one by one, all caches in turn; medians.\n\n"
        + table(header, lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1024,8192", help="numbers of tokens held, with commas between them")
    parser.add_argument("--schemes", default="int8,int4,kivi-int4,kivi-int2,fp8", help="with commas between them")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--name", default="kv-cache", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    rows: list[dict[str, Any]] = []
    for tokens in map(int, arguments.tokens.split(",")):
        rows += measure(model, ["none", *arguments.schemes.split(",")], tokens, arguments.rounds)
    write_results(arguments.name, {"shape": SHAPE, "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
