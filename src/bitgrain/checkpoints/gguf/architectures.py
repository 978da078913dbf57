"""The model architectures that can be said in GGUF: which names, metadata keys and forms of tensors each has.

Tables only: `names` and `config` use them. llama.cpp reads no config.json: what it takes for granted of an architecture
(activations, attention scales, patterns of layers) stands under `fixed`, and a model that has it otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitgrain.checkpoints.gguf import names
from bitgrain.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """One model type of transformers in GGUF.

    name         `general.architecture`; model_type, class_name: in config.json
    templates    names of tensors, see `names`
    keys         metadata key without the architecture -> key of config.json; optional: those that may be missing
    fixed        key of config.json -> values that llama.cpp computes with; a key that is missing counts as the first
    experts      the key that counts experts; empty without experts
    interleaved  rows of q_proj and k_proj in the order of `rotary.interleaved_rows`
    norm_offset  norms multiply by 1 + weight in transformers, and by the stored weight in llama.cpp
    transposed   stems of weights that transformers stores [in, out]
    """

    name: str
    model_type: str
    class_name: str
    templates: names.Templates
    keys: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    experts: str = ""
    interleaved: bool = False
    norm_offset: bool = False
    transposed: frozenset[str] = frozenset()


_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEADS = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_LLAMA = {**_SIZES, **_RMS, **_HEADS}
_MAY_MISS = frozenset({"attention.head_count_kv", "attention.key_length", "attention.value_length"})
_SILU = {"hidden_act": ("silu",)}
_GEMMA = ("gelu_pytorch_tanh",)
_ONE_WAY = {"use_bidirectional_attention": (None, False)}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", "llama", "LlamaForCausalLM", names.LLAMA, _LLAMA, _MAY_MISS, _SILU, interleaved=True),
    Architecture(
        "llama",
        "mistral",
        "MistralForCausalLM",
        names.LLAMA,
        _LLAMA | _WINDOW,
        _MAY_MISS | {"attention.sliding_window"},
        _SILU,
        interleaved=True,
    ),
    Architecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        names.MIXTRAL,
        _LLAMA | _EXPERTS | _WINDOW,
        _MAY_MISS | {"attention.sliding_window"},
        _SILU,
        experts="expert_count",
        interleaved=True,
    ),
    Architecture(
        "qwen2",
        "qwen2",
        "Qwen2ForCausalLM",
        names.LLAMA,
        _SIZES | _RMS,
        _MAY_MISS,
        _SILU | {"use_sliding_window": (False,)},
    ),
    Architecture(
        "qwen3",
        "qwen3",
        "Qwen3ForCausalLM",
        names.QWEN3,
        _LLAMA,
        _MAY_MISS,
        _SILU | {"use_sliding_window": (False,), "attention_bias": (False,)},
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        names.QWEN3_MOE,
        _LLAMA | _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        _MAY_MISS,
        _SILU
        | {
            "use_sliding_window": (False,),
            "attention_bias": (False,),
            "norm_topk_prob": (True,),
            "mlp_only_layers": ([],),
            "decoder_sparse_step": (1,),
        },
        experts="expert_count",
    ),
    Architecture(
        "gemma",
        "gemma",
        "GemmaForCausalLM",
        names.LLAMA,
        _LLAMA,
        _MAY_MISS,
        {"hidden_act": _GEMMA, "attention_bias": (False,), "tie_word_embeddings": (True,)} | _ONE_WAY,
        norm_offset=True,
    ),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        names.GEMMA2,
        _LLAMA | _WINDOW | _CAPS,
        _MAY_MISS,
        {"hidden_activation": _GEMMA, "attention_bias": (False,), "tie_word_embeddings": (True,)} | _ONE_WAY,
        norm_offset=True,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        names.GEMMA3,
        _LLAMA | _WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
        _MAY_MISS | {"final_logit_softcapping"},
        {"hidden_activation": _GEMMA, "attention_bias": (False,), "attn_logit_softcapping": (None,)} | _ONE_WAY,
        norm_offset=True,
    ),
    Architecture(
        "phi2",
        "phi",
        "PhiForCausalLM",
        names.PHI,
        _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        _MAY_MISS,
        {"hidden_act": ("gelu_new",), "qk_layernorm": (False,), "tie_word_embeddings": (False,)},
    ),
    Architecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        names.PHI3,
        _SIZES | _RMS | _WINDOW,
        _MAY_MISS | {"attention.sliding_window"},
        _SILU,
    ),
    Architecture(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        names.GPT2,
        {
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        transposed=frozenset({"attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"}),
    ),
)


def architecture_of_model(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model with this config.json. Raises ModelError that lists those that are known."""
    model_type, classes = config.get("model_type"), config.get("architectures") or []
    for one in ARCHITECTURES:
        if one.model_type == model_type and (not classes or one.class_name in classes):
            return one
    known = ", ".join(one.class_name for one in ARCHITECTURES)
    what = (classes or [model_type])[0]
    raise ModelError(f"{what} has no GGUF form in bitgrain, which knows those of {known}: keep it in another layout")


def architecture_of_file(metadata: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a GGUF file names. Raises ModelError that lists those that are known."""
    name = metadata.get("general.architecture")
    found = [one for one in ARCHITECTURES if one.name == name]
    if not found:
        known = ", ".join(dict.fromkeys(one.name for one in ARCHITECTURES))
        raise ModelError(f"{where} holds a model of the architecture {name!r}; bitgrain reads those of {known}")
    if len(found) == 1:
        return found[0]
    kind = "mixtral" if metadata.get("llama.expert_count") else "llama"
    if kind == "llama" and "llama.attention.sliding_window" in metadata:
        kind = "mistral"
    return next(one for one in found if one.model_type == kind)
