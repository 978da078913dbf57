"""A checkpoint as one GGUF file, for llama.cpp: the same numbers, or a refusal.

Each quantized layer gets the block type under whose spec its numbers stay the same in float32, which is what llama.cpp
decodes to; other matrices keep their dtype, vectors and routers are float32. Two passes: the first decides every
tensor's type, so that a refusal comes before the first byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.disk_space import check_disk_space
from bitgrain.checkpoints.gguf.architectures import Architecture, architecture_of_model
from bitgrain.checkpoints.gguf.blocks import BlockType
from bitgrain.checkpoints.gguf.config import extra_tensors, metadata_of
from bitgrain.checkpoints.gguf.model import SUFFIX, is_offset, row_order
from bitgrain.checkpoints.gguf.names import Place, place_of
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES, get_type
from bitgrain.checkpoints.gguf.writer import GgufWriter, plan_gguf
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import OutputError, PlanError
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.naming import StoredTensor
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import ModelSource
from bitgrain.numerics.respell import respell_packed
from bitgrain.pipeline.gguf_tokenizer import tokenizer_of
from bitgrain.pipeline.gguf_types import choose_type, refusal
from bitgrain.pipeline.stored_model import StoredModel
from bitgrain.pipeline.threads import work_through
from bitgrain.progress import Progress

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALWAYS_F32 = ("ffn_gate_inp.weight", "position_embd.weight")
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
} | {"Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38}
"""`general.file_type`: llama.cpp's number for files that are mostly of a type."""


@dataclass(frozen=True)
class WrittenGguf:
    """What `write_gguf` did: the quantized layers by original tensor as they are now, and what the user is told."""

    layers: Mapping[str, StoredLayer]
    nbytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Output:
    """One tensor of the file: its type, and the original tensors it is made of, one for each matrix of a stack."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    originals: tuple[str, ...]


def is_gguf(to: str) -> bool:
    """Whether a target's name means a GGUF file."""
    return to.lower().partition(":")[0] == "gguf"


def wanted_type(to: str) -> BlockType | None:
    """The type in "gguf:TYPE"; None for plain "gguf". Raises SchemeError for an unknown one."""
    name = to.partition(":")[2]
    return get_type(name) if name else None


def write_gguf(
    stored: StoredModel,
    name: str,
    out: Path,
    wanted: BlockType | None,
    *,
    trust_remote_code: bool,
    progress: Progress,
) -> WrittenGguf:
    """Write `stored` as the new GGUF file `out`; `name`: what the model is called in it.

    wanted  the type of all quantized layers, or (F32, F16, BF16) of all matrices; None: the smallest that is exact
    Raises ModelError for an architecture that is not known, PlanError with every tensor that cannot be said exactly.
    """
    if out.suffix != SUFFIX:
        raise OutputError(f"{out}: a GGUF file has a name that ends in {SUFFIX}")
    if out.exists():
        raise OutputError(f"{out} exists already: choose another name, or remove it")
    config = load_config(ModelSource(stored.path, name, None), trust_remote_code, drop_quantization=True)
    raw: dict[str, Any] = config.to_dict()
    architecture = architecture_of_model(raw)
    metadata = metadata_of(raw, architecture)
    tokenizer = tokenizer_of(stored, raw, trust_remote_code)
    originals = stored.originals()
    unexpected = read_anatomy(build_skeleton(config, trust_remote_code), originals).unexpected
    job = _Job(stored, originals, architecture, raw, _places(originals, architecture, raw, unexpected))
    outputs, layers = _choose(job, wanted, progress)
    extra = extra_tensors(raw, architecture)
    shapes = [(one.name, one.type.name, one.shape) for one in outputs]
    shapes += [(name, "F32", tuple(tensor.shape)) for name, tensor in extra.items()]
    plan = plan_gguf({**_general(outputs, metadata, name), **tokenizer.metadata}, shapes)
    check_disk_space(out, plan.nbytes)
    progress.start(len(outputs), "tensors", "writing gguf")
    try:
        with GgufWriter(out, plan) as writer, torch.inference_mode():

            def work(one: _Output) -> str:
                parts = [_rows(job, original, one.type) for original in one.originals]
                writer.write(one.name, parts[0] if len(parts) == 1 else torch.cat(parts))
                return one.name

            for written in work_through(work, outputs):
                progress.advance(1, written)
            for extra_name, tensor in extra.items():
                writer.write(extra_name, BLOCK_TYPES["F32"].store(tensor))
            writer.finish()
    finally:
        progress.finish()
    return WrittenGguf(layers, plan.nbytes, (*tokenizer.notes, *_notes(job)))


@dataclass(frozen=True)
class _Job:
    """What is written: places has every original tensor that is, and where it goes; None where there is none."""

    stored: StoredModel
    originals: Mapping[str, StoredTensor]
    architecture: Architecture
    config: Mapping[str, Any]
    places: Mapping[str, Place | None]


def _places(
    originals: Iterable[str], architecture: Architecture, config: Mapping[str, Any], unexpected: Iterable[str]
) -> dict[str, Place | None]:
    found = {name: place_of(name, architecture.templates) for name in originals if name not in unexpected}
    if config["tie_word_embeddings"] and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        if not any(place is not None and place.name == "token_embd.weight" for place in found.values()):
            found["lm_head.weight"] = head and Place("token_embd.weight")  # the one of the two that was saved
    return found


def _choose(job: _Job, wanted: BlockType | None, progress: Progress) -> tuple[list[_Output], dict[str, StoredLayer]]:
    """Every tensor of the file, and the quantized layers as they will be. Raises PlanError."""
    stored = job.stored
    groups, problems = _groups(job)
    if wanted is not None and wanted.spec is not None and not stored.layers:
        remedy = f"bitgrain quantize --layout gguf --scheme GGUF_{wanted.name}"
        problems.append(f"it is not quantized: quantize it first ({remedy})")
    computed = [key for key in ("online_rotations", "reordered_norms", "kv_cache_scheme") if stored.config.get(key)]
    if computed:
        problems.append(f"gguf has no place for {', '.join(computed)}")
    outputs: list[_Output] = []
    layers: dict[str, StoredLayer] = {}

    def work(name: str) -> tuple[str, BlockType | str]:
        return name, _type_of(job, name, groups[name], wanted)

    types: dict[str, BlockType | str] = {}
    progress.start(len(groups), "tensors", "comparing")
    try:
        for name, type_ in work_through(work, groups) if not problems else ():
            types[name] = type_
            progress.advance(1, name)
        for name, originals in groups.items() if not problems else ():
            found = types[name]
            if isinstance(found, str):
                problems.append(found)
                continue
            outputs.append(_Output(name, found, _shape(job, originals), tuple(originals.values())))
            for original in originals.values():
                layer = stored.layers.get(original)
                if layer is not None and found.spec is not None:
                    scheme = replace(layer.scheme, name=found.name, weight=found.spec)
                    layers[original] = replace(layer, scheme=scheme, dtype=torch.float32)
    finally:
        progress.finish()
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        remedy = "\nLayers that fit are made by `bitgrain quantize --layout gguf`" if stored.layers else ""
        raise PlanError(
            f"{stored.path} cannot be said exactly in gguf:\n  " + "\n  ".join(problems[:5]) + more + remedy
        )
    return outputs, layers


def _groups(job: _Job) -> tuple[dict[str, dict[int, str]], list[str]]:
    """Tensor of the file -> its original tensors by their place in the stack; and what is wrong."""
    groups: dict[str, dict[int, str]] = {}
    problems: list[str] = []
    for original, place in job.places.items():
        if place is None:
            problems.append(f"{original}: {job.architecture.name} in llama.cpp has no tensor for it")
        else:
            groups.setdefault(place.name, {})[place.expert or 0] = original
    stacks = {name: dict(sorted(originals.items())) for name, originals in groups.items()}
    problems += [f"{name}: experts are missing" for name, one in stacks.items() if list(one) != list(range(len(one)))]
    return stacks, problems


def _type_of(job: _Job, name: str, originals: Mapping[int, str], wanted: BlockType | None) -> BlockType | str:
    """The type of one tensor, or why there is none."""
    stored = job.stored
    layers = [stored.layers.get(original) for original in originals.values()]
    shape = job.originals[next(iter(originals.values()))].shape
    if len(shape) == 1 or name.endswith(_ALWAYS_F32):
        return BLOCK_TYPES["F32"]
    floats = wanted is not None and wanted.spec is None
    if any(layer is None for layer in layers) or floats:
        plain = {job.originals[original].dtype for original in originals.values()}
        given = plain.pop() if len(plain) == 1 and not any(layers) else torch.float32
        if given not in _FLOATS:
            return f"{name}: numbers of {given}, which llama.cpp does not read"
        chosen = wanted if wanted is not None and floats else BLOCK_TYPES[_FLOATS[given]]
        dtype = chosen.dtype or torch.float32
        if dtype not in (torch.float32, given):
            for original in originals.values():
                values = stored.dense(original).to(torch.float32)
                if not torch.equal(values.to(dtype).to(torch.float32), values):
                    return f"{original}: not all of its numbers are in {chosen.name}; gguf:f32 holds them"
        return chosen
    first = layers[0]
    assert first is not None

    def refused(candidate: BlockType) -> str | None:
        each = (refusal(stored.layers[one], partial(stored.packed, one), candidate) for one in originals.values())
        return next(filter(None, each), None)

    return choose_type(first, wanted, refused)


def _shape(job: _Job, originals: Mapping[int, str]) -> tuple[int, ...]:
    original = next(iter(originals.values()))
    shape, place = tuple(job.originals[original].shape), job.places[original]
    assert place is not None
    if place.stem in job.architecture.transposed:
        shape = shape[::-1]
    return shape if place.expert is None else (len(originals), *shape)


def _rows(job: _Job, original: str, block_type: BlockType) -> Tensor:
    """One original tensor's bytes in the file: uint8 [rows, bytes of a row]."""
    place = job.places[original]
    assert place is not None
    if block_type.spec is not None:
        (packed,) = job.stored.packed(original)
        data = block_type.pack(respell_packed(packed, block_type.spec, compared=True))
        order = row_order(job.architecture, job.config, place, len(data), inverse=False)
        return data if order is None else data[order]
    return block_type.store(_values(job.stored.dense(original), place, job.architecture, job.config))


def _values(values: Tensor, place: Place, architecture: Architecture, config: Mapping[str, Any]) -> Tensor:
    """Plain numbers as llama.cpp has them."""
    if place.stem in architecture.transposed:
        values = values.T
    if is_offset(architecture, place):
        values = values.to(torch.float32) + 1
    order = row_order(architecture, config, place, values.shape[0], inverse=False)
    return values if order is None else values[order]


def _general(outputs: Sequence[_Output], metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Metadata that hold for all architectures, in front of the others."""
    sizes = Counter[str]()
    for one in outputs:
        sizes[one.type.name] += torch.Size(one.shape).numel()
    quantized = Counter({kind: size for kind, size in sizes.items() if BLOCK_TYPES[kind].spec is not None})
    matrices = Counter({one.type.name: sizes[one.type.name] for one in outputs if len(one.shape) > 1})
    kind = (quantized or matrices).most_common(1)[0][0]
    general = {"general.architecture": metadata["general.architecture"], "general.type": "model", "general.name": name}
    if kind in _FILE_TYPES:
        general["general.file_type"] = _FILE_TYPES[kind]
    if quantized:
        general["general.quantization_version"] = 2
    return {**general, **metadata}


def _notes(job: _Job) -> list[str]:
    found: list[str] = []
    if any(layer.scheme.input is not None for layer in job.stored.layers.values()):
        found.append("llama.cpp rounds the inputs of quantized layers in its own way, not as this checkpoint says")
    window = job.config.get("sliding_window")
    if job.architecture.name in ("llama", "phi3") and window and window < job.config["max_position_embeddings"]:
        kind = job.architecture.model_type
        found.append(
            f"llama.cpp has no sliding window for {kind}: it attends to all of a text of more than {window} tokens"
        )
    return found
