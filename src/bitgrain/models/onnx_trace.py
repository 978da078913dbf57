"""A transformers model as an ONNX graph without its weights, by torch's own exporter: no table of architectures.

Parameters are inputs of the graph, under their names in memory, so that nothing is computed from them while it is
simplified; what the model computes from its config (rotary frequencies) stays in it. All is float32.

Inputs and outputs carry the names that optimum and onnxruntime-genai use:

    input_ids, attention_mask, position_ids or token_type_ids where the model takes them
    past_key_values.N.key, past_key_values.N.value    [batch, heads, past, channels], decoders only; past may be 0
    logits or last_hidden_state; present.N.key, present.N.value
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from bitgrain.errors import ModelError
from bitgrain.models.past import Past
from bitgrain.runtime.kv_cache import past_argument

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 21
"""The first with blocked DequantizeLinear and 4-bit integers."""
_BATCH, _LENGTH, _PAST = 2, 3, 5
"""Sizes while the model is traced: any that are not 0 or 1 and differ."""
_DIMS = ("batch_size", "sequence_length", "past_sequence_length", "total_sequence_length")


class _Wrapped(nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, given: list[Tensor], past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        more: dict[str, Any] = {}
        if past:
            cache = DynamicCache()
            for index, (keys, values) in enumerate(past):
                cache.update(keys, values, index)
            more = {past_argument(self.model): cache, "use_cache": True}
        found = self.model(**dict(zip(self.names, given, strict=True)), **more)
        first = found.logits if hasattr(found, "logits") else found.last_hidden_state
        if not past:
            return (first,)
        layers = getattr(found, past_argument(self.model)).layers
        return (first, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def trace_onnx(model: nn.Module, past: Sequence[Past]) -> ModelProto:
    """The graph of `model` (on the CPU, in eval mode, float32; its parameters may be anything of the right shape).

    past: what its layers keep (`find_past`); empty for encoders. Raises ModelError for what cannot be traced.
    """
    import onnx_ir as ir

    accepted = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    names += [name for name in (("position_ids",) if past else ("token_type_ids",)) if name in accepted]
    kept = _PAST if past else 0
    seen = [_LENGTH + kept if name == "attention_mask" else _LENGTH for name in names]
    given = [torch.ones(_BATCH, length, dtype=torch.int64) for length in seen]  # one tensor twice would be one input
    states = [tuple(torch.zeros(_BATCH, p.heads, kept, s) for s in (p.key_size, p.value_size)) for p in past]
    pairs = [f"{index}.{part}" for index in range(len(past)) for part in ("key", "value")]
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ([{0: dynamic, 1: dynamic}] * len(names), [({0: dynamic, 2: dynamic},) * 2] * len(past))
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Wrapped(model, names).eval(),
                (given, states),
                input_names=[*names, *(f"past_key_values.{pair}" for pair in pairs)],
                output_names=[_first_output(model), *(f"present.{pair}" for pair in pairs)],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            traced: Any = program.model
            _parameters_as_inputs(traced.graph, model)
            _simplify(traced)
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{type(model).__name__} cannot be traced into an ONNX graph: {reason}") from error
    proto = ir.to_proto(traced)
    del program, traced
    gc.collect()  # the exporter's graphs refer to each other in circles, and are large
    _tidy(proto, len(names))
    return proto


def _first_output(model: nn.Module) -> str:
    named: Any = model
    return (
        "logits" if named.get_output_embeddings() is not None or hasattr(model, "classifier") else "last_hidden_state"
    )


def _parameters_as_inputs(graph: Any, model: nn.Module) -> None:
    """Parameters leave the initializers."""
    known = {f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in [name for name in graph.initializers if name in known]:
        value = graph.initializers.pop(name)
        value.const_value = None
        value.name = name.removeprefix("model.")
        graph.inputs.append(value)


def _simplify(traced: Any) -> None:
    """Shapes folded, what is computed twice or for nothing removed; onnxruntime does the rest when it loads."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.inline(traced)
    optimizer.fold_constants(traced)
    common.CommonSubexpressionEliminationPass()(traced)
    optimizer.remove_unused_nodes(traced)


def _tidy(proto: ModelProto, names: int) -> None:
    """Names for sizes that vary; no notes of the exporter, which hold paths and stack traces."""
    batch, length, past, total = _DIMS
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        sizes = {0: batch, 1: length}
        if value.name == "attention_mask":
            sizes = {0: batch, 1: total if len(proto.graph.output) > 1 else length}
        elif value.name.startswith(("past_key_values.", "present.")):
            sizes = {0: batch, 2: past if value.name.startswith("past") else total}
        for axis, dim in enumerate(dims):
            if dim.WhichOneof("value") != "dim_value" and axis in sizes:
                dim.dim_param = sizes[axis]
    for thing in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        del thing.metadata_props[:]
        thing.doc_string = ""
    for thing in proto.graph.initializer:
        del thing.metadata_props[:]
    del proto.graph.value_info[:]
    proto.graph.name = "main"


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The exporter prints and warns about what a user cannot mend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def parameter_names(proto: ModelProto) -> Iterator[str]:
    """Inputs of a traced graph that are parameters."""
    for value in proto.graph.input:
        if value.name not in ("input_ids", "attention_mask", "position_ids", "token_type_ids") and not (
            value.name.startswith("past_key_values.")
        ):
            yield value.name
