"""What a calibrated job keeps between its passes, so that a killed one goes on at the block where it was.

    work/block-00003.safetensors   the tensors of a solved block as they will be written, and its records
    work/hidden-00004.safetensors  the hidden states that enter the next block
    work/latent-block-00003.safetensors   for training: the block's weights before they were rounded, where transforms
                                   changed them
    work/training.safetensors      where the training is

A file appears whole or not at all. The hidden states that enter block i + 1 are there before block i counts as solved,
and those that enter block i are removed afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitgrain.checkpoints.durable import fsync_file, fsync_folder, output_errors


class Work:
    """The folder `JobFolder.work` of a calibrated job. Raises OutputError where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
        """Durable when it returns. `record`: JSON."""
        path, scratch = self._path(name), self.folder / "scratch"
        with output_errors(path):
            metadata = {"record": json.dumps(record or {})}
            save_file(_apart(tensors), scratch, metadata)
            fsync_file(scratch)
            os.replace(scratch, path)
        fsync_folder(self.folder)

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def record(self, name: str) -> dict[str, Any]:
        with safe_open(self._path(name), framework="pt") as file:
            return json.loads(file.metadata()["record"])

    def tensors(self, name: str, only: Sequence[str] | None = None) -> dict[str, Tensor]:
        """All tensors of a file, or those of `only` that it holds."""
        with safe_open(self._path(name), framework="pt") as file:
            held = set(file.keys())
            found = {key: file.get_tensor(key) for key in (file.keys() if only is None else only) if key in held}
        # aligned as computed ones are: products of the same values then have the same bits
        return {key: tensor if tensor.data_ptr() % 64 == 0 else tensor.clone() for key, tensor in found.items()}

    def one(self, name: str, key: str) -> Tensor:
        """One tensor of a file."""
        return self.tensors(name, [key])[key]

    def keys(self, name: str) -> set[str]:
        with safe_open(self._path(name), framework="pt") as file:
            return set(file.keys())

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own, as safetensors wants them: fused layers may share a scale."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        found[key] = tensor.clone() if tensor.data_ptr() in known else tensor
        known.add(tensor.data_ptr())
    return found


def block_file(index: int) -> str:
    return f"block-{index:05d}"


def hidden_file(index: int) -> str:
    return f"hidden-{index:05d}"


def latent_file(file: str) -> str:
    return f"latent-{file}"


OUTSIDE = "outside"
"""The file of what lies outside the blocks."""
TUNED = "tuned"
"""The file of what the tuning of the whole model changed: its tensors stand above those of the other files."""
TRAINED = "trained"
"""The same of the best state that training has reached so far: above `TUNED`."""
TRAINING = "training"
"""The file of all that training needs to go on."""
FINISHED = "finished"
"""The last file: nothing is left to solve."""
