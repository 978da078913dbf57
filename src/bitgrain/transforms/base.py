"""What a Transform is, and the registry in which a name finds one.

A transform rewrites a model without changing its full-precision function, so that less is lost when it is quantized. A
new one is one file: a frozen dataclass whose fields are the method's settings, with `@register_transform("name")`,
imported in this package's `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec
from bitgrain.solvers.base import make_with_settings


@dataclass(frozen=True)
class Pair:
    """Matrices whose inputs may be rescaled because what writes them can take the inverse.

    kind     "norm": a norm with a gain writes for all readers; "linear": the rows of a matrix do (v -> o, up -> down)
    writer   path in the block of the norm module, or the name of the writing parameter ("self_attn.v_proj.weight")
    readers  names of the parameters that read it, all of them, routers included ("self_attn.q_proj.weight")
    repeats  how often each head of `head` rows of the writer is read in the reader's columns (GQA: query heads for each
             head of keys and values); 1 where columns and rows correspond one to one
    head     rows of one head; 0 where there are no heads
    """

    kind: str
    writer: str
    readers: tuple[str, ...]
    repeats: int = 1
    head: int = 0


@dataclass
class BlockView:
    """One block of a model as a transform sees it; all names are relative to the block.

    module    with real float32 weights, to be rewritten in place
    path      its path in the model ("model.layers.3")
    pairs     what was discovered and proved for it
    specs     parameter -> (spec of its weight, spec of its inputs or None), for those that will be quantized
    absmax    parameter -> [in]: largest |x| of each input channel over the calibration tokens, full-precision model
    mean_abs  parameter -> [in]: mean |x|
    samples   how many calibration batches `run` knows
    run       (i) -> the block's output [tokens.., hidden] on batch i with the weights that `module` has now
    """

    module: nn.Module
    path: str
    pairs: Sequence[Pair]
    specs: Mapping[str, tuple[QuantSpec, QuantSpec | None]]
    absmax: Mapping[str, Tensor] = field(default_factory=dict)
    mean_abs: Mapping[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    run: Callable[[int], Tensor] | None = None


class Transform(Protocol):
    """Rewrites weights in place so that the full-precision output stays the same."""

    whole_model: ClassVar[bool]
    """Whether `apply_outside` must be called too, before the first block."""

    def apply_outside(self, model: nn.Module) -> dict[str, Any]:
        """Rewrite what lies outside the blocks (embeddings, final norm, lm_head); blocks may be on the meta device.

        Returns figures for the manifest. Raises NumericsError, ModelError (the model's structure does not allow it).
        """
        ...

    def apply(self, block: BlockView) -> dict[str, Any]:
        """Rewrite one block. Returns figures for the manifest (alpha found, proof's difference, ...).

        Raises NumericsError if the output before and after differs by more than the tolerance, ModelError.
        """
        ...


_TRANSFORMS: dict[str, Callable[..., Transform]] = {}


def register_transform(name: str) -> Callable[[type], type]:
    """Class decorator: makes a transform available under `name` in recipes."""

    def add(cls: type) -> type:
        _TRANSFORMS[name] = cls
        return cls

    return add


def transform_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_TRANSFORMS)


def get_transform(choice: str | Mapping[str, Any]) -> Transform:
    """The transform called `choice` (case-insensitive), or {"name": ..., setting: value, ...}.

    Raises SchemeError for an unknown name, an unknown setting, or a setting of the wrong type, listing what there is.
    """
    settings: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = settings.pop("name", None)
    maker = _TRANSFORMS.get(name.lower()) if isinstance(name, str) else None
    if maker is None:
        known = ", ".join(transform_names()) or "none in this version"
        raise SchemeError(f"unknown transform {name!r}; known transforms: {known}")
    return make_with_settings(maker, settings, f"transform {name!r}")
