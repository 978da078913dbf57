"""The main job, disk to disk: read a unit, round it, write it, journal it, free it.

Memory is bounded by the units in flight, one for each worker thread. Every unit is worked on by one thread with torch's
own parallelism off, so the bytes do not depend on how many workers there are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.disk_space import check_disk_space
from bitgrain.checkpoints.job_folder import JobFolder, partial_folder
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import ModelError, NumericsError, PlanError
from bitgrain.numerics import QTensor
from bitgrain.pipeline.blockwise.job import solve_blockwise, solved_unit
from bitgrain.pipeline.blockwise.work import FINISHED, Work
from bitgrain.pipeline.layers import kept, matrices, outer_scales, record, report, to_cpu
from bitgrain.pipeline.output_files import fingerprint, write_output_files
from bitgrain.pipeline.plan import Plan, Unit
from bitgrain.pipeline.saved import saved_record, solve_saved_unit
from bitgrain.pipeline.threads import work_through
from bitgrain.progress import Progress, make_progress
from bitgrain.runtime.device import resolve_device
from bitgrain.runtime.memory import return_freed_memory
from bitgrain.solvers import Solver, get_solver
from bitgrain.solvers.beside import solve_matrix

_FINAL = (NumericsError, ModelError, PlanError)


@dataclass(frozen=True)
class QuantizeResult:
    """Where the result is, and the manifest that lies in it."""

    out: Path
    plan: Plan
    manifest: Mapping[str, Any]


def run_plan(
    plan: Plan,
    out: str | Path,
    *,
    device: str = "auto",
    restart: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Carry `plan` out into the folder `out`, which appears only when it is whole.

    Killed at any moment, the same call resumes; the result is byte-identical. `restart` throws a half-done run away.
    Of a run that ends in one of the first three below nothing is left: it cannot be resumed, only repaired.
    Raises NumericsError (NaN, Inf), ModelError (a model that the recipe cannot calibrate), PlanError (problems in the
    plan, not enough disk), OutputError (`out` exists), ResumeError (a half-done run with other settings or sources),
    CheckpointError (a file is damaged).
    """
    plan.require_possible()
    return_freed_memory()
    out = Path(out)
    where = resolve_device(device)
    check_disk_space(out, plan.bytes_after)
    progress = progress or make_progress("quiet")
    with JobFolder.open(out, fingerprint(plan, where), plan.shards, restart=restart) as job:
        todo = [unit for unit in plan.units if unit.name not in job.done]
        total = sum(unit.nbytes for unit in plan.units)
        verb = "quantize" if plan.calibration is None else "write"
        try:
            passes = None if plan.calibration is None or not todo else Work(job.work)
            if passes is not None:
                solve_blockwise(plan, passes, where, progress)
            progress.start(total, "bytes", f"{verb} {plan.source.name}", done=total - sum(u.nbytes for u in todo))
            for unit in _solve_all(plan, todo, job, where, passes):
                progress.advance(unit.nbytes, unit.name)
        except _FINAL:  # no run with these sources and settings gets further: leave nothing to resume
            shutil.rmtree(job.files)
            shutil.rmtree(partial_folder(out))
            raise
        finally:
            progress.finish()
        passes = Work(job.work) if plan.calibration is not None else None
        told = passes.record(FINISHED) if passes is not None and passes.has(FINISHED) else None
        if plan.statistics is not None:
            told = saved_record(plan)
        manifest = write_output_files(plan, job, told)
        job.finish()
    return QuantizeResult(out, plan, manifest)


def _solve_all(
    plan: Plan, todo: list[Unit], job: JobFolder, device: torch.device, passes: Work | None
) -> Iterator[Unit]:
    """Solve and commit every unit; yields each when it is durable. The first error ends the run, resumable."""
    solver = get_solver(plan.recipe.solver)

    def work(unit: Unit) -> Unit:
        if passes is not None:
            tensors, records = solved_unit(plan, unit, passes)
        elif plan.statistics is not None:
            tensors, records = solve_saved_unit(plan, unit, device)
        else:
            tensors, records = _solve_unit(plan, unit, solver, device)
        job.commit_unit(unit.name, tensors, {"layers": records})
        return unit

    return work_through(work, todo, plan.workers)


def _solve_unit(
    plan: Plan, unit: Unit, solver: Solver, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The output tensors of a unit, and what is to be known of each quantized layer."""
    outputs: dict[str, Tensor] = {}
    records: dict[str, dict[str, Any]] = {}
    layers = {name: plan.quantized[name] for name in unit.tensors if name in plan.quantized}
    outer = outer_scales(layers, plan.fused_groups, plan.checkpoint.read, device)
    for name in unit.tensors:  # in functions of their own, so that one original is freed before the next is read
        layer = plan.quantized.get(name)
        if layer is None:
            outputs[name] = kept(plan.checkpoint, name)
        else:
            parts, records[name] = _solve_layer(plan, layer, solver, outer.get(name), device)
            outputs.update(plan.layout.encode(layer, parts))
            del parts
    return outputs, records


def _solve_layer(
    plan: Plan, layer: StoredLayer, solver: Solver, outer_scale: Tensor | None, device: torch.device
) -> tuple[list[QTensor], dict[str, Any]]:
    """One QTensor for each matrix of a layer, and its record."""
    parts: list[QTensor] = []
    reports: list[dict[str, Any]] = []
    for i, matrix in enumerate(matrices(plan.checkpoint.read(layer.tensor), layer)):
        matrix = matrix.to(device)
        label = layer.tensor if layer.experts == 1 else f"{layer.tensor}[{i}]"
        q = solve_matrix(solver, matrix, layer.scheme.weight, outer_scale=outer_scale, name=label).q
        reports.append(report(matrix, q))
        parts.append(to_cpu(q))
    return parts, record(reports)
