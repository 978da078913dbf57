"""Activations quantized at run time, by simulation: a layer's input is rounded to its grid, then multiplied densely.

The arithmetic follows vLLM's kernels: int8 per token is absmax / 127 (csrc/quantization/w8a8/int8/scaled_quant.cu) with
ties to even, fp8 per token is absmax / 448, NVFP4 chooses E4M3 scales under a fixed shared scale. transformers with
compressed-tensors 0.20 divides int8 by 127.5 and uses the code -128 (quantization/utils/helpers.py, calculate_qparams);
`rounding="transformers"` computes that instead. The other formats, and static scales, are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, fake_quantize, per_channel, per_token
from bitgrain.numerics.formats import FP32
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.observers import StaticInput

Rounding = Literal["vllm", "transformers"]


class InputQuantizer(nn.Module):
    """x [..., in_features] -> the same rounded to `spec`'s grid, in the dtype of x. Without parameters.

    outer_scale: of nested scales (NVFP4), as in the file. static: the scale of a static spec, as in the file.
    columns: int32 [k], channels that stay as they are and do not count for the scales of the others.
    Raises SchemeError for a static spec without it.
    """

    def __init__(
        self,
        spec: QuantSpec,
        outer_scale: float | None = None,
        rounding: Rounding = "vllm",
        static: StaticInput | None = None,
        columns: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not spec.dynamic and static is None:
            raise SchemeError(f"inputs {spec.describe()} have a static scale, which only calibration can give")
        self.spec = spec
        self.outer_scale = outer_scale
        self.static = None if spec.dynamic else static
        self.columns = columns
        # a clipped input reaches the most negative code in every engine, also where the scale leaves it out
        self.all_codes = replace(spec, restricted=False)
        if spec.clusters and static is not None:  # as each channel sees it
            self.static = StaticInput(*static.by_channel())
            self.all_codes = replace(self.all_codes, clusters=0, granularity=per_channel(1))
        # compressed-tensors 0.20 gives a matrix [tokens, features] (OPT's MLP has such inputs) one scale for all tokens
        self.by_batch = rounding == "transformers" and spec.granularity == per_token()
        # ... and it chooses scales, divides and multiplies in the dtype of the model
        self.in_own_dtype = rounding == "transformers"

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        if self.columns is not None:
            kept = self.columns.to(x.device, torch.int64)
            rest = self._round_all(x.index_fill(-1, kept, 0.0))
            return rest.index_copy(-1, kept, x.index_select(-1, kept))
        return self._round_all(x)

    def _round_all(self, x: Tensor) -> Tensor:
        if self.by_batch:
            return self._round(x.reshape(1, -1) if x.ndim <= 2 else x.flatten(2).flatten(0, 1)).reshape(x.shape)
        return self._round(x)

    def _round(self, x: Tensor) -> Tensor:
        if self.static is not None:
            return self._round_static(x, self.static)
        if self.in_own_dtype and self.spec.symmetric and self.spec.scale == FP32:
            return self._round_as_transformers(x)
        outer = None
        if self.outer_scale is not None:
            outer = torch.full((1, 1), self.outer_scale, device=x.device)
        return fake_quantize(x, self.spec, outer_scale=outer)

    def _round_as_transformers(self, x: Tensor) -> Tensor:
        """The step of symmetric integers there: half the width of the range, over all codes."""
        tiles, low, high = to_tiles(x, self.spec.granularity), self.all_codes.low, self.all_codes.high
        step = tiles.abs().amax(-1, keepdim=True) / torch.tensor((high - low) / 2, dtype=x.dtype, device=x.device)
        step = torch.where(step == 0, torch.finfo(x.dtype).eps, step)
        return from_tiles(self._in_own_dtype(tiles, step), self.spec.granularity, tuple(x.shape))

    def _round_static(self, x: Tensor, static: StaticInput) -> Tensor:
        scale, zero = static.scale.to(x.device), None if static.zero is None else static.zero.to(x.device)
        if self.in_own_dtype:
            return self._in_own_dtype(x, scale.to(x.dtype), 0 if zero is None else zero.to(x.dtype))
        return fake_quantize(x, self.all_codes, scale=scale.float(), zero=zero)

    def _in_own_dtype(self, x: Tensor, scale: Tensor, zero: Tensor | int = 0) -> Tensor:
        v = (x / scale + zero).clamp(self.all_codes.low, self.all_codes.high)
        return (self.spec.format.round(v.float()).to(x.dtype) - zero) * scale

    def extra_repr(self) -> str:
        return self.spec.describe()


def quantize_inputs(module: nn.Module, quantizer: nn.Module) -> None:
    """From now on `module` (a linear layer, called with its input first) sees quantized inputs. A second quantizer
    replaces the first."""
    if not hasattr(module, "input_quantizer"):
        module.register_forward_pre_hook(_quantize)
    module.input_quantizer = quantizer


def _quantize(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(nn.Module, module.input_quantizer)(args[0]), *args[1:])


class _ExpertInputs(TorchFunctionMode):
    """Inside the forward of an experts module: every product with one of its weights gets a quantized input."""

    def __init__(self, quantizers: dict[int, InputQuantizer]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            quantizer = self.quantizers.get(args[1].untyped_storage().data_ptr())
            if quantizer is not None:
                args = (quantizer(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {F.linear, torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}


def quantize_expert_inputs(module: nn.Module, quantizers: dict[str, InputQuantizer]) -> None:
    """The same for an experts module that keeps its weights as 3-D parameters: `quantizers` by parameter name.

    The module must run its experts one by one (transformers' "eager" experts), so that each product is seen.
    """
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with parametrize.cached():  # a weight that is computed (in training) is the same tensor to the module
            # by attribute: in functional_call it is no Parameter
            seen = {getattr(module, name).untyped_storage().data_ptr(): q for name, q in quantizers.items()}
            with _ExpertInputs(seen):
                return forward(*args, **kwargs)

    for name, quantizer in quantizers.items():
        module.add_module(f"{name}_input_quantizer", quantizer)
    module.forward = watched
