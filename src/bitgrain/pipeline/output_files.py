"""The files beside the weights: config, tokenizer, recipe.yaml, manifest.json and the model card.

Nothing in them depends on when, where or with how many threads the job ran, so a resumed run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.kv_scales import config_of
from bitgrain.checkpoints.reader import INDEX_FILE
from bitgrain.checkpoints.shard_writer import PART
from bitgrain.checkpoints.shards import ShardLayout, index_bytes
from bitgrain.pipeline.card import model_card
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.plan_json import plan_to_json

MANIFEST, RECIPE = "manifest.json", "recipe.yaml"
_VERSIONS = ("bitgrain", "torch", "transformers", "safetensors", "compressed-tensors")
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm")
_NOT_COPIED = ("config.json", INDEX_FILE, MANIFEST)
_LICENSES = ("license", "notice", "use_policy")


def fingerprint(plan: Plan, device: torch.device) -> dict[str, Any]:
    """What must be the same for a half-done run to be resumed: settings, sources, versions."""
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "layout": plan.layout.name,
        "device": device.type,
        "calibration": None if plan.calibration is None else plan.calibration.description["sha256"],
        "training": None if plan.training is None else plan.training.description["sha256"],
        "statistics": None if plan.statistics is None else plan.statistics.sha256,
        "source": {"name": plan.source.name, "revision": plan.source.revision, **plan.checkpoint.fingerprint()},
        "config": _sha256((plan.source.path / "config.json").read_bytes()),
        "versions": _versions(),
    }


def write_output_files(plan: Plan, job: JobFolder, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything but the weights; returns the manifest. `told`: what else the manifest says of the job."""
    hashes: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        job.write_bytes(name, data)
        hashes[name] = {"bytes": len(data), "sha256": _sha256(data)}

    for path in side_files(plan.source.path, plan.trust_remote_code):
        put(path.name, path.read_bytes())
    put("config.json", _config(plan, told or {}))
    put(RECIPE, plan.recipe.to_yaml().encode())
    for shard in plan.shards:
        hashes[shard.file] = {"bytes": shard.nbytes, "sha256": _shard_sha256(job.files, shard)}
    if (index := index_bytes(plan.shards)) is not None:
        hashes[INDEX_FILE] = {"bytes": len(index), "sha256": _sha256(index)}
    manifest = {**_manifest(plan, job), **(told or {})}
    put("README.md", model_card(plan, manifest).encode())
    manifest["files"] = dict(sorted(hashes.items()))
    job.write_bytes(MANIFEST, _json(manifest))
    return manifest


def side_files(folder: Path, with_code: bool) -> list[Path]:
    """What a model folder holds beside weights and config.json: tokenizer, chat template, licences, ..."""
    suffixes = (*_COPIED, ".py") if with_code else _COPIED
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".safetensors.index.json")
        and (path.suffix in suffixes or path.name.lower().startswith(_LICENSES))
    )


def _config(plan: Plan, told: Mapping[str, Any]) -> bytes:
    """The source's config.json as it is, plus `quantization_config`."""
    config = json.loads((plan.source.path / "config.json").read_text(encoding="utf-8"))
    kept = [
        (p.weight.module, p.weight.memory_module, p.weight.class_name)
        for p in plan.layers
        if p.layer is None and p.weight.role in ("linear", "expert", "router", "lm_head")
    ]
    if not any(p.weight.role == "lm_head" for p in plan.layers):
        kept += [("lm_head", "lm_head", "Linear")]  # tied to the embeddings: a linear in memory that is not on disk
    if plan.decodes_to_bfloat16:
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
    settings = plan.layout.config(list(plan.quantized.values()), kept)
    if plan.cache is not None:
        settings["kv_cache_scheme"] = config_of(plan.cache.scheme)
    for key in ("online_rotations", "reordered_norms"):  # what is computed at run time
        if told.get(key):
            settings[key] = told[key]
    config |= dict.fromkeys(plan.layout.keys, settings)
    return _json(config)


def _manifest(plan: Plan, job: JobFolder) -> dict[str, Any]:
    records: dict[str, dict[str, Any]] = {}
    for unit in plan.units:
        records.update(job.done[unit.name].get("layers", {}))
    layers: list[dict[str, Any]] = []
    for planned in plan.layers:
        weight, layer = planned.weight, planned.layer
        entry: dict[str, Any] = {"tensor": weight.tensor, "role": weight.role, "scheme": None}
        if layer is not None:
            nbytes = sum(tensor.nbytes for tensor in plan.layout.tensors(layer))
            entry["scheme"] = layer.scheme.name
            entry["weight"] = layer.scheme.weight.describe()
            entry["input"] = layer.scheme.input.describe() if layer.scheme.input else None
            entry["bits_per_weight"] = 8 * nbytes / layer.elements
            entry.update(records[weight.tensor])
        if planned.note:
            entry["note"] = planned.note
        layers.append(entry)
    described = plan_to_json(plan)
    summary = {key: described[key] for key in _SUMMARY}
    return {"format": 1, **summary, "solver": plan.recipe.solver, "layers": layers, "versions": _versions()}


_SUMMARY = (
    *("model", "architecture", "layout", "parameters", "coverage", "bytes_before", "bytes_after", "bits_per_weight"),
    *("bits_per_parameter", "engines", "notes"),
)


def _shard_sha256(folder: Path, shard: ShardLayout) -> str:
    path = folder / (shard.file + PART)
    with (path if path.exists() else folder / shard.file).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
