"""The plan as JSON: for scripts, and for the manifest."""

from __future__ import annotations

from typing import Any

from bitgrain.pipeline.plan import Plan


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, for scripts (`bitgrain plan --json`)."""
    return {
        "model": plan.source.name,
        "architecture": plan.anatomy.architecture,
        "layout": plan.layout.name,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight,
        "bits_per_parameter": plan.bits_per_parameter,
        "peak_ram_bytes": plan.peak_ram,
        "parameters": sum(plan.anatomy.sizes.values()),
        "coverage": plan.coverage(),
        "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in plan.shards],
        "layers": [
            {
                "module": planned.weight.module,
                "role": planned.weight.role,
                "shape": [planned.weight.out_features, planned.weight.in_features],
                "experts": planned.weight.experts,
                "scheme": planned.layer.scheme.name if planned.layer else None,
                "weight": planned.layer.scheme.weight.describe() if planned.layer else None,
                "note": planned.note,
            }
            for planned in plan.layers
        ],
        "engines": [
            {"engine": v.engine, "version": v.version, "loads": v.loads, "reasons": list(v.reasons)}
            for v in plan.engines
        ],
        "problems": list(plan.problems),
        "notes": list(plan.notes),
    }
