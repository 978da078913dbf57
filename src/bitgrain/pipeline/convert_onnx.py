"""A quantized checkpoint as an ONNX model: OUT/model.onnx, its numbers in OUT/model.onnx.data, config and tokenizer.

The graph is traced from the transformers model without its weights (`models.onnx_trace`) and computes in float32; kept
matrices stay in their dtype in the file and are widened where they are used. Memory is bounded by one tensor, whatever
the model's size.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout
from bitgrain.checkpoints.disk_space import check_disk_space
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.onnx.form import BFLOAT16, FLOAT, FLOAT16, Form, Initializer, as_bytes, need_onnx
from bitgrain.checkpoints.onnx.graph import DATA_FILE, Surgeon
from bitgrain.checkpoints.shards import PlacedTensor, ShardLayout, TensorSpec
from bitgrain.errors import CheckpointError, PlanError
from bitgrain.models.anatomy import Anatomy, read_anatomy
from bitgrain.models.materialize import Weightless, load_dense_into
from bitgrain.models.onnx_trace import parameter_names, trace_onnx
from bitgrain.models.past import Past, find_past
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import ModelSource
from bitgrain.pipeline.converted import Converted, as_json, changed, write_side_files
from bitgrain.pipeline.spelling import respelled, spell_all
from bitgrain.pipeline.stored_model import StoredModel
from bitgrain.pipeline.units import write_units
from bitgrain.progress import Progress
from bitgrain.runtime.kv_cache import past_argument

GRAPH_FILE = "model.onnx"
NOTES = "bitgrain"
"""The key of the model's metadata under which the quantized layers are told, as quant_method bitgrain tells them."""
_KEPT = {torch.float32: FLOAT, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


def convert_onnx(
    stored: StoredModel,
    source: ModelSource,
    form: Form,
    out: Path,
    *,
    trust_remote_code: bool,
    restart: bool,
    progress: Progress,
) -> Converted:
    """Write `stored`, which lies at `source`, to the new folder `out` as ONNX.

    Raises PlanError with every layer that the form cannot hold exactly, and why; ModelError for a model that cannot be
    traced; SchemeError without the packages; CheckpointError, OutputError.
    """
    need_onnx()
    if not stored.layers:
        raise CheckpointError(f"{stored.path} is not quantized: there is nothing to convert to {form.name}")
    config = load_config(source, trust_remote_code, drop_quantization=True)
    skeleton = build_skeleton(config, trust_remote_code)
    anatomy = read_anatomy(skeleton, stored.originals())
    layers = spell_all(stored, form, progress, torch.float32)
    past, began = _past(skeleton), time.perf_counter()
    surgeon = Surgeon(trace_onnx(_weightless(skeleton, config, stored, anatomy), past))
    tracing = time.perf_counter() - began
    units = _operate(surgeon, stored, layers, anatomy, form)
    layers = {name: layer for name, layer in layers.items() if name in units}  # a pooler's is no output of the graph
    shard = _lay_out([one for constants in units.values() for one in constants])
    check_disk_space(out, shard.nbytes)
    notes = {NOTES: json.dumps(BitgrainLayout().config(list(layers.values()), ()))}
    graph = surgeon.finish(form, {one.spec.name: one.offset for one in shard.tensors}, notes)
    data = graph.SerializeToString(deterministic=True)
    with JobFolder.open(out, _fingerprint(stored, form, data), [shard], restart=restart) as job:

        def make(name: str) -> dict[str, Tensor]:
            return _written(stored, form, layers.get(name), units[name], name)

        hashes = write_units(job, [shard], units, make, form.name, progress)
        files = {"config.json": as_json(stored.model_config), GRAPH_FILE: data}
        write_side_files(stored, form.name, layers.values(), job, files, hashes, trust_remote_code)
        job.finish()
    return Converted(out, form.name, layers, changed(stored, layers), shard.nbytes + len(data), tracing_s=tracing)


def _past(skeleton: nn.Module) -> tuple[Past, ...]:
    """What the layers of a decoder keep; nothing of an encoder's."""
    takes = past_argument(skeleton) in inspect.signature(skeleton.forward).parameters
    return find_past(skeleton) if takes and hasattr(skeleton.config, "use_cache") else ()


def _weightless(skeleton: nn.Module, config: Any, stored: StoredModel, anatomy: Anatomy) -> nn.Module:
    """The model in memory without its parameters, with the buffers that it computes or the checkpoint holds."""
    buffers = {name for name, _ in skeleton.named_buffers()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, one in stored.originals().items():
            if anatomy.memory_of.get(name) in buffers:
                yield name, stored.read(name)
            elif name not in anatomy.unexpected:
                yield name, Weightless.of(one.shape, torch.float32)

    model = load_dense_into(skeleton, config, tensors(), "cpu", torch.float32)
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hollow = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            setattr(module, name, empty.setdefault(id(parameter), hollow))
    return model


def _operate(
    surgeon: Surgeon, stored: StoredModel, layers: dict[str, StoredLayer], anatomy: Anatomy, form: Form
) -> dict[str, list[Initializer]]:
    """The constants of each original tensor, of those that the outputs depend on. Raises PlanError."""
    tensor_of = {memory: tensor for tensor, memory in anatomy.memory_of.items()}
    for group in anatomy.tied:
        own = next((tensor_of[name] for name in group if name in tensor_of), None)
        tensor_of |= {name: own for name in group if own is not None}
    units: dict[str, list[Initializer]] = {}
    originals = stored.originals()
    for parameter in list(parameter_names(surgeon.proto)):
        name = tensor_of.get(parameter)
        if name is None:
            raise PlanError(f"{parameter} is made of several tensors of the checkpoint, which ONNX export cannot do")
        if name in layers:
            surgeon.quantize(parameter, layers[name], form)
            units[name] = form.initializers(layers[name])
        else:
            entry = originals[name]
            shape = surgeon.shape(parameter)
            if shape != tuple(entry.shape):
                raise PlanError(f"{name} has shape {list(entry.shape)}, but {list(shape)} in the graph")
            kind = _KEPT.get(entry.dtype, FLOAT) if len(shape) > 1 else FLOAT
            count = torch.Size(shape).numel()
            constant = Initializer(name, kind, shape, count * (4 if kind == FLOAT else 2))
            surgeon.keep(parameter, constant)
            units[name] = [constant]
    return units


def _lay_out(constants: Sequence[Initializer]) -> ShardLayout:
    """Wide elements first, so that each lies at a multiple of its size."""
    placed: list[PlacedTensor] = []
    position = 0
    for one in sorted(constants, key=lambda one: (one.data_type != FLOAT, one.data_type not in (FLOAT16, BFLOAT16))):
        placed.append(PlacedTensor(TensorSpec(one.name, torch.uint8, (one.nbytes,)), position))
        position += one.nbytes
    return ShardLayout(DATA_FILE, b"", tuple(placed))


def _written(
    stored: StoredModel, form: Form, layer: StoredLayer | None, constants: Sequence[Initializer], name: str
) -> dict[str, Tensor]:
    """The bytes of one original tensor's constants."""
    if layer is None:
        tensor = stored.read(name)
        return {name: as_bytes(tensor.float() if constants[0].data_type == FLOAT else tensor)}
    return form.encode(layer, respelled(stored, layer)[0], stored.inputs(name))


def _fingerprint(stored: StoredModel, form: Form, graph: bytes) -> dict[str, Any]:
    """What must be the same for a half-done conversion to be resumed."""
    digest = hashlib.sha256(graph).hexdigest()
    return {"job": "convert", "to": form.name, **stored.fingerprint(), "graph": digest, "version": version("bitgrain")}
