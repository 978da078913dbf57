"""Statistics on disk: calibrate once, emit many bit widths, methods and formats.

A folder with one safetensors file for each block and `statistics.json`:

    version, bitgrain     of this layout, and of the program that wrote it
    model                 fingerprint of the checkpoint that was calibrated
    text, settings        descriptions from the caller (windows, sampling, sequential or parallel ...)
    layers                by key: file, place in it, tokens, in_features, exponent of the histogram, sha256

Tensors of the layer at place P: P.hessian float32 [in (in + 1) / 2], the upper triangle row by row; P.mean_abs, P.low,
P.high [in]; P.ends [batches, 2]; P.counts int64; P.rows [some, in]. Layers that read the same input share one place.
The folder takes its name only when it is whole; layers are read one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitgrain.calibration.statistics import LayerStatistics
from bitgrain.checkpoints.durable import fsync_file, fsync_folder, output_errors, replace_file
from bitgrain.errors import OutputError, StatisticsError

__all__ = ["About", "StatisticsFile", "StatisticsWriter", "open_statistics", "save_statistics"]

MANIFEST = "statistics.json"
UNFINISHED = "unfinished.json"
"""The manifest of the blocks that are there, while more are to come."""
LAYOUT_VERSION = 1
_FIELDS = ("mean_abs", "low", "high", "ends")


@dataclass(frozen=True)
class About:
    """What statistics are of. `text` and `settings` hold JSON values only.

    model  the fingerprint of the checkpoint
    """

    model: str
    text: Mapping[str, Any]
    settings: Mapping[str, Any]


class StatisticsWriter:
    """Writes `folder` block by block: `add` each block, then `finish`. Until then all is in `<folder>.partial`.

    A run with the same `about` that was killed is gone on with: `files` blocks are there already. Litter of another is
    replaced. What the caller puts into `<folder>.partial/work` is removed in the end. Raises OutputError if `folder`
    exists or cannot be written.
    """

    def __init__(self, folder: str | Path, about: About) -> None:
        self._folder, self._about = Path(folder), about
        self.partial = self._folder.with_name(self._folder.name + ".partial")
        self._layers: dict[str, dict[str, Any]] = {}
        self.files = 0
        if self._folder.exists():
            raise OutputError(f"{self._folder} exists already: name another folder for the statistics, or remove it")
        if self._go_on():
            return
        with output_errors(self.partial):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens each layer written so far has seen."""
        return {key: entry["tokens"] for key, entry in self._layers.items()}

    def add(self, layers: Mapping[str, LayerStatistics]) -> None:
        """Write one block's layers, by `layer_key`; an object given under several keys is stored once.

        A key that was written before is the caller's mistake: ValueError.
        """
        twice = sorted(layers.keys() & self._layers.keys())
        if twice:
            raise ValueError(f"statistics of {twice[0]} are written already")
        file = f"block-{self.files:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        places: dict[int, str] = {}
        sums: dict[str, str] = {}
        for key, statistics in layers.items():
            place = places.setdefault(id(statistics), str(len(places)))
            if place not in sums:
                stored = _tensors(statistics)
                tensors |= {f"{place}.{name}": tensor for name, tensor in stored.items()}
                sums[place] = _sha256(stored)
            self._layers[key] = {
                "file": file,
                "place": place,
                "tokens": statistics.tokens,
                "in_features": statistics.in_features,
                "exponent": None if statistics.counts is None else statistics.exponent,
                "sha256": sums[place],
            }
        path = self.partial / file
        with output_errors(path):
            try:
                save_file(tensors, path)
            except SafetensorError as error:
                raise OutputError(f"{path}: cannot be written ({error}); check the disk") from error
        fsync_file(path)
        self.files += 1
        self._write(UNFINISHED)

    def finish(self) -> None:
        """Write the manifest and give the folder its name."""
        self._write(MANIFEST)
        with output_errors(self._folder):
            (self.partial / UNFINISHED).unlink(missing_ok=True)
            if (self.partial / "work").exists():
                shutil.rmtree(self.partial / "work")
            os.rename(self.partial, self._folder)
        fsync_folder(self._folder.parent)

    def _head(self) -> dict[str, Any]:
        return {
            "version": LAYOUT_VERSION,
            "bitgrain": version("bitgrain"),
            "model": self._about.model,
            "text": dict(self._about.text),
            "settings": dict(self._about.settings),
        }

    def _write(self, name: str) -> None:
        data = (json.dumps({**self._head(), "layers": self._layers}, indent=1, ensure_ascii=False) + "\n").encode()
        replace_file(self.partial / name, data, self.partial / (name + ".part"))

    def _go_on(self) -> bool:
        """Take up what an earlier run with the same settings left."""
        try:
            manifest: dict[str, Any] = json.loads((self.partial / UNFINISHED).read_bytes())
        except (OSError, ValueError):
            return False
        layers = manifest.pop("layers", {})
        if manifest != json.loads(json.dumps(self._head())):
            return False
        self._layers, self.files = layers, len({entry["file"] for entry in layers.values()})
        return True


def save_statistics(folder: str | Path, about: About, blocks: Iterable[Mapping[str, LayerStatistics]]) -> None:
    """Write a whole folder at once; see `StatisticsWriter`."""
    writer = StatisticsWriter(folder, about)
    for layers in blocks:
        writer.add(layers)
    writer.finish()


class StatisticsFile:
    """An opened folder of statistics. Nothing but the manifest is read before `read`.

    sha256: of the manifest, which holds those of all layers.
    """

    def __init__(self, folder: Path, about: About, layers: Mapping[str, Mapping[str, Any]], sha256: str) -> None:
        self.folder, self.about, self.sha256 = folder, about, sha256
        self._layers = layers

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the layers, in the order in which they were written."""
        return tuple(self._layers)

    def __contains__(self, key: str) -> bool:
        return key in self._layers

    def tokens(self, key: str) -> int:
        """How many tokens the layer has seen. Raises StatisticsError for a layer that is not there."""
        return int(self._entry(key)["tokens"])

    @property
    def all_tokens(self) -> dict[str, int]:
        """The same of all layers."""
        return {key: int(entry["tokens"]) for key, entry in self._layers.items()}

    def place(self, key: str) -> tuple[str, str]:
        """Where a layer's statistics are: the same for layers that read the same input. Raises StatisticsError."""
        entry = self._entry(key)
        return str(entry["file"]), str(entry["place"])

    def read(self, key: str) -> LayerStatistics:
        """A layer's statistics, on the CPU. Raises StatisticsError: not there, or damaged."""
        entry = self._entry(key)
        path, place = self.folder / str(entry["file"]), entry["place"]
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(f"{place}.")]  # noqa: SIM118
                stored = {name.removeprefix(f"{place}."): file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise StatisticsError(f"{path} cannot be read ({error}): calibrate again") from error
        if _sha256(stored) != entry["sha256"]:
            raise StatisticsError(f"{path}: the statistics of {key} are damaged: calibrate again")
        hessian = stored.get("hessian")
        return LayerStatistics(
            tokens=int(entry["tokens"]),
            hessian=None if hessian is None else unpack_symmetric(hessian, int(entry["in_features"])),
            counts=stored.get("counts"),
            rows=stored.get("rows"),
            exponent=-1000 if entry["exponent"] is None else int(entry["exponent"]),
            **{name: stored[name] for name in _FIELDS},
        )

    def _entry(self, key: str) -> Mapping[str, Any]:
        if key not in self._layers:
            raise StatisticsError(
                f"{self.folder} has no statistics of {key} (it has {len(self._layers)} layers): calibrate again with "
                "the settings that reach this layer"
            )
        return self._layers[key]


def open_statistics(folder: str | Path, *, model: str | None = None) -> StatisticsFile:
    """Statistics that `StatisticsWriter` wrote; `model`: the fingerprint that they must be of.

    Raises StatisticsError: missing, unfinished, damaged, of a newer layout, or of another model.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        about = About(manifest["model"], manifest["text"], manifest["settings"])
        layout, layers = int(manifest["version"]), dict(manifest["layers"])
    except FileNotFoundError:
        raise StatisticsError(
            f"{folder} holds no statistics ({MANIFEST} is missing): name a folder that bitgrain calibrate wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StatisticsError(f"{path} is damaged ({error!r}): calibrate again") from error
    if layout != LAYOUT_VERSION:
        raise StatisticsError(f"{path} has layout {layout}, this bitgrain reads {LAYOUT_VERSION}: calibrate again")
    if model is not None and about.model != model:
        raise StatisticsError(
            f"{folder} was calibrated on another model (fingerprint {about.model[:16]}, this model has {model[:16]}): "
            "statistics fit only the very checkpoint that they were taken from; calibrate again"
        )
    return StatisticsFile(folder, about, layers, hashlib.sha256(data).hexdigest())


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle of [n, n], row by row: [n (n + 1) / 2]."""
    n = matrix.shape[0]
    packed = matrix.new_empty(n * (n + 1) // 2)
    end = 0
    for i in range(n):  # an index of the triangle would take four times its bytes
        packed[end : end + n - i] = matrix[i, i:]
        end += n - i
    return packed


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """The symmetric [n, n] of `pack_symmetric`."""
    matrix = packed.new_zeros(n, n)
    end = 0
    for i in range(n):
        matrix[i, i:] = packed[end : end + n - i]
        end += n - i
    upper = matrix.clone().fill_diagonal_(0)
    return matrix.add_(upper.T)


def _tensors(statistics: LayerStatistics) -> dict[str, Tensor]:
    found = {name: getattr(statistics, name).clone() for name in _FIELDS}  # safetensors wants no shared memory
    if statistics.hessian is not None:
        found["hessian"] = pack_symmetric(statistics.hessian.cpu())
    if statistics.counts is not None:
        found["counts"] = statistics.counts
    if statistics.rows is not None:
        found["rows"] = statistics.rows
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
