"""The same rounding as the disk job, on a module in memory: weights become their dequantized values, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import PlanError, SchemeError
from bitgrain.models.fused import sibling_groups
from bitgrain.models.structure import Matrix, find_matrices
from bitgrain.numerics import QTensor, QuantSpec, quantize
from bitgrain.pipeline.load import input_quantizer_for, shared_columns
from bitgrain.recipes import Recipe, Scheme, get_scheme, make_recipe
from bitgrain.runtime.activations import quantize_expert_inputs, quantize_inputs
from bitgrain.solvers import get_solver
from bitgrain.solvers.beside import solve_matrix
from bitgrain.solvers.rtn import has_one_outer_scale, shared_outer_scale


@dataclass(frozen=True)
class _Layer:
    """A matrix in memory as recipe rules see it."""

    matrix: Matrix

    @property
    def module(self) -> str:
        return self.matrix.name.removesuffix(".weight")

    @property
    def memory_module(self) -> str:
        return self.matrix.module

    @property
    def class_name(self) -> str:
        return self.matrix.class_name

    @property
    def role(self) -> str:
        return self.matrix.role


@torch.no_grad()
def quantize_(module: nn.Module, scheme: str | Scheme | Recipe) -> dict[str, list[QTensor]]:
    """Quantize the linear layers (and stacked experts) of any torch module in place, by simulation.

    scheme  a preset's name, a Scheme, or a Recipe (rules, solver, what to do with indivisible groups)
    Returns the QTensors by parameter name, one for each stacked matrix. Parameters then hold the dequantized values in
    their own dtype; layers whose scheme quantizes activations get an input quantizer. Embeddings, lm_head and
    routers are kept unless a rule of the recipe names them.
    Raises SchemeError, RecipeError, PlanError (groups that do not divide), NumericsError (NaN, Inf).
    """
    recipe = scheme if isinstance(scheme, Recipe) else None
    fixed = scheme if isinstance(scheme, Scheme) else get_scheme(scheme) if isinstance(scheme, str) else None
    found = find_matrices(module)
    layers = [_Layer(matrix) for matrix in found.values() if matrix.role != "conv"]
    assigned = (recipe or make_recipe(scheme="W8A16")).assign(layers)
    if fixed is not None:
        assigned = [None if one is None else fixed for one in assigned]
    on_indivisible = recipe.on_indivisible if recipe else "error"
    chosen: dict[str, Scheme] = {}
    first: dict[int, str] = {}  # the name under which a shared parameter was met first
    for layer, one in zip(layers, assigned, strict=True):
        if one is not None:
            name, parameter = layer.matrix.name, module.get_parameter(layer.matrix.name)
            settled = _settle(layer.matrix, parameter, one, on_indivisible)
            if settled is None:
                continue
            other = first.setdefault(id(parameter), name)
            if settled != chosen.setdefault(other, settled):
                raise PlanError(f"{name} and {other} are one parameter; give them one scheme")
    if not chosen:
        raise PlanError("the module has no layer that this scheme would quantize")
    solver = get_solver(recipe.solver if recipe else "rtn")
    outer = _outer_scales(module, found, chosen)
    results: dict[str, list[QTensor]] = {}
    for name, one in chosen.items():
        parameter, matrix = module.get_parameter(name), found[name]
        parts = [
            solve_matrix(solver, weight, one.weight, outer_scale=outer.get(name), name=name).q
            for weight in _matrices(parameter.data, matrix)
        ]
        dense = [part.dequantize(parameter.dtype) for part in parts]
        dense = [part.T if matrix.transposed else part for part in dense]
        parameter.data.copy_(torch.stack(dense) if matrix.experts > 1 else dense[0])
        results[name] = parts
    _attach(module, found, chosen, results)
    return results


def quantize_tensor(x: Tensor, spec: str | QuantSpec | Scheme, **settings: Any) -> QTensor:
    """Round one tensor [.., features]; `spec`: a QuantSpec, or a scheme (its weight spec). See `numerics.quantize`."""
    if isinstance(spec, str):
        spec = get_scheme(spec)
    return quantize(x, spec.weight if isinstance(spec, Scheme) else spec, **settings)


def _settle(matrix: Matrix, parameter: Tensor, scheme: Scheme, on_indivisible: str) -> Scheme | None:
    rows, cols = parameter.shape[-2:][::-1] if matrix.transposed else parameter.shape[-2:]
    scheme = scheme.for_dtype(parameter.dtype)
    if scheme.needs_calibration:
        raise SchemeError(
            f"{scheme.name} has {_from_text(scheme)}, which only text can give: use bitgrain.quantize (from disk to "
            "disk, with calibration), or a scheme with dynamic activations and no columns kept by activation"
        )
    if matrix.role == "embedding" and scheme.input is not None:
        raise PlanError(f"{matrix.name}: {scheme.name} would quantize token ids; give embeddings a weight-only scheme")
    reason = scheme.indivisible(rows, cols)
    if reason is None or on_indivisible == "pad":
        return scheme
    if on_indivisible == "skip":
        return None
    if on_indivisible == "channel":
        return scheme.by_channel()
    raise PlanError(f"{matrix.name}: {reason}; use a recipe with on_indivisible pad, channel or skip")


def _matrices(parameter: Tensor, matrix: Matrix) -> list[Tensor]:
    stack = list(parameter) if matrix.experts > 1 else [parameter]
    return [one.T.contiguous() if matrix.transposed else one for one in stack]


def _outer_scales(module: nn.Module, found: Mapping[str, Matrix], chosen: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """As for the disk job: layers that engines fuse share the scale of their scales."""
    members = [
        (name, found[name].module, module.get_parameter(name).shape[-1]) for name in chosen if found[name].experts == 1
    ]
    outer: dict[str, Tensor] = {}
    for group in sibling_groups(members):
        schemes = {repr(chosen[name]): chosen[name] for name in group}
        spec = next(iter(schemes.values())).weight
        if len(schemes) == 1 and has_one_outer_scale(spec):
            weights = [_matrices(module.get_parameter(name).data, found[name])[0] for name in group]
            outer.update(dict.fromkeys(group, shared_outer_scale(weights, spec)))
    return outer


def _from_text(scheme: Scheme) -> str:
    columns = scheme.weight.columns
    return "columns kept by activation" if columns and columns.needs_inputs else "static activation scales"


def _attach(
    module: nn.Module,
    found: Mapping[str, Matrix],
    chosen: Mapping[str, Scheme],
    results: Mapping[str, Sequence[QTensor]],
) -> None:
    experts: dict[str, dict[str, Any]] = {}
    for name, scheme in chosen.items():
        if scheme.input is None:
            continue
        columns = [part.columns.index for part in results[name] if part.columns is not None]
        quantizer = input_quantizer_for(scheme.input, columns=shared_columns(columns, name))
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight":
            quantize_inputs(module.get_submodule(owner), quantizer)
        else:
            experts.setdefault(owner, {})[leaf] = quantizer
    for owner, quantizers in experts.items():
        quantize_expert_inputs(module.get_submodule(owner), quantizers)
