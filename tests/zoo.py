"""Tiny random checkpoints of many architectures, wide enough (128) for the groups of every preset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

WIDTHS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**WIDTHS, "num_key_value_heads": 2}
HEADS = {"head_dim": 32}

# name -> (class of the model, settings of its config)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, **HEADS}),
    "gemma": ("GemmaForCausalLM", {**GROUPED, **HEADS}),
    "phi": ("PhiForCausalLM", WIDTHS),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128, "eos_token_id": None},
    ),
    "opt": ("OPTForCausalLM", {**WIDTHS, "ffn_dim": 256, "word_embed_proj_dim": 128}),
    "bert": ("BertModel", {**WIDTHS, "pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, **HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    ),
    "gpt-oss": ("GptOssForCausalLM", {**GROUPED, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

_SMALL = {**GROUPED, "intermediate_size": 128, "num_hidden_layers": 1}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
# more models with experts, one layer each
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    # shared experts behind a gate
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {**_SMALL, **_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    ),
    # a dense layer first, shared experts, groups of experts, a bias that only chooses, low-rank attention
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **WIDTHS,
            **_ROUTED,
            "intermediate_size": 128,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
    "granite-moe": ("GraniteMoeForCausalLM", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeForCausalLM", {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2}),
    "phi-moe": ("PhimoeForCausalLM", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # all experts at once, by one product of three dimensions
    "llama4": (
        "Llama4ForCausalLM",
        {**_SMALL, **HEADS, "num_local_experts": 4, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1},
    ),
}


def build(name: str, **changes: Any) -> Any:
    """The model in memory, random; the same in every run."""
    class_name, settings = {**ZOO, **EXPERTS}[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**settings, **changes})).eval()
    # biases and gains that are zero or one at the start would hide a mix-up
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The same as a checkpoint in `folder`."""
    build(name, **changes).to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def stretch(model: Any, channel: int = 9, factor: float = 60.0) -> Any:
    """A Llama whose normed hidden states have one channel of outliers; the same function."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.input_layernorm.weight[channel] *= factor
        layer.post_attention_layernorm.weight[channel] *= factor
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            part.weight[:, channel] /= factor
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer beside a checkpoint: one id below 128 for each character."""
    characters = {chr(i): i for i in range(128)}
    tokenizer = Tokenizer(WordLevel(characters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def edited(source: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a one-file checkpoint with some tensors replaced, or (None) left out; `.` is written `__`."""
    shutil.copytree(source, folder)
    tensors = read_tensors(source)
    for key, value in changes.items():
        name = key.replace("__", ".")
        assert name in tensors, name
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of a config.json in place; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ids_for(model: Any, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids [2, length]."""
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits, or the last hidden states of an encoder, on the CPU wherever the model is."""
    result = model(input_ids=ids.to(next(iter(model.parameters())).device))
    logits = getattr(result, "logits", None)
    return (result.last_hidden_state if logits is None else logits).float().cpu()
