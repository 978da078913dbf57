"""transformers' `from_pretrained` of folders with `quant_method: bitgrain`: importing this registers a quantizer.

    import bitgrain.hf
    model = AutoModelForCausalLM.from_pretrained("OUT")

On the CPU packed weights run through the native kernels, as of `bitgrain.load`; where those do not serve every layer
(which is logged), and on other devices, weights are dequantized and quantized activations simulated. A config's
`quantization_config["execution"]` may say "kernels" or "dequantize". Models are for inference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitgrain.errors import ModelError, SchemeError
from bitgrain.kernels.native import is_available
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.skeleton import build_skeleton
from bitgrain.pipeline.equip import equip
from bitgrain.pipeline.execution import Execution, choose_execution, why_no_kernels
from bitgrain.pipeline.load import load_layers
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.runtime.device import resolve_device

_METHOD = "bitgrain"


class BitgrainConfig(QuantizationConfigMixin):
    """A `quantization_config` that bitgrain wrote, as it stands in config.json; `execution` may be added to it."""

    def __init__(self, **stored: Any) -> None:
        self.quant_method: Any = _METHOD
        self.execution: str | None = None
        vars(self).update(stored)


class BitgrainQuantizer(HfQuantizer):
    """Lets transformers make the model and bitgrain its layers.

    Raises SchemeError for a model that is to be quantized, for more than one device and for weights that are given;
    ModelError for a class that the checkpoint is not of; what `bitgrain.load` raises.
    """

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._device = "cpu"
        self._dtype: torch.dtype | None = None
        self._folder: Path | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise SchemeError("from_pretrained quantizes nothing with bitgrain: write a folder with bitgrain.quantize")
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len(places) > 1 or places & {"disk", "balanced", "balanced_low_0", "sequential"}:
            raise SchemeError(f"a bitgrain model is loaded onto one device, not by device_map {device_map!r}")
        (place,) = places
        device = "cpu" if place is None else f"cuda:{place}" if isinstance(place, int) else str(place)
        self._device = str(resolve_device(device))

    def update_device_map(self, device_map: Any) -> Any:
        return None  # transformers places nothing

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Leave nothing for transformers to fill."""
        files = kwargs.get("checkpoint_files")
        if not files:
            raise SchemeError("a bitgrain model is loaded from its folder, not from weights that are given")
        self._folder, self._dtype = Path(files[0]).parent, kwargs.get("dtype")
        for held in (model._modules, model._parameters, model._buffers):
            held.clear()
        model.all_tied_weights_keys = {}
        model._keys_to_ignore_on_load_unexpected = {""}  # all of them

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        folder, stored = self._folder, self.quantization_config
        assert folder is not None
        config: Any = model.config
        del config.quantization_config
        trusted = type(model).__module__.startswith("transformers_modules")
        execution = self._execution(folder, config, trusted)
        loaded: Any = load_layers(folder, self._device, self._dtype, trusted, execution=execution, config=config)
        if type(loaded) is not type(model):
            inner: Any = getattr(loaded, "base_model", None)
            if type(inner) is not type(model):
                raise ModelError(
                    f"{folder} is a {type(loaded).__name__}: {type(model).__name__} cannot be loaded from it"
                )
            loaded = inner
        for name in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "config"):
            model.__dict__[name] = loaded.__dict__[name]
        for name in ("all_tied_weights_keys", "_tied_weights_keys", "_keys_to_ignore_on_load_unexpected"):
            setattr(model, name, getattr(loaded, name))
        equip(model, folder, trusted, execution=execution)
        if execution == "dequantize":
            self.remove_quantization_config(model)
        else:
            model.config.quantization_config = stored
        return model.eval()

    def _execution(self, folder: Path, config: Any, trusted: bool) -> Execution:
        wanted = getattr(self.quantization_config, "execution", None)
        if wanted is not None:
            return choose_execution(wanted, low_bit=False)
        if torch.device(self._device).type != "cpu":
            return "dequantize"
        reason = None if is_available() else "the native module was not built"
        if reason is None:
            checkpoint, skeleton = QuantizedCheckpoint(folder), build_skeleton(config, trusted)
            reason = why_no_kernels(skeleton, read_anatomy(skeleton, checkpoint.originals()), checkpoint.layers)
        if reason is not None:
            transformers_logging.get_logger(__name__).warning(f"no kernels for all layers, weights are dense: {reason}")
        return "kernels" if reason is None else "dequantize"

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        raise SchemeError("packed weights become dense by bitgrain.load(folder, execution='dequantize')")

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False


register_quantization_config(_METHOD)(BitgrainConfig)
register_quantizer(_METHOD)(BitgrainQuantizer)
