"""peft's LoRA layer around a packed weight. Imports peft: import it only where adapters are wanted."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.runtime.low_bit_linear import LowBitLinear


class LowBitLora(Linear):
    """As peft's Linear; merging gives an ordinary dense layer, since the packed weight cannot take the sum."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise SchemeError(
            "adapters cannot be merged into a weight that is kept in low bits: merge_and_unload gives a dense model, "
            "which can be quantized again"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """What stands in this layer's place without peft: the packed layer, or (merge) the sum, dense."""
        base: Any = self.get_base_layer()
        assert isinstance(base, LowBitLinear)
        if not merge:
            return base
        dense: Any = base.to_dense()
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name in self.lora_A:
                self._add(dense, name, safe_merge)
        return dense

    def _add(self, dense: Any, name: str, safe_merge: bool) -> None:
        weight: Tensor = dense.weight.data
        upright = weight.T if self.get_base_layer().transposed else weight  # pyright: ignore[reportCallIssue]
        if name in self.lora_variant:
            total = self.lora_variant[name].merge_safe(self, name, upright)
        else:
            total = upright.float() + self.get_delta_weight(name).float()
        if safe_merge and not bool(torch.isfinite(total).all().item()):
            raise NumericsError(f"adapter {name} holds NaN or Inf: it cannot be merged; train it anew at a lower rate")
        upright.copy_(total)
        if self.lora_bias[name]:
            extra = self.lora_B[name].bias.data * self.scaling[name]
            dense.bias = nn.Parameter(extra if dense.bias is None else dense.bias.data + extra, requires_grad=False)
