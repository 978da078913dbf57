"""A quantized checkpoint as a folder of safetensors in another layout, one unit of tensors after the other on each
thread; killed at any moment, it goes on where it was."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from bitgrain.checkpoints.disk_space import check_disk_space
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.layout import Layout, StoredLayer, encode_packed
from bitgrain.checkpoints.shards import TensorSpec, plan_shards
from bitgrain.errors import CheckpointError
from bitgrain.pipeline.converted import Converted, as_json, changed, write_side_files
from bitgrain.pipeline.spelling import respelled, spell_all
from bitgrain.pipeline.stored_model import StoredModel
from bitgrain.pipeline.units import write_units
from bitgrain.progress import Progress


def convert_folder(
    stored: StoredModel,
    target: Layout,
    out: Path,
    *,
    max_shard_bytes: int,
    trust_remote_code: bool,
    restart: bool,
    progress: Progress,
) -> Converted:
    """Write `stored` to the new folder `out`. Raises as `convert.convert`."""
    if not stored.layers:
        raise CheckpointError(f"{stored.path} is not quantized: there is nothing to convert to {target.name}")
    layers = spell_all(stored, target, progress)
    kept = _kept(stored)
    settings = target.config(list(layers.values()), kept)  # what cannot stand in one checkpoint is said now
    outputs: dict[str, list[TensorSpec]] = {
        name: target.tensors(layers[name]) if name in layers else [TensorSpec(name, one.dtype, tuple(one.shape))]
        for name, one in stored.originals().items()
    }
    shards = plan_shards([spec for specs in outputs.values() for spec in specs], max_shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    check_disk_space(out, total)
    with JobFolder.open(out, _fingerprint(stored, target), shards, restart=restart) as job:

        def make(name: str) -> dict[str, Tensor]:
            return _written(stored, target, layers.get(name), name)

        hashes = write_units(job, shards, outputs, make, target.name, progress)
        for key in ("kv_cache_scheme", "online_rotations", "reordered_norms"):
            if stored.config.get(key):
                settings[key] = stored.config[key]
        files = {"config.json": as_json({**stored.model_config, **dict.fromkeys(target.keys, settings)})}
        write_side_files(stored, target.name, layers.values(), job, files, hashes, trust_remote_code)
        job.finish()
    return Converted(out, target.name, layers, changed(stored, layers), total)


def _written(stored: StoredModel, target: Layout, layer: StoredLayer | None, name: str) -> dict[str, Tensor]:
    """The tensors of one original tensor, as the target has them."""
    if layer is None:
        return {name: stored.read(name)}
    return encode_packed(target, layer, respelled(stored, layer), stored.inputs(name))


def _fingerprint(stored: StoredModel, target: Layout) -> dict[str, Any]:
    """What must be the same for a half-done conversion to be resumed."""
    return {"job": "convert", "to": target.name, **stored.fingerprint(), "version": version("bitgrain")}


def _kept(stored: StoredModel) -> list[tuple[str, str, str]]:
    """Linear layers that are not quantized, as `Layout.config` wants them."""
    originals = stored.originals()
    modules = [name.removesuffix(".weight") for name in stored.kept() if name.endswith(".weight")]
    wide = [m for m in modules if len(originals[f"{m}.weight"].shape) == 2 and "embed" not in m]
    if "lm_head" not in wide and "lm_head.weight" not in stored.layers:
        wide.append("lm_head")
    return [(module, module, "Linear") for module in wide]
