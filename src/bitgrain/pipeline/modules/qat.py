"""Quantization-aware training of a module in memory: prepared in place, trained by any loop, converted back.

Between `prepare` and `convert` every quantized weight is a parametrization (`torch.nn.utils.parametrize`) of the latent
weight, and inputs go through fake quantizers, so that the module's own forward, any optimizer and transformers'
`Trainer` work as they do without. The fake quantizers are those of the disk job's training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from bitgrain.errors import ModelError
from bitgrain.models.fused import sibling_groups
from bitgrain.models.structure import find_matrices
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.formats import FP32, Format
from bitgrain.numerics.observers import StaticInput, shared_input
from bitgrain.numerics.ranges import MinMax
from bitgrain.pipeline.modules.quantize import quantize_
from bitgrain.recipes import Recipe, Scheme, get_scheme, make_recipe
from bitgrain.recipes.spec_model import SchemeModel
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.convolutions import input_quantizer_of, quantize_layer_inputs
from bitgrain.training.inputs import LearnedInput
from bitgrain.training.latent import FakeQuantizedParameter, latent_weight

_RECIPE = "qat_recipe"


def prepare(
    module: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    start: Mapping[str, Sequence[QTensor]] | None = None,
    observe: int = 50,
    learn_inputs: bool = True,
) -> nn.Module:
    """Put fake quantizers with learned scales on the weights and inputs of `module`, in place; returns it.

    scheme   a preset's name, a Scheme, or a Recipe (rules, solver, ranges), as for `quantize_`, whose codes and scales
             are where training starts; static scales of inputs are allowed
    start    QTensors by parameter name to start from instead: what `quantize_` returned for a module of this shape with
             another solver or range
    observe  batches in training mode over which limits of static inputs are observed; learn_inputs: whether their
             scales are learned afterwards, or stay
    The weights become latent weights, moved into the cells of their codes: the module computes at once what `quantize_`
    would leave. Raises what `quantize_` raises, ModelError for a module that is prepared already.
    """
    if is_prepared(module):
        raise ModelError("the module is prepared for quantization-aware training already: convert it first")
    recipe = scheme if isinstance(scheme, Recipe) else make_recipe(scheme=_model_of(scheme))
    plain, static = _with_dynamic_inputs(recipe)
    matrices = find_matrices(module)
    with torch.no_grad():
        originals = {name: module.get_parameter(name).clone() for name in matrices}
    qtensors: dict[str, Sequence[QTensor]] = {**quantize_(module, plain)}
    for name, parts in (start or {}).items():
        if name not in qtensors or not _alike(parts, qtensors[name]):
            for one, weight in originals.items():
                module.get_parameter(one).data.copy_(weight)
            raise ModelError(f"start holds {name}, which the scheme does not quantize, or not so")
        qtensors[name] = parts
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, parts in qtensors.items():
        parameter = module.get_parameter(name)
        view = FakeQuantizedParameter(parts, matrices[name].transposed)
        weights = view.matrices(originals.pop(name))
        latents = [latent_weight(q, weight) for q, weight in zip(parts, weights, strict=True)]
        parameter.data.copy_(view.joined(latents, parameter))
        for shared in owners[id(parameter)]:
            parametrize.register_parametrization(*_split(module, shared), view)
        owner, _ = _split(module, name)
        quantizer = input_quantizer_of(owner)
        if quantizer is not None and quantizer.spec in static:
            spec = static[quantizer.spec].with_scale_dtype(_storage(parts[0].spec))
            quantize_layer_inputs(owner, LearnedInput(spec, observe, learn_inputs).to(parameter.device))
    setattr(module, _RECIPE, recipe)
    return module


@dataclass(frozen=True)
class Converted(Mapping[str, list[QTensor]]):
    """What training came to: QTensors by parameter name, one for each stacked matrix, as from `quantize_`.

    inputs  the static scales of inputs, by the names of the weights that they are multiplied with
    recipe  what was asked for
    """

    qtensors: dict[str, list[QTensor]]
    inputs: dict[str, StaticInput]
    recipe: Recipe

    def __getitem__(self, name: str) -> list[QTensor]:
        return self.qtensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.qtensors)

    def __len__(self) -> int:
        return len(self.qtensors)


@torch.no_grad()
def convert(module: nn.Module) -> Converted:
    """End the training of a prepared module, in place: it is then as `quantize_` leaves one.

    Inputs that are the same for several layers (q, k, v) get one scale, as engines run them with one.
    Raises ModelError for a module that was not prepared.
    """
    if not is_prepared(module):
        raise ModelError("the module was not prepared for quantization-aware training: call prepare first")
    qtensors: dict[str, list[QTensor]] = {}
    seen: set[FakeQuantizedParameter] = set()
    for path, owner in list(module.named_modules()):
        if not parametrize.is_parametrized(owner):
            continue
        for leaf, chain in list(cast("Any", owner.parametrizations).items()):
            view = chain[0]
            if not isinstance(view, FakeQuantizedParameter):
                continue
            latent = chain.original
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
            if view not in seen:  # a shared parameter is the same object wherever it is used
                seen.add(view)
                parts = qtensors[f"{path}.{leaf}" if path else leaf] = view.commit(latent)
                latent.data.copy_(view.joined([part.dequantize(latent.dtype) for part in parts], latent))
    inputs = _freeze_inputs(module, qtensors)
    recipe = cast(Recipe, getattr(module, _RECIPE))
    delattr(module, _RECIPE)
    return Converted(qtensors, inputs, recipe)


def is_prepared(module: nn.Module) -> bool:
    """Whether `prepare` was called, and `convert` not yet."""
    return hasattr(module, _RECIPE)


def _freeze_inputs(module: nn.Module, qtensors: Mapping[str, Sequence[QTensor]]) -> dict[str, StaticInput]:
    owners = {name: _split(module, name)[0] for name in qtensors}
    found = {name: input_quantizer_of(owner) for name, owner in owners.items()}
    learned = {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, LearnedInput)}
    members = [(name, name.rpartition(".")[0], qtensors[name][0].shape[-1]) for name in learned]
    inputs: dict[str, StaticInput] = {}
    for group in sibling_groups(members):
        specs = {learned[name].spec for name in group}
        if len(specs) == 1:
            shared = shared_input([learned[name].freeze() for name in group], specs.pop())
            inputs.update(dict.fromkeys(group, shared))
    for name, quantizer in learned.items():
        static = inputs.setdefault(name, quantizer.freeze())
        quantize_layer_inputs(owners[name], InputQuantizer(quantizer.spec, static=static))
    return inputs


def _model_of(scheme: str | Scheme) -> str | SchemeModel:
    if isinstance(scheme, Scheme):
        return SchemeModel.of(scheme)
    get_scheme(scheme)
    return scheme


def _with_dynamic_inputs(recipe: Recipe) -> tuple[Recipe, dict[QuantSpec, QuantSpec]]:
    """The recipe with dynamic scales in place of static ones, and which specs stand for which."""
    stands_for: dict[QuantSpec, QuantSpec] = {}

    def changed(scheme: str | SchemeModel) -> SchemeModel:
        built = get_scheme(scheme) if isinstance(scheme, str) else scheme.build()
        if built.input is not None and not built.input.dynamic:
            dynamic = replace(built.input, dynamic=True)
            stands_for[dynamic] = built.input
            built = replace(built, input=dynamic)
        return SchemeModel.of(built)

    rules = [rule.model_copy(update={"scheme": rule.scheme and changed(rule.scheme)}) for rule in recipe.rules]
    plain = recipe.model_copy(update={"scheme": changed(recipe.scheme), "rules": tuple(rules)})
    return plain, stands_for


def _alike(parts: Sequence[QTensor], others: Sequence[QTensor]) -> bool:
    """Whether they have the same shapes and specs, but for how their ranges were chosen."""
    return [(q.shape, replace(q.spec, range=MinMax())) for q in parts] == [
        (q.shape, replace(q.spec, range=MinMax())) for q in others
    ]


def _storage(spec: QuantSpec) -> Format:
    """In which scales of this model are stored."""
    return FP32 if isinstance(spec.scale, QuantSpec) else spec.scale


def _split(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
