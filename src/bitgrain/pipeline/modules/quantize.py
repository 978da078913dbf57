"""The same rounding as the disk job, on a module in memory: weights become their dequantized values, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from bitgrain.errors import PlanError, RecipeError, SchemeError
from bitgrain.models.fused import sibling_groups
from bitgrain.models.structure import Matrix, find_matrices
from bitgrain.numerics import QTensor, QuantSpec, quantize
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.pipeline.execution import Execution, choose_execution, kernels_of_module, run_packed_
from bitgrain.pipeline.load import experts_run_one_by_one, input_quantizer_for, shared_columns
from bitgrain.pipeline.modules.calibrate import ModuleCalibration
from bitgrain.pipeline.modules.layer import choose_static_input, matrices, restored, solve_matrices
from bitgrain.recipes import Recipe, Scheme, get_scheme, make_recipe
from bitgrain.recipes.recipe import QUANTIZED_ROLES
from bitgrain.recipes.spec_model import SchemeModel
from bitgrain.runtime.activations import quantize_expert_inputs
from bitgrain.runtime.convolutions import check_inputs, quantize_layer_inputs
from bitgrain.solvers import get_solver
from bitgrain.solvers.rtn import has_one_outer_scale, shared_outer_scale


@dataclass(frozen=True)
class _Layer:
    """A matrix in memory as recipe rules see it."""

    matrix: Matrix
    place: int

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
def quantize_(
    module: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    calibration: ModuleCalibration | None = None,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    first_last: str | Scheme | None = None,
    execution: Execution = "dequantize",
) -> dict[str, list[QTensor]]:
    """Quantize the layers of any torch module in place, by simulation: linears, stacked experts, and convolutions.

    scheme       a preset's name, a Scheme, or a Recipe (rules, solver, what to do with indivisible groups)
    calibration  what `bitgrain.calibrate(module, batches)` saw: for static activations and solvers that need data
    keep, include  layers left in full precision, or quantized though no scheme reaches them by itself, named as `match`
                 in a recipe's rules: lm_head, embeddings and routers, and in transformers' models convolutions, as in
                 the disk job
    first_last   another scheme for the first and the last layer, or "keep"; with calibration in the order in which
                 layers run, else in that of the module tree
    execution    "dequantize": dense weights hold the rounded values, quantized activations are simulated; "kernels":
                 layers become ones that run packed weights (`runtime.quant_linear`, `quant_embedding`,
                 `quant_experts`), for inference;
                 "reference": likewise, by the kernels' twins
    Returns the QTensors by parameter name, one for each stacked matrix; a convolution's is [out, in/groups * kernel].
    Parameters then hold the dequantized values in their own dtype; layers whose scheme quantizes activations get an
    input quantizer. Where an error is raised, nothing has been changed.
    Raises SchemeError, RecipeError, PlanError (groups that do not divide), StatisticsError (a layer that calibration
    did not reach, or another module's calibration), NumericsError (NaN, Inf), KernelError (no native module).
    """
    choose_execution(execution, low_bit=False)
    recipe = _recipe(scheme, keep, include, first_last)
    found = find_matrices(module)
    if calibration is not None:
        calibration.check(module)
    order = calibration.order if calibration is not None else tuple(found)
    places = {name: 2 * place for place, name in enumerate(order)}
    # a layer that never ran is neither the first nor the last
    layers = [_Layer(matrix, places.get(name, 1)) for name, matrix in found.items()]
    roles = QUANTIZED_ROLES if isinstance(module, PreTrainedModel) else (*QUANTIZED_ROLES, "conv")
    chosen: dict[str, Scheme] = {}
    first: dict[int, str] = {}  # the name under which a shared parameter was met first
    for layer, one in zip(layers, recipe.assign(layers, roles), strict=True):
        if one is not None:
            name = layer.matrix.name
            settled = _settle(module, layer.matrix, one, recipe.on_indivisible, calibration is not None)
            if settled is None:
                continue
            other = first.setdefault(id(module.get_parameter(name)), name)
            if settled != chosen.setdefault(other, settled):
                raise PlanError(f"{name} and {other} are one parameter; give them one scheme")
    if not chosen:
        raise PlanError("the module has no layer that this scheme would quantize")
    _only_rounding(recipe, list(chosen.values()))
    solver = get_solver(recipe.solver)
    outer = _outer_scales(module, found, chosen)
    results = {
        name: solve_matrices(solver, module, found[name], one, calibration, outer.get(name))
        for name, one in chosen.items()
    }
    quantizers = {
        name: input_quantizer_for(
            one.input,
            static=choose_static_input(module, found[name], one.input, calibration),
            columns=shared_columns([part.columns.index for part in results[name] if part.columns is not None], name),
        )
        for name, one in chosen.items()
        if one.input is not None
    }
    packed = None if execution == "dequantize" else kernels_of_module(module, found, results, quantizers, execution)
    if any(found[name].role == "expert" for name in results):  # otherwise nobody sees the inputs of each
        experts_run_one_by_one(getattr(module, "config", None))
    if packed is not None:
        places, kernels = packed
        dtypes = {name: module.get_parameter(name).dtype for name in results}
        for place in places:
            run_packed_(module, place, kernels, lambda name: [PackedMatrix.of(part) for part in results[name]], dtypes)
        return results
    for name, parts in results.items():
        parameter = module.get_parameter(name)
        parameter.data.copy_(restored(module, found[name], [part.dequantize(parameter.dtype) for part in parts]))
    experts: dict[str, dict[str, Any]] = {}
    for name, quantizer in quantizers.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight":
            quantize_layer_inputs(module.get_submodule(owner), quantizer)
        else:
            experts.setdefault(owner, {})[leaf] = quantizer
    for owner, of_owner in experts.items():
        quantize_expert_inputs(module.get_submodule(owner), of_owner)
    return results


def quantize_tensor(x: Tensor, spec: str | QuantSpec | Scheme, **settings: Any) -> QTensor:
    """Round one tensor [.., features]; `spec`: a QuantSpec, or a scheme (its weight spec). See `numerics.quantize`."""
    if isinstance(spec, str):
        spec = get_scheme(spec)
    return quantize(x, spec.weight if isinstance(spec, Scheme) else spec, **settings)


def _recipe(
    scheme: str | Scheme | Recipe, keep: Sequence[str], include: Sequence[str], first_last: str | Scheme | None
) -> Recipe:
    """All that was asked for as one recipe: its own rules, then include, first and last, keep; later ones win."""
    if not isinstance(scheme, Recipe):
        built = get_scheme(scheme) if isinstance(scheme, str) else scheme
        scheme = make_recipe(scheme=SchemeModel.of(built))
    rules: list[Any] = [*scheme.rules, *({"match": name, "include": True} for name in include)]
    if isinstance(first_last, str) and first_last.lower() == "keep":
        rules += [{"match": match, "keep": True} for match in ("@first", "@last")]
    elif first_last is not None:
        built = get_scheme(first_last) if isinstance(first_last, str) else first_last
        rules += [{"match": match, "scheme": SchemeModel.of(built)} for match in ("@first", "@last")]
    rules += [{"match": name, "keep": True} for name in keep]
    return make_recipe(**{**scheme.model_dump(), "rules": rules})


def _only_rounding(recipe: Recipe, schemes: Sequence[Scheme]) -> None:
    """RecipeError for what a recipe asks for and only the disk job does."""
    asked = [name for name in ("target", "transforms") if getattr(recipe.for_schemes(schemes), name)]
    if any(tuned is not None for _, tuned in recipe.tuning):
        asked.append("tuning")
    if asked:
        raise RecipeError(
            f"quantize_ rounds layer by layer: the recipe's {' and '.join(asked)} need the disk job (bitgrain.quantize)"
        )


def _settle(module: nn.Module, matrix: Matrix, scheme: Scheme, on_indivisible: str, calibrated: bool) -> Scheme | None:
    parameter = module.get_parameter(matrix.name)
    if matrix.role == "conv":
        rows, cols = matrices(module, matrix)[0].shape
    else:
        rows, cols = parameter.shape[-2:][::-1] if matrix.transposed else parameter.shape[-2:]
    scheme = scheme.for_dtype(parameter.dtype)
    if scheme.needs_calibration and not calibrated:
        raise SchemeError(
            f"{scheme.name} has {_from_data(scheme)}, which only data can give: pass "
            "calibration=bitgrain.calibrate(module, batches), use bitgrain.quantize (from disk to disk, with text), or "
            "choose a scheme with dynamic activations and no columns kept by activation"
        )
    if matrix.role == "conv" and scheme.weight.columns is not None:
        raise SchemeError(f"{matrix.name}: the columns of a convolution are no channels: keep none of them in 16 bits")
    if matrix.role == "embedding" and scheme.input is not None:
        raise PlanError(f"{matrix.name}: {scheme.name} would quantize token ids; give embeddings a weight-only scheme")
    if scheme.input is not None and isinstance(module.get_submodule(matrix.module), NonDynamicallyQuantizableLinear):
        raise PlanError(
            f"{matrix.name}: torch's attention multiplies by it without calling its layer, so its inputs cannot be "
            "quantized; keep it (keep=[...]), or give it a weight-only scheme by a recipe's rule"
        )
    if matrix.role == "conv" and scheme.input is not None:
        check_inputs(scheme.input, matrix.name)
    reason = scheme.indivisible(rows, cols)
    if reason is None or on_indivisible == "pad":
        return scheme
    if on_indivisible == "skip":
        return None
    if on_indivisible == "channel":
        return scheme.by_channel()
    raise PlanError(f"{matrix.name}: {reason}; use a recipe with on_indivisible pad, channel or skip")


def _outer_scales(module: nn.Module, found: Mapping[str, Matrix], chosen: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """As for the disk job: layers that engines fuse share the scale of their scales."""
    members = [
        (name, found[name].module, module.get_parameter(name).shape[-1])
        for name in chosen
        if found[name].experts == 1 and found[name].role != "conv"
    ]
    outer: dict[str, Tensor] = {}
    for group in sibling_groups(members):
        schemes = {repr(chosen[name]): chosen[name] for name in group}
        spec = next(iter(schemes.values())).weight
        if len(schemes) == 1 and has_one_outer_scale(spec):
            weights = [matrices(module, found[name])[0] for name in group]
            outer.update(dict.fromkeys(group, shared_outer_scale(weights, spec)))
    return outer


def _from_data(scheme: Scheme) -> str:
    columns = scheme.weight.columns
    return "columns kept by activation" if columns and columns.needs_inputs else "static activation scales"
