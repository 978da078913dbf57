"""What a conversion did, and the small files that it writes beside the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.layout import StoredLayer
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
    files: Mapping[str, bytes],
    weights: Mapping[str, dict[str, Any]],
    with_code: bool,
) -> None:
    """Tokenizer, recipe, `files` (config.json among them), and a manifest with everything's size and hash, those of
    `weights` as given."""
    hashes = dict(weights)
    beside = {name: data for name, data in stored.side_files(with_code).items() if name not in _ROUND_TRIP}
    for name, data in {**beside, **files}.items():
        job.write_bytes(name, data)
        hashes[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
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


def as_json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
