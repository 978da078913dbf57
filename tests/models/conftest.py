"""Tiny random checkpoints of many architectures, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bitgrain.models.anatomy import Anatomy, read_anatomy
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model

WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**WIDTHS, "num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": None, "eos_token_id": None}

# name -> (class of the model, settings of its config)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "phi": ("PhiForCausalLM", WIDTHS),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "opt": ("OPTForCausalLM", {**WIDTHS, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bert": ("BertModel", {**WIDTHS, "pad_token_id": 0}),
    "bert-mlm": ("BertForMaskedLM", {**WIDTHS, "pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "intermediate_size": 192, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192},
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **WIDTHS,
            "moe_intermediate_size": 96,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt-oss": ("GptOssForCausalLM", {**GROUPED, "head_dim": 16, "num_local_experts": 4}),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 1,
        },
    ),
    "granite-moe": ("GraniteMoeForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    model: PreTrainedModel
    config: PretrainedConfig
    skeleton: nn.Module
    tensors: dict[str, torch.Tensor]
    anatomy: Anatomy


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def save_tiny(name: str, folder: Path, **saving: Any) -> Checkpoint:
    class_name, settings = ZOO[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    # biases and scales that are zero or one at the start would hide a mix-up
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder, **saving)
    source = resolve_model(folder)
    config = load_config(source)
    skeleton = build_skeleton(config)
    tensors = read_tensors(folder)
    return Checkpoint(folder, model, config, skeleton, tensors, read_anatomy(skeleton, tensors))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zoo_name" in metafunc.fixturenames:
        metafunc.parametrize("zoo_name", list(ZOO))


@pytest.fixture
def any_tiny(zoo_name: str, tiny: Callable[[str], Checkpoint]) -> Checkpoint:
    """One checkpoint of each architecture."""
    return tiny(zoo_name)


@pytest.fixture
def save_zoo() -> Callable[..., Checkpoint]:
    return save_tiny
