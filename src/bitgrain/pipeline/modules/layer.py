"""What `quantize_` does with one layer in memory: its matrices, their codes, the static scale of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitgrain.calibration.static_inputs import search_input
from bitgrain.errors import SchemeError
from bitgrain.models.structure import Matrix
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.convolution import Convolution, dense_matrix
from bitgrain.numerics.observers import StaticInput, static_channels, static_input
from bitgrain.numerics.ranges import OutputSearch
from bitgrain.pipeline.modules.calibrate import ModuleCalibration
from bitgrain.recipes import Scheme
from bitgrain.runtime.convolutions import geometry_of
from bitgrain.solvers import Solver
from bitgrain.solvers.beside import solve_matrix
from bitgrain.solvers.rtn import has_one_outer_scale, join_scales, shared_outer_scale

_MATRICES = 4
"""Of a stack of experts, by whose outputs `search` compares."""


def _geometry(module: nn.Module, matrix: Matrix) -> Convolution | None:
    return geometry_of(module.get_submodule(matrix.module)) if matrix.role == "conv" else None


def matrices(module: nn.Module, matrix: Matrix) -> list[Tensor]:
    """The [out, in] matrices of a parameter: one, or one for each stacked expert."""
    parameter = module.get_parameter(matrix.name).data
    geometry = _geometry(module, matrix)
    if geometry is not None:
        return [geometry.matrix(parameter)]
    stack = list(parameter) if matrix.experts > 1 else [parameter]
    return [one.T.contiguous() if matrix.transposed else one for one in stack]


def restored(module: nn.Module, matrix: Matrix, parts: list[Tensor]) -> Tensor:
    """The inverse of `matrices`."""
    geometry = _geometry(module, matrix)
    if geometry is not None:
        return geometry.weight(parts[0])
    parts = [part.T if matrix.transposed else part for part in parts]
    return torch.stack(parts) if matrix.experts > 1 else parts[0]


def solve_matrices(
    solver: Solver,
    module: nn.Module,
    matrix: Matrix,
    scheme: Scheme,
    calibration: ModuleCalibration | None,
    outer: Tensor | None,
) -> list[QTensor]:
    """The codes of each matrix. outer: the scale of the scales that it shares with others.

    Raises StatisticsError for a layer that calibration did not reach, where the solver needs it.
    """
    weights, spec, name = matrices(module, matrix), scheme.weight, matrix.name
    embedded = matrix.role == "embedding"
    unreached = calibration is not None and name not in calibration.layers and not solver.needs_calibration
    moments = [] if calibration is None or embedded or unreached else calibration.moments(name, matrix)
    if len(moments) in (0, len(weights)):
        known = moments or [None] * len(weights)
        size = _magnitude(spec, name, calibration)
        return [
            solve_matrix(solver, weight, spec, one, magnitude=size, outer_scale=outer, name=name).q
            for weight, one in zip(weights, known, strict=True)
        ]
    # a convolution with groups: a product for each, on inputs of its own
    nested = isinstance(spec.scale, QuantSpec)
    if spec.granularity.rows != 1 or spec.outliers or (nested and not has_one_outer_scale(spec)):
        if solver.needs_calibration:
            raise SchemeError(
                f"{name} is a convolution with groups, which a solver with calibration takes one by one: weights "
                f"{spec.describe()} would join them; choose scales per output channel, or keep it"
            )
        return [solver.solve(weights[0], spec, name=name).q]
    if nested:
        outer = shared_outer_scale(weights, spec, name)
    groups = [
        solver.solve(weight.contiguous(), spec, one, outer_scale=outer, name=name).q
        for weight, one in zip(weights[0].chunk(len(moments)), moments, strict=True)
    ]
    offsets = [q.offset for q in groups if q.offset is not None]
    codes, scale = torch.cat([q.codes for q in groups]), join_scales([q.scale for q in groups])
    return [QTensor.of(codes, scale, join_scales(offsets) if offsets else None, spec)]


def _magnitude(spec: QuantSpec, name: str, calibration: ModuleCalibration | None) -> Tensor | None:
    """[in]: mean |x| of the input channels, where columns are kept by it; experts of a stack share theirs."""
    if calibration is None or spec.columns is None or not spec.columns.needs_inputs:
        return None
    return calibration.of(name).statistics.mean_abs


def choose_static_input(
    module: nn.Module, matrix: Matrix, spec: QuantSpec, calibration: ModuleCalibration | None
) -> list[StaticInput]:
    """The scale of a layer's inputs where they are static, else nothing.

    Raises StatisticsError for a layer that calibration did not reach, SchemeError for a granularity or a range that
    cannot be.
    """
    if spec.dynamic:
        return []
    assert calibration is not None
    seen, name = calibration.of(matrix.name), matrix.name
    if (spec.granularity.rows, spec.granularity.cols) == (None, 1):
        return [static_channels(seen.statistics.low, seen.statistics.high, spec, name)]
    if not isinstance(spec.range, OutputSearch):
        return [static_input(seen.statistics.observed(spec.range), spec, name)]
    geometry = _geometry(module, matrix)
    weights = [dense_matrix(one, 1 if geometry is None else geometry.groups) for one in matrices(module, matrix)]
    ends = seen.statistics.ends
    low, high = float(ends[:, 0].amin()), float(ends[:, 1].amax())
    found, _ = search_input(seen.rows, weights[:_MATRICES], spec, low=low, high=high, name=name)
    return [found]
