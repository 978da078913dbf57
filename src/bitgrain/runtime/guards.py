"""What a copy of a module's inner workings rests on: as long as it holds, the copy may run in the module's place."""
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers.utils import output_capturing

from bitgrain.runtime.quant_linear import QuantLinear


class Guards:
    """What must not change: the modules of a block, the hooks on them, parameters."""

    def __init__(self, block: nn.Module, parameters: Mapping[str, Sequence[str]]) -> None:
        """parameters: path of a module -> names of its parameters that count."""
        self._places: list[tuple[dict[str, Any], str]] = []
        self._hooks: list[Mapping[int, Any]] = []
        self._own: list[dict[str, Any]] = []
        for parent in block.modules():
            children = cast(dict[str, Any], parent._modules)
            for name, child in children.items():
                if child is not None:
                    self._places.append((children, name))
                    self._hooks += [child._forward_hooks, child._forward_pre_hooks]
                    self._own.append(child.__dict__)
                    if isinstance(child, QuantLinear):
                        self._places.append((child.__dict__, "kernel"))
        self._parameters: list[Tensor] = []
        for path, names in parameters.items():
            owned = cast(dict[str, Any], block.get_submodule(path)._parameters)
            for name in names:
                self._places.append((owned, name))
                self._parameters.append(owned[name])
        self._found = self._look()

    def _look(self) -> tuple[list[Any], list[int], list[int]]:
        parameters = self._parameters
        return (
            [id(own[name]) if name in own else 0 for own, name in self._places],
            # tensors made under inference_mode count no changes
            [0 if one.is_inference() else one._version for one in parameters],
            [one.data_ptr() for one in parameters],
        )

    def hold(self) -> bool:
        """Whether modules, kernels and parameters are those that were there."""
        return self._look() == self._found

    def need_gradients(self) -> bool:
        """Whether one of the parameters is to be trained."""
        return any(one.requires_grad for one in self._parameters)

    def no_hooks(self) -> bool:
        """Whether nobody looks into the block, and no module's forward is another one than its class has."""
        return all_idle(self._hooks) and not any("forward" in own for own in self._own)

    def looked_at(self, block: nn.Module) -> bool:
        """Whether somebody looks at the block itself."""
        return not all_idle([block._forward_hooks, block._forward_pre_hooks])


def all_idle(hooks: Sequence[Mapping[int, Any]]) -> bool:
    """Whether there are no hooks, but those that transformers leaves behind once it was asked for hidden states or
    attentions, while it is not asked."""
    if not any(hooks):
        return True
    if any(getattr(hook, "__module__", "") != output_capturing.__name__ for own in hooks for hook in own.values()):
        return False
    collector: Any = getattr(output_capturing, "_active_collector", None)
    return collector is not None and not collector.get()
