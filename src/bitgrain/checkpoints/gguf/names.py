"""Names of tensors: those of a transformers checkpoint and those of a GGUF file (llama.cpp's `llama-arch.cpp`).

Templates name modules; `.weight` and `.bias` are the same on both sides. `{i}` is the block, `{e}` the expert: experts
that have a tensor each in a transformers checkpoint are one tensor [experts, out, in] in a GGUF file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

Templates = Mapping[str, str]
"""Module in a transformers checkpoint -> tensor in a GGUF file, both without `.weight` or `.bias`."""

_LAYER = "model.layers.{i}."
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ATTENTION = {
    _LAYER + "self_attn.q_proj": "blk.{i}.attn_q",
    _LAYER + "self_attn.k_proj": "blk.{i}.attn_k",
    _LAYER + "self_attn.v_proj": "blk.{i}.attn_v",
    _LAYER + "self_attn.o_proj": "blk.{i}.attn_output",
}
_NORMS = {
    _LAYER + "input_layernorm": "blk.{i}.attn_norm",
    _LAYER + "post_attention_layernorm": "blk.{i}.ffn_norm",
}
_FOUR_NORMS = {
    _LAYER + "input_layernorm": "blk.{i}.attn_norm",
    _LAYER + "post_attention_layernorm": "blk.{i}.post_attention_norm",
    _LAYER + "pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    _LAYER + "post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}
_QK_NORMS = {
    _LAYER + "self_attn.q_norm": "blk.{i}.attn_q_norm",
    _LAYER + "self_attn.k_norm": "blk.{i}.attn_k_norm",
}
_MLP = {
    _LAYER + "mlp.gate_proj": "blk.{i}.ffn_gate",
    _LAYER + "mlp.up_proj": "blk.{i}.ffn_up",
    _LAYER + "mlp.down_proj": "blk.{i}.ffn_down",
}

LLAMA: Templates = _OUTSIDE | _ATTENTION | _NORMS | _MLP
QWEN3: Templates = LLAMA | _QK_NORMS
MIXTRAL: Templates = (
    _OUTSIDE
    | _ATTENTION
    | _NORMS
    | {
        _LAYER + "block_sparse_moe.gate": "blk.{i}.ffn_gate_inp",
        _LAYER + "block_sparse_moe.experts.{e}.w1": "blk.{i}.ffn_gate_exps",
        _LAYER + "block_sparse_moe.experts.{e}.w3": "blk.{i}.ffn_up_exps",
        _LAYER + "block_sparse_moe.experts.{e}.w2": "blk.{i}.ffn_down_exps",
    }
)
QWEN3_MOE: Templates = (
    _OUTSIDE
    | _ATTENTION
    | _NORMS
    | _QK_NORMS
    | {
        _LAYER + "mlp.gate": "blk.{i}.ffn_gate_inp",
        _LAYER + "mlp.experts.{e}.gate_proj": "blk.{i}.ffn_gate_exps",
        _LAYER + "mlp.experts.{e}.up_proj": "blk.{i}.ffn_up_exps",
        _LAYER + "mlp.experts.{e}.down_proj": "blk.{i}.ffn_down_exps",
    }
)
GEMMA2: Templates = _OUTSIDE | _ATTENTION | _FOUR_NORMS | _MLP
GEMMA3: Templates = GEMMA2 | _QK_NORMS
PHI3: Templates = (
    _OUTSIDE
    | _NORMS
    | {
        _LAYER + "self_attn.qkv_proj": "blk.{i}.attn_qkv",
        _LAYER + "self_attn.o_proj": "blk.{i}.attn_output",
        _LAYER + "mlp.gate_up_proj": "blk.{i}.ffn_up",
        _LAYER + "mlp.down_proj": "blk.{i}.ffn_down",
    }
)
PHI: Templates = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    **{name: stem for name, stem in _ATTENTION.items() if "o_proj" not in name},
    _LAYER + "self_attn.dense": "blk.{i}.attn_output",
    _LAYER + "input_layernorm": "blk.{i}.attn_norm",
    _LAYER + "mlp.fc1": "blk.{i}.ffn_up",
    _LAYER + "mlp.fc2": "blk.{i}.ffn_down",
}
GPT2: Templates = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h.{i}.ln_1": "blk.{i}.attn_norm",
    "transformer.h.{i}.attn.c_attn": "blk.{i}.attn_qkv",
    "transformer.h.{i}.attn.c_proj": "blk.{i}.attn_output",
    "transformer.h.{i}.ln_2": "blk.{i}.ffn_norm",
    "transformer.h.{i}.mlp.c_fc": "blk.{i}.ffn_up",
    "transformer.h.{i}.mlp.c_proj": "blk.{i}.ffn_down",
}


@dataclass(frozen=True)
class Place:
    """Where an original tensor lies in a GGUF file: in the tensor `name`, as matrix `expert` of its stack, or whole."""

    name: str
    expert: int | None = None

    @property
    def stem(self) -> str:
        """What the tensor is, without its block: `attn_q.weight`."""
        return re.sub(r"^blk\.\d+\.", "", self.name)


def place_of(original: str, templates: Templates) -> Place | None:
    """The place of an original tensor; None for a name that no template knows.

    Some checkpoints leave out the first part of every name (`model.`, `transformer.`).
    """
    module, _, leaf = original.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    prefix = next(iter(templates)).partition(".")[0]
    for name in (module, f"{prefix}.{module}"):
        for pattern, stem in _patterns(tuple(templates.items())):
            if match := pattern.fullmatch(name):
                numbers = match.groupdict()
                expert = numbers.get("e")
                return Place(
                    f"{stem.replace('{i}', numbers.get('i', ''))}.{leaf}", None if expert is None else int(expert)
                )
    return None


def originals_of(names: Iterable[str], experts: int, templates: Templates) -> dict[str, Place]:
    """The original tensors that the tensors `names` of a GGUF file hold; `experts`: matrices in a stack of experts.

    Names that no template knows are left out.
    """
    back = {stem: module for module, stem in templates.items()}
    found: dict[str, Place] = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.*)", stem)
        module = back.get(stem if block is None else f"blk.{{i}}.{block[2]}")
        if module is None:
            continue
        module = module if block is None else module.replace("{i}", block[1])
        if "{e}" not in module:
            found[f"{module}.{leaf}"] = Place(name)
            continue
        for expert in range(experts):
            found[f"{module.replace('{e}', str(expert))}.{leaf}"] = Place(name, expert)
    return found


@lru_cache
def _patterns(templates: tuple[tuple[str, str], ...]) -> list[tuple[re.Pattern[str], str]]:
    def pattern(module: str) -> re.Pattern[str]:
        escaped = re.escape(module)
        for key in "ie":
            escaped = escaped.replace(re.escape(f"{{{key}}}"), rf"(?P<{key}>\d+)", 1)
        return re.compile(escaped)

    return [(pattern(module), stem) for module, stem in templates]
