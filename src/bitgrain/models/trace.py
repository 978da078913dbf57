"""What happens inside a module while it runs: products with its matrices, and its norms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.runtime.watch import Key, Watch, parameters_of


@dataclass(frozen=True)
class NormCall:
    """A norm with a gain, as it was called: input and output [tokens.., width]; `again` calls it likewise."""

    path: str
    x: Tensor
    y: Tensor
    again: Callable[[], Tensor]


@dataclass
class Trace:
    """products: (which matrix, its input), in the order of the calls; norms likewise; output: the module's."""

    output: Tensor
    products: list[tuple[Key, Tensor]] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)

    def input_of(self, name: str) -> Tensor | None:
        """What a matrix was first given [tokens, in]; None: it was not used."""
        return next((x.reshape(-1, x.shape[-1]) for key, x in self.products if key.name == name), None)


def norm_paths(module: nn.Module, outside: Collection[str] = ()) -> list[str]:
    """Modules that hold parameters, all of them vectors as a norm's are; not below `outside`."""
    found: list[str] = []
    for path, part in module.named_modules():
        own = list(part.parameters())
        holds = next(part.parameters(recurse=False), None) is not None
        if path and holds and all(p.ndim == 1 and p.is_floating_point() for p in own) and not below(path, outside):
            found.append(path)
    return found


def below(name: str, paths: Collection[str]) -> bool:
    """Whether one of `paths` is `name` or holds it."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


@torch.no_grad()
def trace(module: nn.Module, run: Callable[[], Tensor], matrices: Iterable[str], norms: Iterable[str]) -> Trace:
    """Run and note every product with `matrices` (names of parameters) and every call of `norms` (paths)."""
    found = Trace(torch.empty(0))

    def product(key: Key, x: Tensor) -> None:
        found.products.append((key, x))

    def note(path: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None and isinstance(y, Tensor) and x.shape == y.shape:
                found.norms.append(NormCall(path, x, y, lambda: norm(*args, **kwargs)))

        return hook

    handles = [module.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in norms]
    try:
        with Watch(parameters_of(module, matrices), product):
            found.output = run()
    finally:
        for handle in handles:
            handle.remove()
    return found
