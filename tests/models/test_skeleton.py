"""Configs and skeletons, and what is said about wrong ones."""

import json

import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig, MistralConfig

from bitgrain.errors import ModelError
from bitgrain.models.skeleton import architecture_of, build_skeleton, load_config
from bitgrain.models.source import ModelSource

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own-model"

    def __init__(self, width=8, **rest):
        self.width = width
        super().__init__(**rest)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(config.width, config.width))])
        self.post_init()
"""


def write(folder, config) -> ModelSource:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return ModelSource(folder, "tiny", None)


def test_the_skeleton_has_no_weights(any_tiny):
    assert type(any_tiny.skeleton) is type(any_tiny.model)
    assert not any_tiny.skeleton.training
    assert {parameter.device.type for parameter in any_tiny.skeleton.parameters()} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in any_tiny.model.named_parameters()}
    assert {name: parameter.shape for name, parameter in any_tiny.skeleton.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SMALL), "LlamaForCausalLM"),
        (BertConfig(**SMALL), "BertModel"),
        (BertConfig(**SMALL, architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (BertConfig(**SMALL, architectures=["BertForSequenceClassification"]), "BertForSequenceClassification"),
        (MistralConfig(**SMALL, architectures=["LlamaForCausalLM"]), "MistralForCausalLM"),
    ],
)
def test_the_class_follows_architectures(config, expected):
    before = config.to_dict()
    assert type(build_skeleton(config)).__name__ == expected
    assert config.to_dict() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_the_config(dtype):
    skeleton = build_skeleton(LlamaConfig(**SMALL, dtype=dtype))
    assert {parameter.dtype for parameter in skeleton.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ({}, "has no model_type"),
        ({"model_type": "martian", "architectures": ["MartianForCausalLM"]}, "architecture MartianForCausalLM"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot be used"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, config, message):
    with pytest.raises(ModelError, match=message):
        load_config(write(tmp_path, config))


def test_no_config_at_all(tmp_path):
    with pytest.raises(ModelError, match="no readable config"):
        load_config(ModelSource(tmp_path, "tiny", None))


def test_an_unknown_architecture_of_a_known_type():
    with pytest.raises(ModelError, match=r"LlamaForWeather .*unknown to transformers"):
        build_skeleton(LlamaConfig(**SMALL, architectures=["LlamaForWeather"]))


def test_a_config_that_cannot_be_built():
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be built"):
        build_skeleton(LlamaConfig(**SMALL, hidden_act="magic", architectures=["LlamaForCausalLM"]))


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"format": "dense"}}, "compression_config"),
    ],
)
def test_quantized_checkpoints_are_refused(tmp_path, entry, method):
    source = write(tmp_path, {**LlamaConfig(**SMALL).to_dict(), **entry})
    with pytest.raises(ModelError, match=f"already quantized with {method}"):
        load_config(source)
    dense = load_config(source, drop_quantization=True)
    assert not hasattr(dense, "quantization_config")
    assert not hasattr(dense, "compression_config")


def test_the_checkpoints_own_code_needs_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "modeling_own.py").write_text(REMOTE)
    auto_map = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config = {"model_type": "own-model", "architectures": ["OwnForCausalLM"], "auto_map": auto_map, "width": 6}
    source = write(tmp_path, config)
    with pytest.raises(ModelError, match=r"OwnForCausalLM .*--trust-remote-code"):
        load_config(source)
    trusted = load_config(source, trust_remote_code=True)
    assert architecture_of(trusted) == "OwnForCausalLM"
    with pytest.raises(ModelError, match=r"OwnForCausalLM .*--trust-remote-code"):
        build_skeleton(trusted)
    skeleton = build_skeleton(trusted, trust_remote_code=True)
    assert type(skeleton).__name__ == "OwnForCausalLM"
    assert skeleton.get_parameter("layers.0.0.weight").shape == (6, 6)
