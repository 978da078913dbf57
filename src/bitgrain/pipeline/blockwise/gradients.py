"""What multiplies each matrix of a module, and the gradients that flow back to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.runtime.watch import Key, Watch


@dataclass
class _Product:
    x: Tensor
    by_output: Tensor | None = None
    by_input: Tensor | None = None


class Recorder:
    """Run the module inside `with recorder.watch:`, then backward; `found` tells what was seen.

    parameters  name -> parameter; inputs: names for which gradients by the inputs are wanted too
    """

    def __init__(self, parameters: Mapping[str, Tensor], inputs: Container[str] = ()) -> None:
        self._inputs = inputs
        self._seen: dict[Key, list[_Product]] = defaultdict(list)
        self.watch = Watch(parameters, self._product, output=self._output)

    def _product(self, key: Key, x: Tensor) -> Tensor | None:
        product = _Product(x.detach().reshape(-1, x.shape[-1]))
        self._seen[key].append(product)
        if key.name not in self._inputs or not x.requires_grad:
            return None
        alone = x.view_as(x)  # so that what other products send back to x is not counted

        def keep(g: Tensor) -> None:
            product.by_input = g.detach().reshape(-1, g.shape[-1])

        alone.register_hook(keep)
        return alone

    def _output(self, key: Key, y: Tensor) -> None:
        product = self._seen[key][-1]

        def keep(g: Tensor) -> None:
            product.by_output = g.detach().reshape(-1, g.shape[-1])

        if y.requires_grad:
            y.register_hook(keep)

    def found(self) -> Iterator[tuple[Key, Tensor, Tensor, Tensor | None]]:
        """Each matrix that gradients reached: inputs [tokens, in], gradients by its outputs [tokens, out], and by its
        inputs [tokens, in] where they were wanted."""
        for key, products in self._seen.items():
            known = [(p.x, p.by_output) for p in products if p.by_output is not None and len(p.x)]
            if known:
                x, g = torch.cat([x for x, _ in known]), torch.cat([g for _, g in known])
                back = [p.by_input for p in products if p.by_input is not None and len(p.x)]
                yield key, x, g, torch.cat(back) if len(back) == len(known) else None
