"""Why a model with packed weights is not written by transformers: its file would say nothing of how they are packed."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from bitgrain.errors import SchemeError
from bitgrain.runtime.lazy_weight import PackedWeight
from bitgrain.runtime.owned import OwnedBy


class SavePretrained(OwnedBy):
    """In the place of a model's `save_pretrained`, which runs once no weight is packed any more.

    Raises SchemeError while one is.
    """

    method = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.owner
        if any(isinstance(part, PackedWeight) for part in model.modules()):
            raise SchemeError(
                f"{self.method} cannot write packed weights: copy the folder that the model was loaded from, or load "
                "it with execution='dequantize' to write dense ones"
            )
        return getattr(type(model), self.method)(model, *args, **kwargs)


class PushToHub(SavePretrained):
    """The same of `push_to_hub`, before anything is asked of the hub."""

    method = "push_to_hub"


def refuse_to_save_packed(model: nn.Module) -> None:
    """Let `save_pretrained` and `push_to_hub` of a model say so."""
    own = cast(Any, model)
    own.save_pretrained, own.push_to_hub = SavePretrained(model), PushToHub(model)
