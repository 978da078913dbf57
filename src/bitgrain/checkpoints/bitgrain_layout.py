"""The bitgrain layout: any QuantSpec on any stack of matrices, for what compressed-tensors cannot express.

`quant_method: bitgrain` in config.json; readers that do not know it refuse the checkpoint instead of misreading it.
Tensors of a layer whose original tensor was `T` (E = stacked matrices, absent from the shapes where there is one; a
convolution is one matrix [out, in/groups * kernel]):

| tensor        | dtype and shape |
|---|---|
| T.codes       | uint8 [E, out, ceil(in * bits / 8)], packed densely, low bits first, as code + offset;
|               | int32 [E, out, in] for formats of more than 8 bits |
| T.scale       | storage dtype [E, tiles down, tiles across]; nested scales: their codes, packed like T.codes |
| T.outer_scale | only for nested scales: the scale of the scales |
| T.outer_zero  | only for asymmetric nested scales: codes packed like T.codes, or numbers in the storage dtype |
| T.outer_minimum | only for nested scales with minima: in their storage dtype |
| T.zero        | only with zero points: likewise |
| T.minimum     | only with minima: like T.scale; nested ones: T.minimum_scale, their scale |
| T.order       | only with an order of the columns: int32 [E, in], the input channel of each column of the codes |
| T.outlier_starts, T.outlier_columns, T.outlier_values | only with outliers, see `numerics.outliers`: |
|               | int32 [E, out + 1], int16 or int32 [E, k] and float16 [E, k]; numbers to be added |
| T.column_index, T.column_values | only with columns in 16 bits, see `numerics.columns`: int32 [E, k], and float16 or |
|               | bfloat16 [E, out, k]; they stand in the place of what the codes mean |
| T.input_scale | only for static inputs: [E] in the storage dtype; asymmetric: T.input_zero [E] |
|               | inputs in clusters of channels: both [clusters]; T.input_sizes int32 [clusters]: channels of each, |
|               | one cluster after the other; T.input_order int16 or int32 [in]: which of the original's channels |
|               | each column of the codes is for |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from pydantic import ConfigDict, Field, PositiveInt
from torch import Tensor

from bitgrain.checkpoints.layout import Read, StoredLayer, check_inputs
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.settings import Lenient, parse, section
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.numerics import Format, QTensor, QuantSpec, per_tensor
from bitgrain.numerics.formats import FP32, is_named
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.outliers import column_dtype
from bitgrain.numerics.packed import (
    PackedMatrix,
    check_order,
    pack_qtensor,
    packed_matrix,
    packed_specs,
    scale_dtype,
    zero_dtype,
)
from bitgrain.recipes.spec_model import SchemeModel


class BitgrainLayout:
    """See `Layout`."""

    name = "bitgrain"
    summary = "bitgrain.load; every spec there is, embeddings, convolutions and stacked experts too"
    keys: tuple[str, ...] = ("quantization_config",)
    storages: tuple[Format, ...] = ()

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return section(config).get("quant_method") == self.name

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        return read_layers(config["quantization_config"])

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        spec = layer.scheme.weight
        return (spec, replace(spec, scale=FP32)) if isinstance(spec.scale, QuantSpec) else (spec,)

    def refusal(self, layer: StoredLayer) -> str | None:
        if layer.role == "conv" and layer.transposed:
            return f"{layer.module} is a transposed convolution, whose outputs are not the rows of its tensor"
        nested = layer.scheme.weight.scale
        if isinstance(nested, QuantSpec) and not is_named(nested.format):
            return f"{layer.module}: scales in a code of another writer, {nested.format}"
        if isinstance(nested, QuantSpec) and isinstance(nested.scale, QuantSpec):
            return f"{layer.module}: scales of scales of scales"
        if layer.scheme.weight.scale_format.bits > 8 and isinstance(nested, QuantSpec):
            return f"{layer.module}: nested scales of more than 8 bits"
        if layer.input_global_scale is not None:
            return f"{layer.module}: NVFP4 inputs with a shared scale of their own, {layer.input_global_scale}"
        static = layer.static_input
        if static is not None and (static.granularity != per_tensor() or isinstance(static.scale, QuantSpec)):
            return f"{layer.module}: static inputs {static.describe()}, only per_tensor with plain scales can be stored"
        if static is not None and static.clusters > layer.in_features:
            most = layer.in_features
            return f"{layer.module}: {static.clusters} clusters of {most} input channels; ask for at most {most}"
        if static is not None and static.clusters and layer.experts > 1:
            return f"{layer.module}: clusters of the input channels of stacked experts; give them another scheme"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        stack = (layer.experts,) if layer.experts > 1 else ()
        cols = layer.in_features
        found = packed_specs(layer.scheme.weight, layer.shape)
        specs = [TensorSpec(f"{layer.tensor}.{suffix}", dtype, (*stack, *shape)) for suffix, dtype, shape in found]
        static = layer.static_input
        if static is not None:
            count = static.clusters or layer.experts
            specs.append(TensorSpec(f"{layer.tensor}.input_scale", scale_dtype(static), (count,)))
            if not static.symmetric:
                specs.append(TensorSpec(f"{layer.tensor}.input_zero", zero_dtype(static), (count,)))
            if static.clusters:
                specs.append(TensorSpec(f"{layer.tensor}.input_sizes", torch.int32, (count,)))
                specs.append(TensorSpec(f"{layer.tensor}.input_order", column_dtype(cols), (cols,)))
        return specs

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        return self.encode_packed(layer, [PackedMatrix.of(q) for q in parts], inputs)

    def encode_packed(
        self, layer: StoredLayer, parts: Sequence[PackedMatrix], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        check_inputs(layer, inputs)
        encoded = [pack_qtensor(q) for q in parts]
        join = torch.stack if layer.experts > 1 else (lambda tensors: tensors[0])
        found = {f"{layer.tensor}.{suffix}": join([one[suffix] for one in encoded]) for suffix in encoded[0]}
        if inputs:
            found[f"{layer.tensor}.input_scale"] = torch.cat([one.scale.reshape(-1) for one in inputs])
            zeros = [one.zero.reshape(-1) for one in inputs if one.zero is not None]
            if zeros:
                found[f"{layer.tensor}.input_zero"] = torch.cat(zeros)
            if inputs[0].sizes is not None and inputs[0].order is not None:
                found[f"{layer.tensor}.input_sizes"] = inputs[0].sizes
                found[f"{layer.tensor}.input_order"] = inputs[0].order
        return found

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        spec = layer.static_input
        if spec is None:
            return []
        if spec.clusters:
            stored = {suffix: read(f"{layer.tensor}.input_{suffix}") for suffix in ("scale", "sizes", "order")}
            zero = None if spec.symmetric else read(f"{layer.tensor}.input_zero").view(1, -1)
            check_order(stored["order"], layer.in_features, layer.module)
            sizes = stored["sizes"]
            if bool((sizes < 0).any().item()) or int(sizes.sum()) != layer.in_features:
                raise CheckpointError(f"{layer.module}: the sizes of its clusters do not add up to its inputs")
            return [StaticInput(stored["scale"].view(1, -1), zero, sizes, stored["order"])]
        scales = read(f"{layer.tensor}.input_scale").view(layer.experts, 1, 1)
        if spec.symmetric:
            return [StaticInput(scale) for scale in scales]
        zeros = read(f"{layer.tensor}.input_zero").view(layer.experts, 1, 1)
        return [StaticInput(scale, zero) for scale, zero in zip(scales, zeros, strict=True)]

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        if layer.scheme.weight.columns is None:
            return []
        return list(read(f"{layer.tensor}.column_index").view(layer.experts, -1))

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        return [one.unpack() for one in self.decode_packed(layer, read)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        spec = layer.scheme.weight
        stacks = {t.name.removeprefix(f"{layer.tensor}."): read(t.name) for t in self.tensors(layer)}
        if layer.experts == 1:
            return [packed_matrix(stacks, spec, layer.shape)]
        return [
            packed_matrix({suffix: tensor[i] for suffix, tensor in stacks.items()}, spec, layer.shape)
            for i in range(layer.experts)
        ]

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """Each layer by the name of its original tensor, with its scheme spelled out once."""
        schemes: dict[str, int] = {}
        listed: list[dict[str, Any]] = []
        entries: dict[str, dict[str, Any]] = {}
        for layer in layers:
            key = repr(layer.scheme)
            if key not in schemes:
                schemes[key] = len(listed)
                listed.append(SchemeModel.of(layer.scheme).model_dump(mode="json"))
            entries[layer.tensor] = {
                "scheme": schemes[key],
                "shape": list(layer.shape),
                "experts": layer.experts,
                "transposed": layer.transposed,
                "dtype": str(layer.dtype).removeprefix("torch."),
                "module": layer.memory_module,
                "class": layer.class_name,
                "role": layer.role,
                **({"original": list(layer.original)} if layer.original else {}),
            }
        return {
            "quant_method": "bitgrain",
            "version": version("bitgrain"),
            "schemes": listed,
            "layers": entries,
            "ignore": [module for module, _, _ in kept],
        }


class _Layer(Lenient):
    """What `BitgrainLayout.config` says of one tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scheme: int = Field(ge=0)
    shape: Annotated[list[PositiveInt], Len(2, 2)]
    experts: PositiveInt
    transposed: bool
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    module: str
    class_name: str = Field(alias="class")
    role: str
    original: tuple[PositiveInt, ...] = Field(default=(), strict=False)


class _Settings(Lenient):
    """The whole."""

    schemes: list[dict[str, Any]]
    layers: dict[str, _Layer]


def read_layers(config: Mapping[str, Any]) -> list[StoredLayer]:
    """The layers of a `quantization_config` that `BitgrainLayout.config` wrote. Raises CheckpointError."""
    settings = parse(_Settings, config, "quantization_config")
    try:
        schemes = [parse(SchemeModel, scheme, f"scheme {i}").build() for i, scheme in enumerate(settings.schemes)]
    except SchemeError as error:
        raise CheckpointError(f"config.json, quantization_config: {error}") from error
    found: list[StoredLayer] = []
    for tensor, entry in settings.layers.items():
        rows, cols = entry.shape
        if entry.scheme >= len(schemes) or (entry.original and math.prod(entry.original) != rows * cols):
            raise CheckpointError(f"config.json, quantization_config: {tensor}: its scheme or shape does not exist")
        found.append(
            StoredLayer(
                tensor=tensor,
                module=tensor.removesuffix(".weight"),
                memory_module=entry.module,
                class_name=entry.class_name,
                role=entry.role,
                out_features=rows,
                in_features=cols,
                experts=entry.experts,
                transposed=entry.transposed,
                dtype=getattr(torch, entry.dtype),
                scheme=schemes[entry.scheme],
                original=entry.original,
            )
        )
    return found
