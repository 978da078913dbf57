"""A quantized checkpoint as an ONNX model: OUT/model.onnx, its numbers in OUT/model.onnx.data, config and tokenizer.

The graph is traced from the transformers model without its weights (`models.onnx_trace`) and computes in float32; kept
matrices stay in their dtype in the file and are widened where they are used. Memory is bounded by one tensor, whatever
the model's size.
"""

from __future__ import annotations

import hashlib
import json
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
from bitgrain.errors import PlanError
from bitgrain.models.anatomy import Anatomy, read_anatomy
from bitgrain.models.materialize import Weightless, load_dense_into
from bitgrain.models.onnx_trace import parameter_names, trace_onnx
from bitgrain.models.past import find_past
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.respell import respell
from bitgrain.pipeline.convert import Converted, as_json, spell_all, weight_hashes
from bitgrain.pipeline.output_files import MANIFEST, side_files
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.progress import Progress, make_progress
from bitgrain.runtime.kv_cache import past_argument

GRAPH_FILE = "model.onnx"
NOTES = "bitgrain"
"""The key of the model's metadata under which the quantized layers are told, as quant_method bitgrain tells them."""
_KEPT = {torch.float32: FLOAT, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


def convert_onnx(
    model: str | Path,
    form: Form,
    out: str | Path,
    *,
    trust_remote_code: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write the quantized checkpoint `model` to the new folder `out` as ONNX.

    Raises PlanError with every layer that the form cannot hold exactly, and why; ModelError for a model that cannot be
    traced; SchemeError without the packages; CheckpointError, OutputError.
    """
    need_onnx()
    out, source = Path(out), resolve_model(model)
    stored = QuantizedCheckpoint(source.path)
    progress = progress or make_progress("quiet")
    config = load_config(source, trust_remote_code, drop_quantization=True)
    skeleton = build_skeleton(config, trust_remote_code)
    anatomy = read_anatomy(skeleton, stored.originals())
    layers = spell_all(stored, form, progress)
    past = find_past(skeleton) if _keeps_past(skeleton) else ()
    surgeon = Surgeon(trace_onnx(_weightless(skeleton, config, stored, anatomy), past))
    units = _operate(surgeon, stored, layers, anatomy, form)
    layers = {name: layer for name, layer in layers.items() if name in units}  # a pooler's is no output of the graph
    shard = _lay_out([one for constants in units.values() for one in constants])
    check_disk_space(out, shard.nbytes)
    notes = {NOTES: json.dumps(BitgrainLayout().config(list(layers.values()), ()))}
    graph = surgeon.finish(form, {one.spec.name: one.offset for one in shard.tensors}, notes)
    data = graph.SerializeToString(deterministic=True)
    with JobFolder.open(out, _fingerprint(stored, form, data), [shard], restart=restart) as job:
        todo = [name for name in units if name not in job.done]
        progress.start(len(todo), "tensors", f"writing {form.name}")
        try:
            for name in todo:
                job.commit_unit(name, _written(stored, form, layers.get(name), units[name], name))
                progress.advance(1, name)
        finally:
            progress.finish()
        _write_side_files(stored, form, list(layers.values()), job, shard, data, trust_remote_code)
        job.finish()
    changed = tuple(
        (name, stored.layers[name].scheme.weight.describe(), layer.scheme.weight.describe())
        for name, layer in layers.items()
        if layer.scheme.weight.describe() != stored.layers[name].scheme.weight.describe()
    )
    return Converted(out, form.name, layers, changed, shard.nbytes + len(data))


def _keeps_past(skeleton: nn.Module) -> bool:
    """Whether the model hands a cache back: a decoder."""
    if not hasattr(skeleton.config, "use_cache"):
        return False
    with torch.no_grad():
        found = skeleton(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=True)
    return getattr(found, past_argument(skeleton), None) is not None


def _weightless(skeleton: nn.Module, config: Any, stored: QuantizedCheckpoint, anatomy: Anatomy) -> nn.Module:
    """The model in memory without its parameters, with the buffers that it computes or the checkpoint holds."""
    buffers = {name for name, _ in skeleton.named_buffers()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, one in stored.originals().items():
            if anatomy.memory_of.get(name) in buffers:
                yield name, stored.checkpoint.read(name)
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
    surgeon: Surgeon, stored: QuantizedCheckpoint, layers: dict[str, StoredLayer], anatomy: Anatomy, form: Form
) -> dict[str, list[Initializer]]:
    """The constants of each original tensor, of those that the outputs depend on. Raises PlanError."""
    tensor_of = {memory: tensor for tensor, memory in anatomy.memory_of.items()}
    for group in anatomy.tied:
        own = next((tensor_of[name] for name in group if name in tensor_of), None)
        tensor_of |= {name: own for name in group if own is not None}
    units: dict[str, list[Initializer]] = {}
    for parameter in list(parameter_names(surgeon.proto)):
        name = tensor_of.get(parameter)
        if name is None:
            raise PlanError(f"{parameter} is made of several tensors of the checkpoint, which ONNX export cannot do")
        if name in layers:
            surgeon.quantize(parameter, layers[name], form)
            units[name] = form.initializers(layers[name])
        else:
            entry = stored.checkpoint.entries[name]
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
    stored: QuantizedCheckpoint, form: Form, layer: StoredLayer | None, constants: Sequence[Initializer], name: str
) -> dict[str, Tensor]:
    """The bytes of one original tensor's constants."""
    if layer is None:
        tensor = stored.checkpoint.read(name)
        return {name: as_bytes(tensor.float() if constants[0].data_type == FLOAT else tensor)}
    with torch.inference_mode():
        spec = layer.scheme.weight
        if spec == stored.layers[name].scheme.weight:
            packed = stored.packed(name)[0]
        else:
            packed = PackedMatrix.of(respell(stored.quantized(name)[0], spec, layer.dtype))
        inputs = stored.layout.decode_inputs(stored.layers[name], stored.checkpoint.read)
        return form.encode(layer, packed, inputs)


def _fingerprint(stored: QuantizedCheckpoint, form: Form, graph: bytes) -> dict[str, Any]:
    """What must be the same for a half-done conversion to be resumed."""
    return {
        "job": "convert",
        "to": form.name,
        "source": stored.checkpoint.fingerprint(),
        "graph": hashlib.sha256(graph).hexdigest(),
        "version": version("bitgrain"),
    }


def _write_side_files(
    stored: QuantizedCheckpoint,
    form: Form,
    layers: Sequence[StoredLayer],
    job: JobFolder,
    shard: ShardLayout,
    graph: bytes,
    with_code: bool,
) -> None:
    """The graph, config.json, tokenizer, recipe and a manifest with everything's hash."""
    hashes: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        job.write_bytes(name, data)
        hashes[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for path in [*side_files(stored.path, with_code), *stored.path.glob("recipe.yaml")]:
        put(path.name, path.read_bytes())
    config: dict[str, Any] = json.loads((stored.path / "config.json").read_text(encoding="utf-8"))
    for key in stored.layout.keys:
        config.pop(key, None)
    put("config.json", as_json(config))
    put(GRAPH_FILE, graph)
    hashes |= dict(weight_hashes(job, [shard]))
    manifest = {
        "format": 1,
        "converted": {"from": stored.layout.name, "to": form.name, "version": version("bitgrain")},
        "layout": form.name,
        "layers": [
            {"tensor": layer.tensor, "role": layer.role, "weight": layer.scheme.weight.describe()} for layer in layers
        ],
        "left_out": sorted(stored.layers.keys() - {layer.tensor for layer in layers}),
        "files": dict(sorted(hashes.items())),
    }
    job.write_bytes(MANIFEST, as_json(manifest))
