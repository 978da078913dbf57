"""What a copy of a module's inner workings rests on: as long as it holds, the copy may run in the module's place."""
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import output_capturing

from bitgrain.kernels.native import native
from bitgrain.runtime.quant_linear import QuantLinear

Entry = tuple[Mapping[str, Any], str, Any]
"""A dictionary, a key and what it holds under it; None: nothing."""


class Guards:
    """Modules, hooks on them, their forwards, parameters: what must not change from `look` on."""

    def __init__(self) -> None:
        # hooks of all modules there are
        self._hooks: list[Mapping[int, Any]] = [
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ]
        self._entries: list[Entry] = []
        self._forwards: list[Entry] = []
        self._classes: dict[type[nn.Module], Any] = {}
        self._tensors: list[Tensor] = []

    @classmethod
    def of_block(cls, block: nn.Module, parameters: Mapping[str, Sequence[str]]) -> Guards:
        """All modules inside a block. parameters: path of a module -> names of its parameters that count."""
        made = cls()
        for parent in block.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    made.watch_child(parent, name)
        for path, names in parameters.items():
            made.watch_tensors(block.get_submodule(path)._parameters, names)
        made.look()
        return made

    def join(self, other: Guards) -> None:
        """Watch what the other one watches."""
        self._hooks += other._hooks[2:]
        self._entries += other._entries
        self._forwards += other._forwards
        self._classes.update(other._classes)
        self._tensors += other._tensors

    def watch_child(self, parent: nn.Module, name: str) -> None:
        """A module: that it is there, has the forward of its class, and nobody looks at it."""
        child = parent._modules[name]
        assert child is not None
        self.watch_value(parent._modules, name)
        self.watch_hooks(child)
        self._forwards.append((child.__dict__, "forward", None))
        self._classes[type(child)] = type(child).forward
        if isinstance(child, QuantLinear):
            self.watch_value(child.__dict__, "kernel")

    def watch_hooks(self, module: nn.Module) -> None:
        """That nobody looks at a module."""
        self._hooks += [module._forward_hooks, module._forward_pre_hooks]

    def watch_value(self, owner: Mapping[str, Any], name: str) -> None:
        """That a dictionary holds what it holds now."""
        self._entries.append((owner, name, owner.get(name)))

    def watch_tensors(self, owner: Mapping[str, Tensor | None], names: Iterable[str]) -> None:
        """Parameters or buffers of a module, and their numbers."""
        for name in names:
            if (one := owner[name]) is not None:
                self.watch_value(owner, name)
                self._tensors.append(one)

    def watch_settings(self, module: nn.Module) -> None:
        """Numbers and names among a module's attributes."""
        for name, value in vars(module).items():
            if isinstance(value, int | float | str):
                self.watch_value(vars(module), name)

    def look(self) -> None:
        """Note what everything is like."""
        self._seen, self._unpatched = native().Seen(self._entries), native().Seen(self._forwards)
        self._addresses = [one.data_ptr() for one in self._tensors]
        self._counted = [one for one in self._tensors if not one.is_inference()]  # the others count no changes
        self._versions = [one._version for one in self._counted]
        self._handles, self._left_behind = -1, False

    def hold(self) -> bool:
        """Whether modules, kernels and parameters are those that were there."""
        return (
            self._seen.hold()
            and [one.data_ptr() for one in self._tensors] == self._addresses
            and [one._version for one in self._counted] == self._versions
        )

    def need_gradients(self) -> bool:
        """Whether one of the parameters is to be trained."""
        return any(one.requires_grad for one in self._tensors)

    def no_hooks(self) -> bool:
        """Whether nobody looks into the block, and no module's forward is another one than its class had."""
        if not self._unpatched.hold() or any(one.forward is not own for one, own in self._classes.items()):
            return False
        handles = RemovableHandle.next_id  # counts all hooks that were ever registered
        if handles != self._handles:
            if not all_idle(self._hooks):
                return False
            self._left_behind = any(self._hooks)
            self._handles = handles
        return not self._left_behind or _nobody_collects()

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
    return _nobody_collects()


def _nobody_collects() -> bool:
    """Whether transformers was asked for no hidden states or attentions."""
    collector: Any = getattr(output_capturing, "_active_collector", None)
    return collector is not None and not collector.get()
