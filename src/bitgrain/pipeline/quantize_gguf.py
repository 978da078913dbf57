"""Quantize into one GGUF file: the job's folder, in bitgrain's layout, is made beside it and then becomes the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bitgrain.checkpoints.gguf.model import SUFFIX
from bitgrain.errors import OutputError
from bitgrain.pipeline.convert_gguf import is_gguf, wanted_type, write_gguf
from bitgrain.pipeline.output_files import MANIFEST, RECIPE
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.quantize import QuantizeResult, run_plan
from bitgrain.pipeline.stored import open_stored
from bitgrain.progress import Progress, make_progress

WORK = ".quantized"
"""Ends the name of the folder that becomes the file."""


def run_plan_into(
    plan: Plan,
    out: str | Path,
    layout: str | None = None,
    *,
    device: str = "auto",
    restart: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """`run_plan`; for the layouts "gguf" and "gguf:TYPE", which `plan` was made for as "bitgrain", into a file.

    Killed at any moment, the same call goes on. Raises OutputError where the name of `out` does not fit `layout`, and
    what `run_plan` and `write_gguf` raise.
    """
    out = Path(out)
    if layout is None or not is_gguf(layout):
        if out.suffix == SUFFIX:
            raise OutputError(f"{out} is the name of a GGUF file: quantize with --layout gguf, or name a folder")
        return run_plan(plan, out, device=device, restart=restart, progress=progress)
    if out.suffix != SUFFIX or out.exists():
        raise OutputError(f"{out}: {'exists already' if out.exists() else f'a GGUF file has a name in {SUFFIX}'}")
    wanted, folder = wanted_type(layout), out.with_name(out.name + WORK)
    plan.require_possible()
    if folder.exists() and restart and (folder / MANIFEST).is_file():
        shutil.rmtree(folder)
    if folder.exists() and (folder / RECIPE).read_text(encoding="utf-8") != plan.recipe.to_yaml():
        raise OutputError(f"{folder} is left of a run with other settings: remove it, or give --restart")
    if not folder.exists():
        run_plan(plan, folder, device=device, restart=restart, progress=progress)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    made = write_gguf(
        open_stored(folder),
        plan.source.name,
        out,
        wanted,
        trust_remote_code=plan.trust_remote_code,
        progress=progress or make_progress("quiet"),
    )
    shutil.rmtree(folder)
    written, elements = open_stored(out), sum(layer.elements for layer in made.layers.values())
    told = {
        "layout": "gguf",
        "notes": [*manifest["notes"], *made.notes],
        "bytes_after": made.nbytes,
        "bits_per_weight": 8 * sum(written.nbytes(name) for name in made.layers) / elements,
    }
    return QuantizeResult(out, plan, {**manifest, **told})
