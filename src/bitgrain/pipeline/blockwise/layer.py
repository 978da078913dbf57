"""One quantized tensor: its matrices solved with what calibration knows of their inputs, and its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.anatomy import Weight
from bitgrain.numerics import QuantSpec
from bitgrain.pipeline.experts import ALONE, BORROWED, FEW
from bitgrain.pipeline.layers import matrices, record, report
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.plan_text import learns_from_inputs
from bitgrain.recipes.recipe import Target
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments, Solution, Solver, get_solver
from bitgrain.solvers.beside import solve_beside
from bitgrain.solvers.guard import solve_guarded
from bitgrain.solvers.target import target_weight

UNREACHED = "the calibration text never reached it: rounded to nearest"


def wants_moments(plan: Plan, weight: Weight | None = None) -> bool:
    """Whether the moments of inputs are needed: in all blocks, or (`weight`) of one layer outside them."""
    layers = list(plan.quantized.values())
    if weight is not None and weight.block is None:
        layers = [plan.quantized[weight.tensor]]
    return learns_from_inputs(plan.recipe, layers)


def solve_layer(
    layer: StoredLayer,
    original: Tensor,
    moments: Mapping[Key, Moments],
    keys: Sequence[Key],
    solver: Solver,
    target: Target | None,
    outer_scale: Tensor | None,
    device: torch.device,
    columns: Sequence[Tensor] = (),
    notes: Mapping[Key, str] | None = None,
) -> list[Solution]:
    """One Solution for each matrix of `original` (as on disk); `keys`: as what each matrix's inputs were seen.

    columns: those that each matrix keeps in 16 bits, where the scheme says so. A matrix without moments under a solver
    that needs them is rounded to nearest, and says so; `notes`: what else is to be told of one, or why it has none.
    """
    notes = notes or {}
    solutions: list[Solution] = []
    for i, (matrix, key) in enumerate(zip(matrices(original, layer), keys, strict=True)):
        matrix = matrix.to(device, torch.float32)
        known = moments.get(key)
        label = layer.tensor if layer.experts == 1 else f"{layer.tensor}[{i}]"
        spec = layer.scheme.weight
        aim = None
        if target is not None and known is not None:
            settings = {"inputs": target.inputs, "residual": target.residual, "damping": target.damping}
            aim = target_weight(matrix, known, **settings, name=label)
        solve = partial(_solve_matrix, solver, outer_scale, label)
        if spec.columns is None:
            found = solve(matrix, spec, known, aim)
        else:
            kept = columns[i].to(device)
            found = solve_beside(solve, matrix, spec, kept, known, target=aim, name=label)
        note = notes.get(key, UNREACHED if known is None else "")
        told = bool(note) and (known is not None or solver.needs_calibration)
        solutions.append(replace(found, notes=(*found.notes, note)) if told else found)
    return solutions


def _solve_matrix(
    solver: Solver,
    outer_scale: Tensor | None,
    name: str,
    matrix: Tensor,
    spec: QuantSpec,
    known: Moments | None,
    aim: Tensor | None,
) -> Solution:
    if known is not None:
        return solve_guarded(matrix, spec, known, [solver], target=aim, outer_scale=outer_scale, name=name)
    if not solver.needs_calibration:
        return solver.solve(matrix, spec, outer_scale=outer_scale, name=name)
    return get_solver("rtn").solve(matrix, spec, outer_scale=outer_scale, name=name)


def record_of(layer: StoredLayer, original: Tensor, solutions: Sequence[Solution]) -> dict[str, Any]:
    """What the manifest says of a layer: errors against its weights, which candidate won, by how much."""
    errors = [
        report(matrix.to(solution.q.codes.device, torch.float32), solution.q)
        for matrix, solution in zip(matrices(original, layer), solutions, strict=True)
    ]
    figures: dict[str, float] = {}
    for solution in solutions:
        for key, value in solution.figures.items():
            figures[key] = max(figures.get(key, value), value)
    methods = sorted({solution.method for solution in solutions})
    return {**record(errors), "method": " + ".join(methods), "figures": figures, "notes": _notes(solutions)}


def _notes(solutions: Sequence[Solution]) -> list[str]:
    """Each note once; of a stack of experts it says of which."""
    places: dict[str, list[int]] = {}
    for i, solution in enumerate(solutions):
        for note in solution.notes:
            places.setdefault(note, []).append(i)
    if len(solutions) == 1:
        return list(places)
    return [f"expert{'s' * (len(of) > 1)} {', '.join(map(str, of))}: {note}" for note, of in places.items()]


def dense_of(layer: StoredLayer, solutions: Sequence[Solution]) -> Tensor:
    """The weights as an engine decodes them, in their shape on disk."""
    parts = [solution.q.dequantize(layer.dtype) for solution in solutions]
    parts = [part.T.contiguous() if layer.transposed else part for part in parts]
    return torch.stack(parts) if layer.experts > 1 else parts[0]


def loss_note(module: str, solutions: Sequence[Solution]) -> str:
    """ "layers.0.mlp.up_proj: gptq, 0.41 of rtn's loss" for the progress line."""
    measured = [solution.figures for solution in solutions if "rtn_loss" in solution.figures]
    methods = "+".join(sorted({solution.method for solution in solutions}))
    total = sum(figures["rtn_loss"] for figures in measured)
    share = f", {sum(figures['loss'] for figures in measured) / total:.2f} of rtn's loss" if total > 0 else ""
    few = sum(not {ALONE, BORROWED, FEW, UNREACHED}.isdisjoint(solution.notes) for solution in solutions)
    told = "" if not few else ", hardly reached" if len(solutions) == 1 else f", {few} experts hardly reached"
    return f"{module}: {methods}{share}{told}"
