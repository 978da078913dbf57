"""An adapter added to its base: a dense model on disk, which transformers loads and `quantize` takes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from bitgrain.checkpoints.durable import fsync_folder, fsync_tree, output_errors
from bitgrain.checkpoints.job_folder import check_new, partial_folder
from bitgrain.errors import OutputError, PlanError
from bitgrain.models.materialize import quiet_transformers
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.load import load
from bitgrain.pipeline.output_files import side_files
from bitgrain.training.lora import load_adapter, merge_lora

_MARK = "merging"


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write `model` with the adapter of the folder `adapter` added to its weights into the new folder `out`.

    dtype: of the weights (None: as `model` loads). `out` appears only when it is whole. Quantizers of inputs are left
    out. Raises OutputError, CheckpointError (an adapter of another model), PlanError (a rotation of inputs that cannot
    be folded into a weight), ModelError.
    """
    out = Path(out)
    check_new(out)
    source = resolve_model(model)
    base = load(source.path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, low_bit=True)
    merged: Any = merge_lora(load_adapter(base, adapter))
    rotated = [path for path, part in merged.named_modules() if getattr(part, "input_rotation", None) is not None]
    if rotated:
        raise PlanError(f"{rotated[0]} rotates its inputs at run time, and has no packed weight to fold that into")
    partial = _fresh(partial_folder(out))
    files = partial / "files"
    with quiet_transformers():
        merged.save_pretrained(files)
    for path in side_files(source.path, trust_remote_code):
        if not (files / path.name).exists():
            shutil.copyfile(path, files / path.name)
    fsync_tree(files)
    with output_errors(out):
        os.rename(files, out)
        shutil.rmtree(partial)
    fsync_folder(out.parent)
    return out


def _fresh(partial: Path) -> Path:
    """An empty folder of that name; one that a killed merge left is removed. Raises OutputError for any other."""
    with output_errors(partial):
        if partial.exists():
            if not (partial / _MARK).is_file():
                raise OutputError(f"{partial}: is in the way, and is no half-done merge. Move it away.")
            shutil.rmtree(partial)
        partial.mkdir()
        (partial / _MARK).touch()
    return partial
