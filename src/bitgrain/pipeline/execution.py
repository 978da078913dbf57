"""How the layers of a loaded model compute: packed weights through kernels, or dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import SchemeError
from bitgrain.kernels.native import native
from bitgrain.models.anatomy import Anatomy
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.linear_rows import INT8_INPUTS, find_linear
from bitgrain.runtime.low_bit_linear import put_in_place, shared_parameters
from bitgrain.runtime.operators import Operator
from bitgrain.runtime.quant_linear import QuantLinear

Execution = Literal["kernels", "dequantize", "reference"]

_LINEAR = (nn.Linear.__name__, Conv1D.__name__)
_REMEDY = "ask for execution='dequantize' (dense weights, simulated activations)"


@dataclass(frozen=True)
class KernelChoice:
    """What one layer will run."""

    row: Operator
    quantizer: InputQuantizer | None


def choose_execution(execution: str | None, low_bit: bool) -> Execution:
    """What was asked for; "kernels" by default. Raises SchemeError for an unknown one, or one beside low_bit."""
    if low_bit and execution is not None:
        raise SchemeError("low_bit=True says how the layers compute: give no execution beside it")
    chosen = execution or "kernels"
    for one in get_args(Execution):
        if chosen == one:
            return one
    raise SchemeError(f"unknown execution {execution!r}; there are: {', '.join(get_args(Execution))}")


def choose_kernels(
    layers: Mapping[str, StoredLayer],
    packed: Mapping[str, str],
    quantizers: Mapping[str, InputQuantizer],
    device: torch.device,
    execution: Execution,
    activations: str | None = None,
) -> dict[str, KernelChoice]:
    """The kernel of every quantized layer, by original tensor name.

    packed      original tensor -> module, of layers that can hold a packed weight
    quantizers  of inputs, by the path of the weight
    Raises SchemeError that lists all layers without a kernel, KernelError where the native module is not here.
    """
    if activations not in (None, "int8"):
        raise SchemeError(f"weight-only layers may get activations='int8', not {activations!r}")
    int8 = InputQuantizer(INT8_INPUTS) if activations == "int8" else None
    wanted = {
        name: _Wanted(
            layer.module,
            layer.scheme.weight,
            quantizers.get(f"{packed[name]}.weight", int8) if name in packed else None,
            None if name in packed else _why_not_packed(layer),
        )
        for name, layer in layers.items()
    }
    return _choose(wanted, device, execution)


def kernels_of_module(
    module: nn.Module,
    weights: Mapping[str, Sequence[QTensor]],
    quantizers: Mapping[str, InputQuantizer],
    execution: Execution,
) -> dict[str, KernelChoice]:
    """The same for a module in memory, by parameter name. Raises as `choose_kernels` does."""
    shared = shared_parameters(module)
    wanted: dict[str, _Wanted] = {}
    for name, parts in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        reason = None
        if leaf != "weight" or type(owner) not in (nn.Linear, Conv1D):
            reason = f"a weight of {type(owner).__name__}"
        elif id(module.get_parameter(name)) in shared:
            reason = "a weight that several layers share"
        wanted[name] = _Wanted(name.removesuffix(".weight"), parts[0].spec, quantizers.get(name), reason)
    devices = {parameter.device for parameter in module.parameters()}
    place = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    return _choose(wanted, place, execution)


@dataclass(frozen=True)
class _Wanted:
    module: str
    weight: QuantSpec
    quantizer: InputQuantizer | None
    refusal: str | None


def _choose(wanted: Mapping[str, _Wanted], device: torch.device, execution: Execution) -> dict[str, KernelChoice]:
    if execution == "kernels":
        native()
    found: dict[str, KernelChoice] = {}
    without: dict[str, list[str]] = {}
    for name, one in wanted.items():
        inputs = None if one.quantizer is None else one.quantizer.spec
        row = one.refusal or find_linear(one.weight, inputs, device.type, reference=execution == "reference")
        if isinstance(row, str):
            without.setdefault(row, []).append(one.module)
        else:
            found[name] = KernelChoice(row, one.quantizer)
    if without:
        raise SchemeError(f"no kernel on {device.type} for {_listed(without)}: {_REMEDY}")
    return found


def packable(anatomy: Anatomy) -> dict[str, str]:
    """Original tensors that can stay packed -> their modules: each is the whole weight of one linear layer."""
    tied = {name for group in anatomy.tied for name in group}
    return {
        weight.tensor: weight.memory_module
        for weight in anatomy.weights
        if weight.targets == (weight.memory,) == (f"{weight.memory_module}.weight",)
        and weight.experts == 1
        and weight.memory not in tied
        and weight.class_name in _LINEAR
    }


def why_no_kernels(layers: Mapping[str, StoredLayer], anatomy: Anatomy) -> str | None:
    """What `choose_kernels` would say of these layers on a CPU, or None."""
    packed, without = packable(anatomy), dict[str, list[str]]()
    for name, layer in layers.items():
        row = find_linear(layer.scheme.weight, layer.scheme.input, "cpu") if name in packed else _why_not_packed(layer)
        if isinstance(row, str):
            without.setdefault(row, []).append(layer.module)
    return _listed(without) or None


def run_packed_(model: nn.Module, path: str, choice: KernelChoice, weight: PackedMatrix, stored: torch.dtype) -> None:
    """Put a `QuantLinear` in the place of the linear layer at `path`."""
    old: Any = model.get_submodule(path)
    kernel = choice.row.kernel(weight, choice.quantizer)
    transposed = isinstance(old, Conv1D)
    put_in_place(
        model, path, QuantLinear(kernel, old.bias, dtype=old.weight.dtype, stored=stored, transposed=transposed)
    )


def _why_not_packed(layer: StoredLayer) -> str:
    if layer.experts > 1 or layer.role == "expert":
        return "experts that are stacked in one tensor"
    return {"conv": "a convolution", "embedding": "an embedding"}.get(
        layer.role, f"{layer.class_name}, whose weight is shared with or joined to others"
    )


def _listed(without: Mapping[str, list[str]]) -> str:
    """Modules by the reason why they have no kernel."""
    return "; ".join(f"{_few(names)} ({reason})" for reason, names in without.items())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
