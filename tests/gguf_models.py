"""Tiny models of every architecture that GGUF holds, with what each may have besides, as in `zoo`."""

from __future__ import annotations

from typing import Any

import zoo

_LONG = {"rope_type": "longrope", "short_factor": [1.1] * 16, "long_factor": [1.5] * 16}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: zoo.ZOO[name] for name in ("llama", "llama-tied", "qwen3", "gemma", "phi", "mixtral")},
    "llama-biases": ("LlamaForCausalLM", {**zoo.GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "LlamaForCausalLM",
        {
            **zoo.GROUPED,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                **_LLAMA3,
                "rope_theta": 500000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        {
            **zoo.GROUPED,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama-linear": (
        "LlamaForCausalLM",
        {**zoo.GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("MistralForCausalLM", {**zoo.GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", zoo.GROUPED),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**zoo.ZOO["qwen3-moe"][1], "norm_topk_prob": True}),
    "gemma2": ("Gemma2ForCausalLM", {**zoo.GROUPED, **zoo.HEADS, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**zoo.GROUPED, **zoo.HEADS, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3ForCausalLM", zoo.GROUPED),
    "phi3-long": (
        "Phi3ForCausalLM",
        {
            **zoo.GROUPED,
            "original_max_position_embeddings": 32,
            "rope_parameters": {**_LONG, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32},
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {**zoo.ZOO["gpt2"][1], "bos_token_id": None}),
}
