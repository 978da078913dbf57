"""The model's module tree without its weights: every parameter is on the meta device."""

from __future__ import annotations

import copy
import json
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)

from bitgrain.checkpoints.gguf.model import SUFFIX, GgufModel
from bitgrain.errors import ModelError
from bitgrain.models.source import ModelSource

_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def load_config(
    source: ModelSource, trust_remote_code: bool = False, *, drop_quantization: bool = False
) -> PretrainedConfig:
    """The configuration in `source`.

    A checkpoint that is quantized already is refused. `drop_quantization` forgets its quantization config
    instead, for jobs that read such a checkpoint's dense twin (verify, eval). Raises ModelError.
    """
    if source.path.suffix == SUFFIX:
        return _gguf_config(source)
    raw = _read_json(source)
    method = _quant_method(raw)
    if method is not None and not drop_quantization:
        raise ModelError(
            f"{source.name} is already quantized with {method}: start from the checkpoint it was made from"
        )
    _check_model_type(source, raw, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, OSError, ImportError, StrictDataclassError) as error:
        raise ModelError(f"config.json of {source.name} cannot be used: {error}") from error
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key in _QUANTIZATION_KEYS:
            if part is not None and hasattr(part, key):
                delattr(part, key)
    return config


def _gguf_config(source: ModelSource) -> PretrainedConfig:
    found = GgufModel(source.path).config
    try:
        return CONFIG_MAPPING[found["model_type"]](**found)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        raise ModelError(f"the metadata of {source.path} cannot be used: {error}") from error


def build_skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model that `config.architectures` names, on the meta device, in eval mode.

    Without `architectures`: the causal language model of that model type, or its base model for encoders.
    Raises ModelError when transformers has no such architecture or cannot build it.
    """
    config = copy.deepcopy(config)  # building sets its dtype
    name = architecture_of(config)
    try:
        with torch.device("meta"):
            remote = _remote_auto_class(config)
            if remote is not None and trust_remote_code:
                model = remote.from_config(config, trust_remote_code=True)
            else:
                model = _native_class(config)._from_config(config)  # pyright: ignore[reportPrivateUsage]
    except (
        ImportError,
        OSError,
        AttributeError,
        KeyError,
        RuntimeError,
        NotImplementedError,
        ValueError,
        TypeError,
        StrictDataclassError,
    ) as error:
        raise ModelError(f"the architecture {name} cannot be built from its config.json: {error}") from error
    return cast(nn.Module, model).eval()


def architecture_of(config: PretrainedConfig) -> str:
    """The class name in config.json; the model type where there is none."""
    return (config.architectures or [config.model_type])[0]


def _read_json(source: ModelSource) -> dict[str, Any]:
    path = source.path / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{source.name} has no readable config.json: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"config.json of {source.name} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"config.json of {source.name} is not a JSON object")
    return raw


def _quant_method(raw: dict[str, Any]) -> str | None:
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key in _QUANTIZATION_KEYS:
            if found := part.get(key):
                return str(found.get("quant_method", key)) if isinstance(found, dict) else key
    return None


def _check_model_type(source: ModelSource, raw: dict[str, Any], trust_remote_code: bool) -> None:
    model_type = raw.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if "AutoConfig" in (raw.get("auto_map") or {}):
        if not trust_remote_code:
            raise _needs_trust(str((raw.get("architectures") or [model_type])[0]))
        return
    if model_type is None:
        raise ModelError(f"config.json of {source.name} has no model_type, so it is not a transformers checkpoint")
    raise _unknown((raw.get("architectures") or [model_type])[0], model_type)


def _unknown(name: str, model_type: str) -> ModelError:
    return ModelError(
        f"the architecture {name} (model type {model_type}) is unknown to transformers "
        f"{transformers.__version__}: a newer version may know it"
    )


def _needs_trust(name: str) -> ModelError:
    return ModelError(
        f"the architecture {name} is Python code inside the checkpoint, which runs only with "
        "--trust-remote-code (trust_remote_code=True): read it first"
    )


def _remote_auto_class(config: PretrainedConfig) -> Any:
    """The Auto class under which the checkpoint's own code offers the architecture, if it has any."""
    entries = {
        auto: reference
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith("AutoModel") and isinstance(reference, str) and hasattr(transformers, auto)
    }
    wanted = (config.architectures or [None])[0]
    named = [auto for auto, reference in entries.items() if reference.rpartition(".")[2] == wanted]
    order = [*named, *(auto for auto in ("AutoModelForCausalLM", "AutoModel") if auto in entries), *entries]
    return getattr(transformers, order[0]) if order else None


def _native_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    wanted = (config.architectures or [None])[0]
    if wanted is not None:
        found = getattr(transformers, wanted, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            if found.config_class is None or isinstance(config, found.config_class):
                return found
        elif _remote_auto_class(config) is not None:
            raise _needs_trust(wanted)
        else:
            raise _unknown(wanted, config.model_type)
    return _class_by_type(config, wanted)


def _class_by_type(config: PretrainedConfig, wanted: str | None) -> type[PreTrainedModel]:
    """For a config without architectures, or with a sister type's (a Mistral that calls itself Llama)."""
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if wanted is None:
        causal = causal and kind not in MODEL_FOR_MASKED_LM_MAPPING
    else:
        causal = causal and wanted.endswith(("ForCausalLM", "LMHeadModel"))
    if causal:
        return _first(MODEL_FOR_CAUSAL_LM_MAPPING[kind])
    if kind in MODEL_MAPPING and (wanted is None or wanted.endswith("Model")):
        return _first(MODEL_MAPPING[kind])
    raise ModelError(
        f"the architecture {wanted or config.model_type} cannot be built from a {kind.__name__}: "
        f"neither {AutoModelForCausalLM.__name__} nor {AutoModel.__name__} fits it"
    )


def _first(found: Any) -> type[PreTrainedModel]:
    return found[0] if isinstance(found, (tuple, list)) else found
