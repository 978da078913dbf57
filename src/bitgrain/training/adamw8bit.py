"""AdamW whose two moments are held in 8 bits, in blocks (Dettmers et al., arXiv 2110.02861).

A state is a QTensor of the parameter seen as one row: dynamic code (signed for the first moment, unsigned for the
second), one float32 scale for each block of consecutive elements (section 2.1 there). A step dequantizes it, is AdamW's
in 32 bits, and quantizes again: 2.03 bytes for each element instead of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_group, quantize

MIN_8BIT_SIZE = 4096
"""Parameters with fewer elements (norms, biases) keep states of 32 bits: they weigh little and matter much."""
BLOCK_SIZE = 256
_FIRST, _SECOND = "exp_avg", "exp_avg_sq"


class AdamW8bit(Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) with 8-bit states.

    lr, betas, eps, weight_decay  as torch.optim.AdamW, each also for a group of parameters
    block_size     elements that share a scale
    min_8bit_size  parameters with fewer elements have 32-bit states; then a step is torch.optim.AdamW's to the bit
    Raises SchemeError for settings without a meaning, NumericsError for a gradient with NaN or Inf: parameters and
    states of the tensors before it have then made their step, those of the tensor itself have not.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = BLOCK_SIZE,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise SchemeError(
                f"AdamW8bit: lr, eps and weight_decay are not negative, betas are from 0 to below 1, not lr {lr}, "
                f"eps {eps}, weight_decay {weight_decay}, betas {betas}"
            )
        self.specs = {
            _FIRST: QuantSpec(get_format("dynamic8"), per_group(block_size)),
            _SECOND: QuantSpec(get_format("udynamic8"), per_group(block_size)),
        }
        self.min_8bit_size = min_8bit_size
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """A state of a parameter, "exp_avg" or "exp_avg_sq", float32 in its shape."""
        state = self.state[parameter]
        if name in state:
            return state[name]
        q = QTensor(state[f"{name}_codes"], state[f"{name}_scales"], None, self.specs[name])
        return q.dequantize().view(parameter.shape)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's. torch casts states to the dtype of their parameter, which codes would not survive."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, own, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to(parameter.device if name != "step" else value.device, copy=True)
                    for name, value in state_dict["state"][key].items()
                }

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise SchemeError("AdamW8bit has no sparse gradients: use dense embeddings")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in self.specs:
                self._store(parameter, name, torch.zeros_like(parameter, dtype=torch.float32))
        beta1, beta2 = group["betas"]
        grad = grad.float()
        first = self.moment(parameter, _FIRST).lerp(grad, 1 - beta1)
        second = self.moment(parameter, _SECOND).mul(beta2).addcmul_(grad, grad, value=1 - beta2)
        self._store(parameter, _FIRST, first)
        self._store(parameter, _SECOND, second)
        state["step"] += 1
        steps = float(state["step"])
        root = second.sqrt().div_((1 - beta2**steps) ** 0.5).add_(group["eps"])
        new = parameter.float().mul(1 - group["lr"] * group["weight_decay"])
        parameter.copy_(new.addcdiv_(first, root, value=-(group["lr"] / (1 - beta1**steps))))

    def _store(self, parameter: Tensor, name: str, moment: Tensor) -> None:
        state = self.state[parameter]
        if parameter.numel() < self.min_8bit_size:
            state[name] = moment
            return
        try:
            q = quantize(moment.reshape(1, -1), self.specs[name], name=f"the gradient of {tuple(parameter.shape)}")
        except NumericsError as error:
            raise NumericsError(f"{str(error).partition(';')[0]}: lower the rate, or clip gradients") from error
        codes = q.codes
        if name == _SECOND:
            # a moment that is there must not become 0: the next step would be divided by eps alone
            codes = torch.where((moment.reshape(1, -1) > 0) & (codes == 0), 1, codes)
        state[f"{name}_codes"], state[f"{name}_scales"] = codes, q.scale


def state_nbytes(optimizer: Optimizer) -> int:
    """Bytes of all states of any torch optimizer."""
    states = chain.from_iterable(state.values() for state in optimizer.state.values())
    return sum(value.nbytes for value in states if isinstance(value, Tensor))
