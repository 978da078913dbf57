"""LastGood: the parameters of the last step whose loss was finite, put back where a loss is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitgrain.errors import TrainingError


class LastGood:
    """Watches the losses of a module that is trained.

    every  how many losses lie between two states that are kept; each takes the memory of the trained parameters
    """

    def __init__(self, module: nn.Module, every: int = 10) -> None:
        self._module, self._every = module, max(1, every)
        self._kept: dict[str, Tensor] = {}
        self._losses = 0

    @torch.no_grad()
    def check(self, loss: Tensor) -> None:
        """To be called with each loss before it is stepped on.

        Raises TrainingError for NaN and Inf; the module then holds the parameters of the last state that was kept.
        """
        parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        if bool(torch.isfinite(loss).all()):
            if self._losses % self._every == 0:
                self._kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            self._losses += 1
            return
        for name, tensor in self._kept.items():
            parameters[name].copy_(tensor)
        back = (self._losses - 1) % self._every + 1 if self._kept else 0
        kept = f"the module is as it was {back} losses before" if self._kept else "it was so from the start"
        raise TrainingError(
            f"training: loss {self._losses + 1} is {float(loss)}; {kept}. Go on with lower learning rates"
        )
