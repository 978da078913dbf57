"""How the layers of a loaded model compute: packed weights through kernels, or dense ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import SchemeError
from bitgrain.kernels.native import native
from bitgrain.models.anatomy import Anatomy
from bitgrain.models.structure import Matrix
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.pipeline.places import Place, find_places, place_of, stack_of
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.embedding_rows import find_embedding
from bitgrain.runtime.kernel_arguments import refuse_shared
from bitgrain.runtime.linear_rows import INT8_INPUTS, find_linear
from bitgrain.runtime.low_bit_linear import put_in_place
from bitgrain.runtime.operators import Operator
from bitgrain.runtime.quant_embedding import quant_embedding
from bitgrain.runtime.quant_experts import QuantExperts
from bitgrain.runtime.quant_linear import QuantLinear

Execution = Literal["kernels", "dequantize", "reference"]

_REMEDY = "ask for execution='dequantize' (dense weights, simulated activations)"


@dataclass(frozen=True)
class KernelChoice:
    """What one matrix will run."""

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
    places: Sequence[Place],
    reasons: Mapping[str, str],
    quantizers: Mapping[str, InputQuantizer],
    device: torch.device,
    execution: Execution,
    activations: str | None = None,
) -> dict[str, KernelChoice]:
    """The kernel of every quantized layer, by original tensor name.

    places, reasons   of `find_places`
    quantizers        of inputs, by the path of the weight
    Raises SchemeError that lists all layers without a kernel, KernelError where the native module is not here.
    """
    if activations not in (None, "int8"):
        raise SchemeError(f"weight-only layers may get activations='int8', not {activations!r}")
    int8 = InputQuantizer(INT8_INPUTS) if activations == "int8" else None
    specs = {name: layer.scheme.weight for name, layer in layers.items()}
    return _choose(specs, places, reasons, quantizers, int8, device, execution)


def kernels_of_module(
    module: nn.Module,
    matrices: Mapping[str, Matrix],
    weights: Mapping[str, Sequence[QTensor]],
    quantizers: Mapping[str, InputQuantizer],
    execution: Execution,
) -> tuple[list[Place], dict[str, KernelChoice]]:
    """The places and the same for a module in memory, by parameter name. Raises as `choose_kernels` does."""
    places: list[Place] = []
    reasons: dict[str, str] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name in weights:
        matrix, owner = matrices[name], module.get_submodule(matrices[name].module)
        if module.get_parameter(name).ndim == 3 and matrix.role == "expert":
            places.append(stack_of(name, matrix))
        elif not name.endswith("weight"):
            reasons[name] = f"a weight of {type(owner).__name__}"
        else:
            found = place_of(module, name, owner, names[id(module.get_parameter(name))])
            if isinstance(found, str):
                reasons[name] = found
            else:
                places.append(found)
    devices = {parameter.device for parameter in module.parameters()}
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    specs = {name: parts[0].spec for name, parts in weights.items()}
    return places, _choose(specs, places, reasons, quantizers, None, device, execution)


def _choose(
    specs: Mapping[str, QuantSpec],
    places: Sequence[Place],
    reasons: Mapping[str, str],
    quantizers: Mapping[str, InputQuantizer],
    default: InputQuantizer | None,
    device: torch.device,
    execution: Execution,
) -> dict[str, KernelChoice]:
    if execution == "kernels":
        native()
    found: dict[str, KernelChoice] = {}
    without = _by_reason(reasons)
    for place in places:
        names = [f"{path}.weight" for path in place.paths] or [place.target]
        quantizer = next((quantizers[name] for name in names if name in quantizers), default)
        if place.kind == "embedding":
            quantizer = None
        for name in place.tensors:
            inputs = None if quantizer is None else quantizer.spec
            row = _row(place, specs[name], inputs, device.type, reference=execution == "reference")
            if isinstance(row, str):
                without.setdefault(row, []).append(name.removesuffix(".weight"))
            else:
                found[name] = KernelChoice(row, quantizer)
    if without:
        elsewhere = "" if device.type == "cpu" else ", or for device='cpu'"
        raise SchemeError(f"no kernel on {device.type} for {_listed(without)}: {_REMEDY}{elsewhere}")
    return found


def why_no_kernels(skeleton: nn.Module, anatomy: Anatomy, layers: Mapping[str, StoredLayer]) -> str | None:
    """What `choose_kernels` would say of these layers on a CPU, or None."""
    places, reasons = find_places(skeleton, anatomy, layers)
    without = _by_reason(reasons)
    for place in places:
        for name in place.tensors:
            scheme = layers[name].scheme
            row = _row(place, scheme.weight, scheme.input, "cpu", reference=False)
            if isinstance(row, str):
                without.setdefault(row, []).append(name.removesuffix(".weight"))
    return _listed(without) or None


def _row(place: Place, spec: QuantSpec, inputs: QuantSpec | None, device: str, *, reference: bool) -> Operator | str:
    """What serves a place, or why nothing does."""
    if place.kind == "embedding":
        return find_embedding(spec, device, reference=reference)
    reason = refuse_shared(spec) if place.kind == "tied" else None
    return reason or find_linear(spec, inputs, device, reference=reference)


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name.removesuffix(".weight"))
    return found


def run_packed_(
    model: nn.Module,
    place: Place,
    choices: Mapping[str, KernelChoice],
    read: Callable[[str], Sequence[PackedMatrix]],
    stored: Mapping[str, torch.dtype],
) -> None:
    """Put what runs packed weights into a place.

    choices  of `choose_kernels`; read: the matrices of a tensor; stored: the dtype it had when it was quantized
    """
    if place.kind == "experts":
        _run_experts_(model, place, choices, read, stored)
        return
    (name,) = place.tensors
    choice, matrix = choices[name], read(name)[0]
    if place.kind == "embedding":
        _share_(model, place, choice.row.kernel(matrix), stored[name])
    elif place.kind == "tied":
        _share_(model, place, choice.row.kernel(matrix, choice.quantizer), stored[name])
    else:
        old: Any = model.get_submodule(place.module)
        transposed = isinstance(old, Conv1D)
        kernel = choice.row.kernel(matrix, choice.quantizer)
        new = QuantLinear(kernel, old.bias, dtype=old.weight.dtype, stored=stored[name], transposed=transposed)
        put_in_place(model, place.module, new)


def _share_(model: nn.Module, place: Place, kernel: Any, stored: torch.dtype) -> None:
    """Embeddings, and the head if there is one, with one kernel; the first embedding's state_dict has the weight."""
    made: dict[int, nn.Module] = {}
    olds: dict[str, Any] = {path: model.get_submodule(path) for path in place.paths}
    for path in sorted(place.paths, key=lambda path: not isinstance(olds[path], nn.Embedding)):
        old = olds[path]
        if id(old) not in made and isinstance(old, nn.Embedding):
            made[id(old)] = quant_embedding(old, kernel, stored, tied=bool(made))
        elif id(old) not in made:
            made[id(old)] = QuantLinear(kernel, old.bias, dtype=old.weight.dtype, stored=stored, tied=True)
        put_in_place(model, path, made[id(old)])
    _forget_ties(model, {f"{path}.weight" for path in place.paths})


def _forget_ties(model: nn.Module, names: set[str]) -> None:
    """Layers that share a kernel have no parameters that transformers could tie again."""
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            tied: Any = part.get_expanded_tied_weights_keys()
            start = f"{prefix}." if prefix else ""
            kept = {target: source for target, source in tied.items() if start + target not in names}
            if len(kept) < len(tied):
                own: Any = part
                own._tied_weights_keys = kept
                own.all_tied_weights_keys = kept


def _run_experts_(
    model: nn.Module,
    place: Place,
    choices: Mapping[str, KernelChoice],
    read: Callable[[str], Sequence[PackedMatrix]],
    stored: Mapping[str, torch.dtype],
) -> None:
    owner, leaf = model.get_submodule(place.module), place.target.rpartition(".")[2]
    dtype = owner.get_parameter(leaf).dtype
    held: dict[str, Sequence[PackedMatrix]] = {}

    def layer(name: str, i: int) -> QuantLinear:
        if name not in held:
            held.clear()  # stacks on disk come one after the other
            held[name] = read(name)
        kernel = choices[name].row.kernel(held[name][i], choices[name].quantizer)
        return QuantLinear(kernel, dtype=dtype, stored=stored[name])

    experts = [[layer(name, i) for name, i in expert] for expert in place.parts]
    delattr(owner, leaf)
    owner.add_module(leaf, QuantExperts(experts, place.transposed))


def _listed(without: Mapping[str, list[str]]) -> str:
    """Modules by the reason why they have no kernel."""
    return "; ".join(f"{_few(names)} ({reason})" for reason, names in without.items())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
