"""What a Transform is, and the registry in which a name finds one.

A transform rewrites a model without changing its full-precision function, so that less is lost when it is quantized. A
new one is one file: a frozen dataclass whose fields are the method's settings, with `@register_transform("name")`,
imported in this package's `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.clusters import Clusters
from bitgrain.solvers.base import make_with_settings


@dataclass(frozen=True)
class Pair:
    """Matrices whose inputs may be rescaled because what writes them can take the inverse.

    kind        "norm": a norm with a gain writes for all readers; "linear": rows of a matrix do (v -> o, up -> down)
    writer      path in the block of the norm module, or the name of the writing parameter ("self_attn.v_proj.weight")
    readers     names of the parameters that read it, all of them, routers included ("self_attn.q_proj.weight")
    width       channels: gains of the norm, or rows of the writer (of each expert, where it is a stack)
    gain        norms: name of the gain, which enters as (offset + gain): offset is 1 for Gemma's, else 0
    bias        name of the bias of the norm or of the writer; "" where there is none
    transposed  those among writer and readers that are stored [.., in, out] instead of [.., out, in]
    repeats     how often each head of the writer is read in the reader's columns (GQA: query heads for each head of
                keys and values); 1 where columns and rows correspond one to one
    head        rows of one head; 0 where there are no heads
    mixes       whether any matrix may act on the rows of a head if its inverse acts on the reader (attention adds up
                tokens, so yes; behind the activation of an MLP only scaling is possible)
    start, span, stride
                which rows of the writer: `span` rows from `start`, again every `stride` rows, `width` in all (in a
                fused q/k/v matrix only v's); span 0: `width` rows from `start`
    """

    kind: Literal["norm", "linear"]
    writer: str
    readers: tuple[str, ...]
    width: int
    gain: str = ""
    offset: float = 0.0
    bias: str = ""
    transposed: frozenset[str] = frozenset()
    repeats: int = 1
    head: int = 0
    mixes: bool = False
    start: int = 0
    span: int = 0
    stride: int = 0

    def __str__(self) -> str:
        return f"{self.writer} -> {', '.join(self.readers)}"


@dataclass(frozen=True)
class Stream:
    """What a block (or what lies outside the blocks) does with the residual stream.

    hidden      its width
    norms       pairs of the norms that read it; together their readers are all that read it
    writers     names of the matrices whose output is added to it; outside the blocks the embeddings are among them
    biases      of the writers, those that there are
    transposed  those writers that are stored [.., in, out]; embeddings are, being [tokens, hidden]
    centred     whether a norm subtracts the mean: a rotation must then leave the mean alone
    doubt       what speaks against a rotation: told where its proof fails; "" for nothing
    """

    hidden: int
    norms: tuple[Pair, ...]
    writers: tuple[str, ...]
    biases: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    centred: bool = False
    doubt: str = ""


@dataclass
class BlockView:
    """One block of a model as a transform sees it; all names are relative to the block.

    module    with real float32 weights, to be rewritten in place
    path      its path in the model ("model.layers.3")
    pairs     what was discovered and proved for it
    run       (i) -> the block's output [tokens.., hidden] on calibration batch i with the weights that `module` has now
    samples   how many batches `run` knows, at least one
    stream    what was discovered of the residual stream
    specs     parameter -> (spec of its weight, spec of its inputs or None), for those that will be quantized
    absmax    parameter -> [in] (stacks may have [experts, in]): largest |x| of each input channel over the calibration
              tokens in the full-precision model, as earlier transforms left it: measure again after each transform
    mean_abs  parameter -> the same of mean |x|
    low, high parameter -> the same of the smallest and the largest x
    clusters  to be filled by what clusters inputs: parameter -> the order its columns have now, and the clusters
    memory    what the transform itself left in `OutsideView.memory`
    """

    module: nn.Module
    path: str
    pairs: Sequence[Pair]
    run: Callable[[int], Tensor]
    samples: int = 1
    stream: Stream | None = None
    specs: Mapping[str, tuple[QuantSpec, QuantSpec | None]] = field(default_factory=dict)
    absmax: Mapping[str, Tensor] = field(default_factory=dict)
    mean_abs: Mapping[str, Tensor] = field(default_factory=dict)
    low: Mapping[str, Tensor] = field(default_factory=dict)
    high: Mapping[str, Tensor] = field(default_factory=dict)
    clusters: dict[str, Clusters] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class OutsideView:
    """A model without its blocks as a transform sees it; names are the model's.

    module     the model; its blocks may be on the meta device
    stream     what was discovered of the residual stream: the embeddings write it, the final norm reads it
    run        the model's output for a few tokens with the weights that it has now, each block handing on its input
    residuals  float32 [tokens, hidden]: what enters the blocks, calibration tokens of all of them; runs the model once
    memory     to be filled with what `apply` needs to know of `apply_outside`
    """

    module: nn.Module
    stream: Stream
    run: Callable[[], Tensor]
    residuals: Callable[[], Tensor]
    memory: dict[str, Any] = field(default_factory=dict)


class Transform(Protocol):
    """Rewrites weights in place so that the full-precision output stays the same."""

    whole_model: ClassVar[bool]
    """Whether `apply_outside` must be called too, before the first block."""

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Rewrite what lies outside the blocks (embeddings, final norm, lm_head).

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
