"""What layouts of plain linear layers, quantized in their weights alone, have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.reader import Checkpoint, StoredTensor
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.packing import pack, unpack
from bitgrain.recipes import Scheme

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def kept_dtype(entries: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """What the original was: the dtype that most of the kept weights and biases have; None where there are none."""
    kept = [entry.dtype for name, entry in entries.items() if name.endswith((".weight", ".bias"))]
    floats = [dtype for dtype in kept if dtype in _FLOATS]
    return max(dict.fromkeys(floats), key=floats.count) if floats else None


def linear_layer(
    module: str, rows: int, cols: int, spec: QuantSpec, dtype: torch.dtype, scheme: Scheme | None = None
) -> StoredLayer:
    """The linear layer `module` of a checkpoint, with weights [rows, cols] under `spec`; `scheme`: where it has a
    name of its own, or quantized inputs."""
    return StoredLayer(
        tensor=f"{module}.weight",
        module=module,
        memory_module=module,
        class_name="Linear",
        role="linear",
        out_features=rows,
        in_features=cols,
        experts=1,
        transposed=False,
        dtype=dtype,
        scheme=scheme or Scheme(spec.describe(), spec),
    )


def refuse_all_but_weights(layer: StoredLayer, name: str) -> str | None:
    """Why a layout called `name` that holds the weights of plain linear layers cannot hold `layer`, or None."""
    spec = layer.scheme.weight
    if layer.role not in ("linear", "expert", "lm_head", "router"):
        return f"{name} holds linear layers, {layer.module} is {layer.class_name}"
    if layer.transposed:
        return f"{layer.module} is stored as [in, out] ({layer.class_name}), which {name} does not know"
    if layer.experts > 1:
        return f"{layer.module} stacks {layer.experts} experts in one tensor; {name} holds matrices"
    if layer.scheme.input is not None or layer.scheme.output is not None:
        return f"{name} has no form for quantized activations, for {layer.module}"
    if spec.outliers or spec.columns:
        return f"{name} has no place for outliers or columns in 16 bits, for {layer.module}"
    return None


def check_tensors(checkpoint: Checkpoint, wanted: list[TensorSpec]) -> None:
    """CheckpointError unless the checkpoint has all these tensors but optional ones, by its headers."""
    for spec in wanted:
        found = checkpoint.entries.get(spec.name)
        if found is None and spec.optional:
            continue
        if found is None or found.dtype != spec.dtype or tuple(found.shape) != spec.shape:
            have = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CheckpointError(f"{spec.name} is {have}; config.json means {spec.dtype} {list(spec.shape)}")


def order_of(g_idx: Tensor, group: int, name: str) -> Tensor:
    """int32 [in]: the inputs group by group, where `g_idx` [in] names the group of each. Raises CheckpointError unless
    each has `group` inputs."""
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx.index_select(0, order), torch.arange(len(g_idx), dtype=g_idx.dtype) // group):
        raise CheckpointError(f"{name} does not put {group} inputs into each group")
    return order.to(torch.int32)


def in_order(words: Tensor, order: Tensor, bits: int) -> Tensor:
    """Codes packed along the rows of int32 `words`, with their columns in `order`."""
    codes = unpack(words, bits, len(order))
    return pack(codes.index_select(1, order.to(torch.int64)), bits)
