"""What a copy of a module's inner workings rests on: as long as it holds, the copy may run in the module's place."""
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, cast

from torch import Tensor, nn
from transformers.utils import output_capturing

from bitgrain.runtime.quant_linear import QuantLinear


class Guards:
    """What must not change: the modules of a block, the hooks on them, parameters."""

    def __init__(self, block: nn.Module, parameters: Mapping[str, Sequence[str]]) -> None:
        """parameters: path of a module -> names of its parameters that count."""
        self._hooks: list[Mapping[int, Any]] = []
        self._own: list[dict[str, Any]] = []
        # looked at before every token: what each dictionary holds, in one call
        self._modules: list[tuple[Callable[[Any], Any], dict[str, Any], Any]] = []
        for parent in block.modules():
            children = cast(dict[str, Any], parent._modules)
            self._watch(children, [name for name, child in children.items() if child is not None])
            for child in children.values():
                if child is not None:
                    self._hooks += [child._forward_hooks, child._forward_pre_hooks]
                    self._own.append(child.__dict__)
                    if isinstance(child, QuantLinear):
                        self._watch(child.__dict__, ["kernel"])
        self._parameters: list[tuple[dict[str, Any], str, Tensor, int, int]] = []
        for path, names in parameters.items():
            owned = cast(dict[str, Any], block.get_submodule(path)._parameters)
            self._parameters += [
                (owned, name, one, _version(one), one.data_ptr()) for name in names if (one := owned[name]) is not None
            ]

    def _watch(self, owner: dict[str, Any], names: Sequence[str]) -> None:
        if names:
            get = itemgetter(*names)
            self._modules.append((get, owner, get(owner)))

    def hold(self) -> bool:
        """Whether modules, kernels and parameters are those that were there."""
        try:
            for get, owner, found in self._modules:
                if get(owner) != found:  # modules and kernels are equal to themselves only
                    return False
        except KeyError:
            return False
        for owner, name, one, version, address in self._parameters:
            if owner.get(name) is not one or _version(one) != version or one.data_ptr() != address:
                return False
        return True

    def need_gradients(self) -> bool:
        """Whether one of the parameters is to be trained."""
        return any(one.requires_grad for _, _, one, _, _ in self._parameters)

    def no_hooks(self) -> bool:
        """Whether nobody looks into the block, and no module's forward is another one than its class has."""
        return all_idle(self._hooks) and not any("forward" in own for own in self._own)

    def looked_at(self, block: nn.Module) -> bool:
        """Whether somebody looks at the block itself."""
        return not all_idle([block._forward_hooks, block._forward_pre_hooks])


def _version(parameter: Tensor) -> int:
    """How often it was changed; tensors made under inference_mode count no changes."""
    return 0 if parameter.is_inference() else parameter._version


def all_idle(hooks: Sequence[Mapping[int, Any]]) -> bool:
    """Whether there are no hooks, but those that transformers leaves behind once it was asked for hidden states or
    attentions, while it is not asked."""
    if not any(hooks):
        return True
    if any(getattr(hook, "__module__", "") != output_capturing.__name__ for own in hooks for hook in own.values()):
        return False
    collector: Any = getattr(output_capturing, "_active_collector", None)
    return collector is not None and not collector.get()
