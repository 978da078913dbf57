"""What a conversion did, and the small files that it writes beside the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.reader import INDEX_FILE
from bitgrain.checkpoints.shard_writer import PART
from bitgrain.checkpoints.shards import ShardLayout, index_bytes
from bitgrain.pipeline.output_files import MANIFEST
from bitgrain.pipeline.stored_model import StoredModel

_ROUND_TRIP = ("README.md",)
"""Files beside the weights that speak of the layout they were written in."""


@dataclass(frozen=True)
class Converted:
    """What `convert` did.

    layers     by original tensor, as they are stored now
    changed    (tensor, before, after) of those whose spec had to be said otherwise
    notes      what else is not as it was, in sentences
    tracing_s  seconds that tracing the model took, for ONNX
    """

    out: Path
    layout: str
    layers: Mapping[str, StoredLayer]
    changed: tuple[tuple[str, str, str], ...]
    nbytes: int
    notes: tuple[str, ...] = ()
    tracing_s: float = 0.0


def changed(stored: StoredModel, layers: Mapping[str, StoredLayer]) -> tuple[tuple[str, str, str], ...]:
    """(tensor, before, after) of layers whose spec had to be said otherwise."""
    pairs = ((name, stored.layers[name].scheme.weight, layer.scheme.weight) for name, layer in layers.items())
    return tuple((name, old.describe(), new.describe()) for name, old, new in pairs if old.describe() != new.describe())


def write_side_files(
    stored: StoredModel,
    to: str,
    layers: Collection[StoredLayer],
    job: JobFolder,
    shards: Sequence[ShardLayout],
    files: Mapping[str, bytes],
    with_code: bool,
) -> None:
    """Tokenizer, recipe, `files` (config.json among them), and a manifest with everything's hash."""
    hashes: dict[str, dict[str, Any]] = {}
    beside = {name: data for name, data in stored.side_files(with_code).items() if name not in _ROUND_TRIP}
    for name, data in {**beside, **files}.items():
        job.write_bytes(name, data)
        hashes[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    hashes |= dict(_weight_hashes(job, shards))
    left_out = sorted(stored.layers.keys() - {layer.tensor for layer in layers})
    manifest = {
        "format": 1,
        "converted": {"from": stored.kind, "to": to, "version": version("bitgrain")},
        "layout": to,
        "layers": [
            {"tensor": layer.tensor, "role": layer.role, "weight": layer.scheme.weight.describe()} for layer in layers
        ],
        **({"left_out": left_out} if left_out else {}),
        "files": dict(sorted(hashes.items())),
    }
    job.write_bytes(MANIFEST, as_json(manifest))


def _weight_hashes(job: JobFolder, shards: Sequence[ShardLayout]) -> Iterator[tuple[str, dict[str, Any]]]:
    for shard in shards:
        path = job.files / (shard.file + PART)
        with (path if path.exists() else job.files / shard.file).open("rb") as file:
            yield shard.file, {"bytes": shard.nbytes, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if (index := index_bytes(shards)) is not None:
        yield INDEX_FILE, {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}


def as_json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
