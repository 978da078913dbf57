"""A linear layer whose weight stays packed in memory: dequantized for a product, and again for its gradient.

No dense weight outlives a product, so that a frozen base costs its packed bytes whatever is trained on top of it
(QLoRA, arXiv 2305.14314, equation 5: gradients go through the dequantized weight to the input, and not to the weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitgrain.numerics import QTensor
from bitgrain.numerics.packed import pack_qtensor, unpack_qtensor
from bitgrain.runtime.activations import quantize_inputs
from bitgrain.runtime.online import rotate_inputs
from bitgrain.runtime.packed_layer import PackedLayer

_PREFIX = "packed_"


class LowBitLinear(PackedLayer):
    """x [.., in] -> x W^T + b, where W [out, in] is held as codes and scales.

    q  the weight; the others as of `PackedLayer`

    Its state_dict holds the packed tensors as bytes (`numerics.packed`): no cast of the module touches them.
    """

    def __init__(
        self,
        q: QTensor,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(q.shape, q.spec, bias, dtype, stored, transposed, q.codes.device)
        self._dtypes: dict[str, torch.dtype] = {}
        for name, tensor in pack_qtensor(q).items():
            self._dtypes[name] = tensor.dtype
            whole = tensor.clone(memory_format=torch.contiguous_format)  # strides of one element may be 0
            self.register_buffer(_PREFIX + name, whole.view(torch.uint8))

    def qtensor(self) -> QTensor:
        """The weight, unpacked."""
        parts = {name: getattr(self, _PREFIX + name).view(dtype) for name, dtype in self._dtypes.items()}
        return unpack_qtensor(parts, self.spec, (self.out_features, self.in_features))

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        return sum(getattr(self, _PREFIX + name).nbytes for name in self._dtypes)

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(input, self.bias, self.dequantize))

    def to_dense(self) -> nn.Linear | Conv1D:
        """An ordinary layer: a rotation of inputs is folded into its weight, a quantizer of inputs is left out."""
        weight = self.dequantize()
        rotation: Any = getattr(self, "input_rotation", None)
        if rotation is not None:
            weight = cast(Tensor, rotation.undo(weight)).to(weight.dtype)
        with torch.device("meta"):  # no memory, and no random numbers
            dense = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=False)
            )
        weight = weight.T.contiguous() if self.transposed else weight
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec.describe()}"


class _Product(torch.autograd.Function):
    """F.linear with a weight that is made anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dense: Callable[[], Tensor]) -> Tensor:
        ctx.dense, ctx.dtype = dense, x.dtype
        return F.linear(x, dense(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        grad = grad_outputs[0]
        rows = grad.reshape(-1, grad.shape[-1])
        x = bias = None
        if ctx.needs_input_grad[0]:
            x = (rows @ ctx.dense().to(grad.dtype)).reshape(*grad.shape[:-1], -1).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            bias = rows.sum(0)
        return x, bias, None


def hold_low_bit_(
    module: nn.Module, weights: Mapping[str, QTensor], stored: Mapping[str, torch.dtype] | None = None
) -> list[str]:
    """Replace linear layers inside `module` by `LowBitLinear`, in place; returns their paths.

    weights  path of an nn.Linear or a Conv1D -> its weight, [out, in]; other modules are left as they are
    stored   path -> dtype before it was quantized (default: of the layer's weight)
    Quantizers and rotations of inputs go over to the new layers. Layers whose weight another module shares (tied
    embeddings) stay dense.
    """
    shared = shared_parameters(module)
    replaced: list[str] = []
    for path, q in weights.items():
        old = module.get_submodule(path)
        if not path or type(old) not in (nn.Linear, Conv1D) or id(old.weight) in shared:
            continue
        dense: Any = old
        new = LowBitLinear(
            q,
            dense.bias,
            dtype=dense.weight.dtype,
            stored=(stored or {}).get(path),
            transposed=isinstance(old, Conv1D),
        )
        put_in_place(module, path, new)
        replaced.append(path)
    return replaced


def put_in_place(module: nn.Module, path: str, new: nn.Module) -> None:
    """Replace the layer at `path` inside `module`; quantizers and rotations of its inputs go over to the new one."""
    old = module.get_submodule(path)
    if (rotation := getattr(old, "input_rotation", None)) is not None:
        rotate_inputs(new, rotation)
    if (quantizer := getattr(old, "input_quantizer", None)) is not None:
        quantize_inputs(new, quantizer)
    owner, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner), leaf, new.train(old.training))


def low_bit_layers(module: nn.Module) -> Iterator[tuple[str, LowBitLinear]]:
    """The layers that hold packed weights, by path."""
    for path, part in module.named_modules():
        if isinstance(part, LowBitLinear):
            yield path, part


def held_nbytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of `module`, each counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def shared_parameters(module: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds."""
    owners: dict[int, set[int]] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(part))
    return {key for key, found in owners.items() if len(found) > 1}
