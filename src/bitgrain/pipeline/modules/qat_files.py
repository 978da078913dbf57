"""What training in memory came to, written as the disk job writes it: the same layout, manifest and recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.checkpoints.disk_space import check_disk_space
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.errors import PlanError
from bitgrain.models.anatomy import Weight
from bitgrain.pipeline.layers import matrices, record, report, to_cpu
from bitgrain.pipeline.modules.qat import Converted
from bitgrain.pipeline.output_files import fingerprint, write_output_files
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.planning import make_plan
from bitgrain.pipeline.quantize import QuantizeResult


@torch.no_grad()
def save(
    found: Converted, module: nn.Module, model: str | Path, out: str | Path, *, trust_remote_code: bool = False
) -> QuantizeResult:
    """Write a converted module into the new folder `out`, which `bitgrain.load`, `eval` and engines read.

    found   what `convert` returned for `module`; model: the folder or hub name that `module` was loaded from
    Parameters that are not quantized are written as the module has them now. Raises PlanError for a module of another
    shape, or whose quantized matrices do not lie one by one in the files of `model` (experts that are stacked in memory
    only: use `bitgrain train`); OutputError (`out` exists).
    """
    plan = make_plan(model, found.recipe, trust_remote_code=trust_remote_code, solved=True)
    plan.require_possible()
    weights = {weight.tensor: weight for weight in plan.anatomy.weights}
    names = {name: _memory_name(weights[name], found, plan) for name in plan.quantized}
    left = set(found) - set(names.values())
    if left:
        raise PlanError(f"{model} has no place for {sorted(left)[0]}, which the trained module quantizes")
    check_disk_space(Path(out), plan.bytes_after)
    state = {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}
    changed: list[str] = []
    told = {"training": {"in_memory": True}, "changed": changed}
    with JobFolder.open(Path(out), fingerprint(plan, torch.device("cpu")), plan.shards, restart=True) as job:
        for unit in plan.units:
            tensors: dict[str, Tensor] = {}
            records: dict[str, Any] = {}
            for name in unit.tensors:
                if name in plan.quantized:
                    encoded, records[name] = _layer(plan, name, names[name], found)
                    tensors.update(encoded)
                else:
                    tensors[name] = _kept(plan, name, state, changed)
            job.commit_unit(unit.name, tensors, {"layers": records})
        manifest = write_output_files(plan, job, told)
        job.finish()
    return QuantizeResult(Path(out), plan, manifest)


def _memory_name(weight: Weight, found: Converted, plan: Plan) -> str:
    name, layer = weight.memory, plan.quantized[weight.tensor]
    parts = found.get(name)
    shapes = {part.shape for part in parts or ()}
    if parts is None or len(weight.targets) > 1 or len(parts) != layer.experts or shapes != {layer.shape}:
        raise PlanError(
            f"{weight.tensor} is not what the module quantizes as {name}: save writes matrices that lie one by one in "
            "memory as in the files; bitgrain train trains all others"
        )
    return name


def _layer(plan: Plan, name: str, memory: str, found: Converted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layer = plan.quantized[name]
    parts = [to_cpu(part) for part in found[memory]]
    static = found.inputs.get(memory)
    inputs = [static] * layer.experts if static is not None and layer.static_input is not None else []
    originals = matrices(plan.checkpoint.read(name), layer)
    figures = record(report(matrix, part) for matrix, part in zip(originals, parts, strict=True))
    return plan.layout.encode(layer, parts, inputs), figures


def _kept(plan: Plan, name: str, state: Mapping[str, Tensor], changed: list[str]) -> Tensor:
    """A tensor that is not quantized, as the module has it; its name joins `changed` where it is not the original's."""
    original = plan.checkpoint.read(name)
    mine = state.get(plan.anatomy.memory_of.get(name, name))
    if mine is None or mine.shape != original.shape:
        return original
    mine = mine.to("cpu", original.dtype)
    if not torch.equal(mine, original):
        changed.append(name)
        return mine.contiguous()
    return original
