"""config.json of a transformers model <-> the metadata of a GGUF file, without its tokenizer.

Both sides are plain dicts; the keys of each architecture stand in `architectures`. llama.cpp's keys: its
`llama-arch.cpp` and the GGUF specification ("Standardized key-value pairs").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitgrain.checkpoints.gguf.architectures import Architecture
from bitgrain.checkpoints.gguf.rotary import llama3_factors, llama3_rope
from bitgrain.errors import CheckpointError, PlanError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a GGUF file's tensors, in torch's order."""

_YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
_LARGEST = 2**31 - 1


def metadata_of(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The metadata that say what `config` says; `config` is complete, with the defaults of its class.

    Raises PlanError for what llama.cpp computes in another way.
    """
    for key, allowed in architecture.fixed.items():
        if config.get(key, allowed[0]) not in allowed:
            raise PlanError(
                f"llama.cpp computes {architecture.name} with {key} {allowed[0]}, this model has {config[key]}"
            )
    _check_attention(config, architecture)
    prefix = architecture.name
    found: dict[str, Any] = {"general.architecture": prefix}
    for suffix, key in architecture.keys.items():
        value = _complete(config, key)
        if value is None and suffix in architecture.optional:
            continue
        if value is None:
            raise PlanError(f"llama.cpp needs {key} of {architecture.name}, which this model has none of")
        found[f"{prefix}.{suffix}"] = value
    if architecture.model_type == "phi3":
        found.setdefault("phi3.attention.sliding_window", 0)  # llama.cpp guesses where there is none
    found[f"{prefix}.vocab_size"] = config["vocab_size"]
    found |= {f"{prefix}.{suffix}": value for suffix, value in _rope_metadata(config, architecture).items()}
    return found


def extra_tensors(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Tensor]:
    """float32 tensors that llama.cpp reads and transformers computes: factors of rotary frequencies."""
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, _rotated(config))}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}


EXTRA_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that no parameter of a transformers model is."""


def config_of(
    metadata: Mapping[str, Any], shapes: Shapes, read: Callable[[str], Tensor], architecture: Architecture, where: str
) -> dict[str, Any]:
    """config.json of a model with these metadata and tensors; `read` gives a float32 tensor; `where`: for errors.

    Raises CheckpointError for metadata that are missing, not of their kind, or not those of the tensors.
    """
    prefix = architecture.name

    def get(suffix: str, default: Any = None) -> Any:
        return _checked(metadata.get(f"{prefix}.{suffix}", default), f"{prefix}.{suffix}", where)

    config: dict[str, Any] = {"model_type": architecture.model_type, "architectures": [architecture.class_name]}
    for suffix, key in architecture.keys.items():
        value = get(suffix)
        if value == 0 and key != "sliding_window":
            raise CheckpointError(f"{where}: {prefix}.{suffix} is 0: the file is damaged")
        if value is not None:
            config[key] = value
        elif suffix not in architecture.optional:
            raise CheckpointError(f"{where}: {prefix}.{suffix} is missing: the file is incomplete")
    layers = config[architecture.keys["block_count"]]
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"blk\.(\d+)\.", name))}
    if blocks != set(range(layers)) or len(blocks) != layers:
        raise CheckpointError(f"{where}: {prefix}.block_count is {layers}, the tensors are of {len(blocks)} blocks")
    embedded = shapes.get("token_embd.weight", ())
    if len(embedded) != 2 or embedded[1] != config[architecture.keys["embedding_length"]]:
        raise CheckpointError(f"{where}: token_embd.weight is {list(embedded)}, which is not what the metadata say")
    config["vocab_size"] = embedded[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if architecture.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    if architecture.model_type == "phi3" and not config.get("sliding_window"):
        config["sliding_window"] = None
    config |= {key: allowed[0] for key, allowed in architecture.fixed.items() if key not in config}
    if architecture.name in _SCALED_BY_WIDTH:
        config["query_pre_attn_scalar"] = _attention_scalar(config, architecture.name)
    for key in ("bos", "eos"):
        config[f"{key}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    if architecture.name != "gpt2":
        config |= _rope_config(metadata, shapes, read, get, config, architecture, where)
    return config


_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
"""Architectures whose largest model, of so many layers, scales attention by hidden_size / heads."""


def _attention_scalar(config: Mapping[str, Any], name: str) -> int:
    if config["num_hidden_layers"] == _SCALED_BY_WIDTH[name]:
        return config["hidden_size"] // config["num_attention_heads"]
    return _head_dim(config)


def _check_attention(config: Mapping[str, Any], architecture: Architecture) -> None:
    name = architecture.name
    if name in _SCALED_BY_WIDTH and config["query_pre_attn_scalar"] != _attention_scalar(config, name):
        raise PlanError(
            f"llama.cpp scales the attention of {name} by {_attention_scalar(config, name)} here, this model by "
            f"query_pre_attn_scalar {config['query_pre_attn_scalar']}"
        )
    period = {"gemma2": 2, "gemma3": 6}.get(name, 0)
    types = config.get("layer_types") or []
    expected = [
        "full_attention" if not period or (i + 1) % period == 0 else "sliding_attention" for i in range(len(types))
    ]
    if types != expected:
        raise PlanError(f"llama.cpp has another pattern of sliding windows in {name} than this model's layer_types")


def _complete(config: Mapping[str, Any], key: str) -> Any:
    """A value of the config, or what its class computes where there is none."""
    value = config.get(key)
    if value is not None:
        return value
    if key == "head_dim":
        return _head_dim(config)
    if key == "n_inner":
        return 4 * config["n_embd"]
    return config["num_attention_heads"] if key == "num_key_value_heads" else None


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    return rope.get("full_attention", rope)


def _rotated(config: Mapping[str, Any]) -> int:
    """Rows of a head that are rotated."""
    return int(_head_dim(config) * _rope(config).get("partial_rotary_factor", 1.0))


def _rope_metadata(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    if architecture.name == "gpt2":
        return {}
    rope = _rope(config)
    if architecture.interleaved and _rotated(config) != _head_dim(config):
        raise PlanError("llama.cpp rotates whole heads of llama, this model has a partial_rotary_factor")
    found: dict[str, Any] = {
        "rope.dimension_count": _rotated(config),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    kind = rope.get("rope_type", "default")
    if architecture.name == "gemma3":
        local: Mapping[str, Any] = config["rope_parameters"]["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise PlanError("llama.cpp does not scale the rotary embeddings of gemma3's sliding windows")
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        told = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
        if told:
            raise PlanError(f"llama.cpp has its own {told[0]} for YaRN, which this model sets")
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(
                rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            ),
        }
        found |= {key: float(rope[name]) for name, key in _YARN.items() if rope.get(name) is not None}
    elif kind == "longrope" and architecture.name == "phi3":
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        computed = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        found |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.attn_factor": float(rope.get("attention_factor") or computed),
        }
    elif kind not in ("default", "llama3"):
        raise PlanError(f"llama.cpp has no rotary embeddings of the type {kind} for {architecture.name}")
    return found


def _rope_config(
    metadata: Mapping[str, Any],
    shapes: Shapes,
    read: Callable[[str], Tensor],
    get: Callable[..., Any],
    config: Mapping[str, Any],
    architecture: Architecture,
    where: str,
) -> dict[str, Any]:
    theta = get("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated, head = get("rope.dimension_count", _head_dim(config)), _head_dim(config)
    if rotated != head:
        rope["partial_rotary_factor"] = rotated / head
    kind = metadata.get(f"{architecture.name}.rope.scaling.type", "none")
    original = get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in shapes:
        found = llama3_rope(read("rope_freqs.weight"), theta)
        if found is None:
            raise CheckpointError(
                f"{where}: rope_freqs.weight holds factors that are not those of Llama 3.1's rotary scaling"
            )
        rope |= found
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    elif kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }
        rope |= {name: value for name, key in _YARN.items() if (value := get(key)) is not None}
    elif kind == "longrope" or "rope_factors_long.weight" in shapes:
        for length in ("long", "short"):
            rope[f"{length}_factor"] = [float(str(one)) for one in read(f"rope_factors_{length}.weight").numpy()]
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        if (factor := get("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = factor
    elif kind != "none":
        raise CheckpointError(f"{where}: rotary embeddings of the type {kind!r}, which bitgrain does not know")
    more = {"original_max_position_embeddings": original} if architecture.name == "phi3" and original else {}
    if architecture.name == "gemma3":
        local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    return {"rope_parameters": rope, **more}


def _checked(value: Any, key: str, where: str) -> Any:
    """A number from metadata, as it was before it became a float32. Raises CheckpointError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not 0 <= value <= _LARGEST:
            raise CheckpointError(f"{where}: {key} is {value}, which cannot be")
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(str(np.float32(value)))
    raise CheckpointError(f"{where}: {key} is not a number: {str(value)[:40]!r}")
