"""What a module keeps beside its parts, and what has to know the module."""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import nn


class OwnedBy:
    """In place of one of a module's methods: `owner` is the module.

    It is known weakly, since it owns this: there is no circle that keeps a model in memory. A copy or a pickle of the
    module has one of its own.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = ref(owner)

    @property
    def owner(self) -> nn.Module:
        """The module whose method this is."""
        owner = self._owner()
        assert owner is not None
        return owner

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._owner = ref(state["owner"])
