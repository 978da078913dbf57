"""Convert: the same numbers in another engine's layout, or a refusal. Nothing is ever rounded anew.

Each quantized layer is respelled (`numerics.respell`) in the first spec of the target under which every dequantized
number stays the same; what is kept in full precision is copied. Two passes: the first decides every layer's spec
(`spelling`), so that a refusal comes before the first byte; the second writes (`convert_folder`, `convert_gguf`,
`convert_onnx`), a few tensors at a time.
"""

from __future__ import annotations

from pathlib import Path

from bitgrain.checkpoints.job_folder import check_new, partial_folder
from bitgrain.checkpoints.layouts import get_layout
from bitgrain.checkpoints.onnx.forms import FORMS
from bitgrain.errors import PlanError
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.convert_folder import convert_folder
from bitgrain.pipeline.convert_gguf import is_gguf, wanted_type, write_gguf
from bitgrain.pipeline.convert_onnx import convert_onnx
from bitgrain.pipeline.converted import Converted, changed
from bitgrain.pipeline.planning import DEFAULT_SHARD_BYTES
from bitgrain.pipeline.stored import open_stored
from bitgrain.progress import Progress, make_progress


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
    """Write the quantized checkpoint `model` to the new folder `out` in the layout called `to`, or as ONNX
    (`pipeline.convert_onnx`).

    to  a layout's name; "gguf" or "gguf:TYPE": a GGUF file (`convert_gguf`), also of a model that is not quantized
    Raises PlanError with every layer that the target cannot hold exactly, and why; CheckpointError, SchemeError (no
    such layout, or layers that cannot stand in one checkpoint), OutputError.
    """
    progress = progress or make_progress("quiet")
    source, name, out = resolve_model(model, gguf=True), to.lower(), Path(out)
    check_new(out, resumed=partial_folder(out).exists())  # said now, not after everything was compared, or traced
    if name in FORMS and max_shard_bytes != DEFAULT_SHARD_BYTES:
        raise PlanError(f"{to} has all its numbers in one file: leave --max-shard-size out")
    target = None if is_gguf(name) or name in FORMS else get_layout(to, others=("gguf", *FORMS))
    stored = open_stored(source.path)
    if target is not None:
        return convert_folder(
            stored,
            target,
            out,
            max_shard_bytes=max_shard_bytes,
            trust_remote_code=trust_remote_code,
            restart=restart,
            progress=progress,
        )
    if name in FORMS:
        return convert_onnx(
            stored,
            source,
            FORMS[name],
            out,
            trust_remote_code=trust_remote_code,
            restart=restart,
            progress=progress,
        )
    wanted = wanted_type(name)
    made = write_gguf(stored, source.name, out, wanted, trust_remote_code=trust_remote_code, progress=progress)
    return Converted(out, name, made.layers, changed(stored, made.layers), made.nbytes, made.notes)
