"""What a decoder layer is made of, by the paths of its modules: how it is run as few native calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.kernels.rows import Act, Rotary


@dataclass(frozen=True)
class NormPlan:
    """A norm by its path in the block. offset: the gain is offset + weight."""

    path: str
    weight: str
    bias: str
    eps: float
    centered: bool
    offset: float


@dataclass(frozen=True)
class AttentionPlan:
    """Paths in the block, and what they mean (`kernels.decoder.AttentionPart`).

    module    what is given to the attention interface, with `extras`: what it adds to the layer's own arguments
    plain     whether softmax(scale q k) v is all that attention does, so that the native one may stand for it
    layer     its number in the cache
    """

    norm: NormPlan
    qkv: tuple[str, ...]
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary
    scale: float
    q_norm: NormPlan | None
    k_norm: NormPlan | None
    module: str
    extras: Mapping[str, Any]
    plain: bool
    layer: int


@dataclass(frozen=True)
class MlpPlan:
    norm: NormPlan
    gate_up: tuple[str, ...]
    down: str
    act: Act
    joined: bool


@dataclass(frozen=True)
class BlockPlan:
    """mlp None: what comes behind attention stays with the modules `rest`, (norm, mlp)."""

    attention: AttentionPlan
    mlp: MlpPlan | None
    rest: tuple[str, str]
    arguments: frozenset[str]
    cache: str

    def linears(self) -> tuple[str, ...]:
        """Paths of the layers whose products run natively."""
        attention, mlp = self.attention, self.mlp
        return (*attention.qkv, attention.o, *(() if mlp is None else (*mlp.gate_up, mlp.down)))

    def norms(self) -> dict[str, list[str]]:
        """Path of each norm that runs natively -> its parameters."""
        attention = self.attention
        all_norms = (attention.norm, attention.q_norm, attention.k_norm, self.mlp and self.mlp.norm)
        return {one.path: [name for name in (one.weight, one.bias) if name] for one in all_norms if one is not None}
