"""Convert: the same numbers in another engine's layout, or a refusal. Nothing is ever rounded anew.

Each quantized layer is respelled (`numerics.respell`) in the first spec of the target under which every dequantized
number stays the same; what is kept in full precision is copied. Two passes: the first decides every layer's spec, so
that a refusal comes before the first byte; the second writes, one tensor at a time, and can be killed and resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.disk_space import check_disk_space
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.layouts import get_layout
from bitgrain.checkpoints.reader import INDEX_FILE
from bitgrain.checkpoints.shard_writer import PART
from bitgrain.checkpoints.shards import ShardLayout, TensorSpec, index_bytes, plan_shards
from bitgrain.errors import PlanError, SchemeError
from bitgrain.models.source import resolve_model
from bitgrain.numerics import QTensor
from bitgrain.numerics.respell import respell
from bitgrain.pipeline.output_files import MANIFEST, side_files
from bitgrain.pipeline.planning import DEFAULT_SHARD_BYTES
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.progress import Progress, make_progress

_ROUND_TRIP = ("README.md",)
"""Files beside the weights that speak of the layout they were written in."""


@dataclass(frozen=True)
class Converted:
    """What `convert` did. layers: by original tensor, as they are stored now; changed: (tensor, before, after) of those
    whose spec had to be said otherwise."""

    out: Path
    layout: str
    layers: Mapping[str, StoredLayer]
    changed: tuple[tuple[str, str, str], ...]
    nbytes: int


def convert(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    trust_remote_code: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write the quantized checkpoint `model` to the new folder `out` in the layout called `to`.

    Raises PlanError with every layer that the target cannot hold exactly, and why; CheckpointError, SchemeError (no
    such layout, or layers that cannot stand in one checkpoint), OutputError.
    """
    target, out = get_layout(to), Path(out)
    stored = QuantizedCheckpoint(resolve_model(model).path)
    progress = progress or make_progress("quiet")
    layers = _spell_all(stored, target, progress)
    target.config(list(layers.values()), _kept(stored))  # what cannot stand in one checkpoint is said now
    outputs: list[TensorSpec] = []
    for name in stored.originals():
        if name in layers:
            outputs += target.tensors(layers[name])
        else:
            entry = stored.checkpoint.entries[name]
            outputs.append(TensorSpec(name, entry.dtype, entry.shape))
    shards = plan_shards(outputs, max_shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    check_disk_space(out, total)
    with JobFolder.open(out, _fingerprint(stored, target), shards, restart=restart) as job:
        todo = [name for name in stored.originals() if name not in job.done]
        progress.start(len(todo), "tensors", f"writing {target.name}")
        try:
            for name in todo:
                job.commit_unit(name, _written(stored, target, layers.get(name), name))
                progress.advance(1, name)
        finally:
            progress.finish()
        _write_side_files(stored, target, list(layers.values()), job, shards, trust_remote_code)
        job.finish()
    changed = tuple(
        (name, stored.layers[name].scheme.weight.describe(), layer.scheme.weight.describe())
        for name, layer in layers.items()
        if layer.scheme.weight.describe() != stored.layers[name].scheme.weight.describe()
    )
    return Converted(out, target.name, layers, changed, total)


def _spell_all(stored: QuantizedCheckpoint, target: Layout, progress: Progress) -> dict[str, StoredLayer]:
    """Every layer as the target stores it. Raises PlanError."""
    found: dict[str, StoredLayer] = {}
    problems: list[str] = []
    computed = [key for key in ("online_rotations", "reordered_norms") if stored.config.get(key)]
    if computed and target.name != "bitgrain":
        problems.append(f"{target.name} has no place for what is computed at run time: {', '.join(computed)}")
    if stored.config.get("kv_cache_scheme") and target.name not in ("bitgrain", "compressed-tensors"):
        problems.append(f"{target.name} has no place for the scales of keys and values")
    progress.start(len(stored.layers), "layers", "comparing")
    try:
        for name, layer in stored.layers.items():
            chosen = spell(stored, layer, target)
            if isinstance(chosen, str):
                problems.append(chosen)
            else:
                found[name] = chosen
            progress.advance(1, name)
    finally:
        progress.finish()
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise PlanError(
            f"{stored.folder} cannot be said exactly in {target.name}:\n  " + "\n  ".join(problems[:5]) + more
        )
    return found


def spell(stored: QuantizedCheckpoint, layer: StoredLayer, target: Layout) -> StoredLayer | str:
    """`layer` under the first spec of the target that says the same numbers, or why there is none."""
    parts: list[QTensor] | None = None
    reasons: list[str] = []
    inexact: list[str] = []
    for spec in dict.fromkeys(target.spellings(layer)):
        candidate = replace(layer, scheme=replace(layer.scheme, weight=spec))
        refusal = target.refusal(candidate)
        if refusal is None and spec == layer.scheme.weight:
            return candidate
        if refusal is None:
            parts = stored.quantized(layer.tensor) if parts is None else parts
            try:
                for part in parts:
                    respell(part, spec, layer.dtype)
                return candidate
            except SchemeError as error:
                inexact.append(f"{layer.module}: as {spec.describe()}: {error}")
                continue
        reasons.append(refusal)
    return (inexact or reasons)[0]


def _written(stored: QuantizedCheckpoint, target: Layout, layer: StoredLayer | None, name: str) -> dict[str, Tensor]:
    """The tensors of one original tensor, as the target has them."""
    if layer is None:
        return {name: stored.checkpoint.read(name)}
    with torch.inference_mode():
        spec = layer.scheme.weight
        parts = [q if q.spec == spec else respell(q, spec, layer.dtype) for q in stored.quantized(name)]
        return target.encode(layer, parts, stored.inputs(name))


def _fingerprint(stored: QuantizedCheckpoint, target: Layout) -> dict[str, Any]:
    """What must be the same for a half-done conversion to be resumed."""
    config = (stored.folder / "config.json").read_bytes()
    return {
        "job": "convert",
        "to": target.name,
        "source": stored.checkpoint.fingerprint(),
        "config": hashlib.sha256(config).hexdigest(),
        "version": version("bitgrain"),
    }


def _write_side_files(
    stored: QuantizedCheckpoint,
    target: Layout,
    layers: Sequence[StoredLayer],
    job: JobFolder,
    shards: Sequence[ShardLayout],
    with_code: bool,
) -> None:
    """config.json, tokenizer, recipe and a manifest with everything's hash."""
    hashes: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        job.write_bytes(name, data)
        hashes[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for path in [*side_files(stored.folder, with_code), *stored.folder.glob("recipe.yaml")]:
        if path.name not in _ROUND_TRIP:
            put(path.name, path.read_bytes())
    config: dict[str, Any] = json.loads((stored.folder / "config.json").read_text(encoding="utf-8"))
    settings = target.config(layers, _kept(stored))
    for key in ("kv_cache_scheme", "online_rotations", "reordered_norms"):
        if stored.config.get(key):
            settings[key] = stored.config[key]
    for key in stored.layout.keys:
        config.pop(key, None)
    config |= dict.fromkeys(target.keys, settings)
    put("config.json", _json(config))
    for name, digest in _weight_hashes(job, shards):
        hashes[name] = digest
    manifest = {
        "format": 1,
        "converted": {"from": stored.layout.name, "to": target.name, "version": version("bitgrain")},
        "layout": target.name,
        "layers": [
            {"tensor": layer.tensor, "role": layer.role, "weight": layer.scheme.weight.describe()} for layer in layers
        ],
        "files": dict(sorted(hashes.items())),
    }
    job.write_bytes(MANIFEST, _json(manifest))


def _kept(stored: QuantizedCheckpoint) -> list[tuple[str, str, str]]:
    """Linear layers that are not quantized, as `Layout.config` wants them."""
    modules = [name.removesuffix(".weight") for name in stored.kept() if name.endswith(".weight")]
    wide = [m for m in modules if len(stored.checkpoint.entries[f"{m}.weight"].shape) == 2 and "embed" not in m]
    if "lm_head" not in wide and "lm_head.weight" not in stored.layers:
        wide.append("lm_head")
    return [(module, module, "Linear") for module in wide]


def _weight_hashes(job: JobFolder, shards: Sequence[ShardLayout]) -> Iterator[tuple[str, dict[str, Any]]]:
    for shard in shards:
        path = job.files / (shard.file + PART)
        with (path if path.exists() else job.files / shard.file).open("rb") as file:
            yield shard.file, {"bytes": shard.nbytes, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if (index := index_bytes(shards)) is not None:
        yield INDEX_FILE, {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
