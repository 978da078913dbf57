"""How Q, K, P and V of attention are quantized: SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958).

| scheme    | Q, K                                               | P             | V                |
|-----------|----------------------------------------------------|---------------|------------------|
| int8      | int8 per token, K without its mean over the tokens | as it is      | as it is         |
| int8-tile | int8 per tile of tokens, likewise                  | as it is      | as it is         |
| int8-int8 | int8 per token, likewise                           | int8, 1 / 127 | int8 per channel |
| int8-fp8  | int8 per token, likewise                           | E4M3, 1 / 448 | E4M3 per channel |
| int4-fp8  | int4 per token, Q without its mean over a tile too | E4M3, 1 / 448 | E4M3 per channel |

P is exp(score - largest score so far), between 0 and 1, so that one constant scale fits it.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitgrain.errors import SchemeError, unknown_name
from bitgrain.numerics import Granularity, QuantSpec, per_channel, per_tensor, per_token
from bitgrain.numerics.formats import FP8_E4M3, Format, IntFormat
from bitgrain.runtime.attention.contraction import PV, QK


@dataclass(frozen=True)
class AttentionScheme:
    """Specs of matrices [tokens, channels] of one head, None for as it is; P and V go together.

    q, k      granularity.rows None: the tokens of a tile share a scale
    p, v      p has one scale; v has granularity.rows None: all tokens of a text share scales
    smooth_k  K without its mean over the tokens: softmax does not see a constant for each query, and caps and sinks,
              which do, get it back
    smooth_q  Q without its mean over a tile; what that takes away is added in full precision
    q_tile, k_tile   tokens that are worked on together
    Raises SchemeError for scales along an axis that is summed over (`contraction`).
    """

    name: str
    q: QuantSpec | None = None
    k: QuantSpec | None = None
    p: QuantSpec | None = None
    v: QuantSpec | None = None
    smooth_k: bool = True
    smooth_q: bool = False
    q_tile: int = 128
    k_tile: int = 64

    def __post_init__(self) -> None:
        QK.check(0, _varies(self.q, "qd"), f"{self.name}: Q")
        QK.check(1, _varies(self.k, "kd"), f"{self.name}: K")
        PV.check(0, _varies(self.p, "qk"), f"{self.name}: P")
        PV.check(1, _varies(self.v, "kd"), f"{self.name}: V")
        if (self.q is None) != (self.k is None) or (self.p is None) != (self.v is None):
            raise SchemeError(f"{self.name}: the two operands of a product are quantized together, or neither")
        for spec in (self.q, self.k, self.p, self.v):
            if spec is not None and not spec.symmetric:
                raise SchemeError(f"{self.name}: {spec.describe()}: zero points are not taken out of a product here")

    @property
    def formats(self) -> tuple[str, ...]:
        """Of Q, K, P and V, as the operator table names them."""
        specs = (self.q, self.k, self.p, self.v)
        return tuple("-" if spec is None else f"{spec.format} {spec.granularity}" for spec in specs)


def _varies(spec: QuantSpec | None, axes: str) -> str:
    """The axes of a matrix [rows, columns] along which the scales of a spec vary."""
    if spec is None:
        return ""
    rows, cols = spec.granularity.rows, spec.granularity.cols
    return (axes[0] if rows is not None else "") + (axes[1] if cols is not None else "")


def _int(bits: int, granularity: Granularity) -> QuantSpec:
    return QuantSpec(IntFormat(bits), granularity, restricted=True, dynamic=True)


def _p(format: Format) -> QuantSpec:
    return QuantSpec(format, per_tensor(), restricted=isinstance(format, IntFormat), dynamic=True)


def _v(format: Format) -> QuantSpec:
    return QuantSpec(format, per_channel(1), restricted=isinstance(format, IntFormat), dynamic=True)


_INT8 = IntFormat(8)
_TOKEN8, _TILE8, _TOKEN4 = _int(8, per_token()), _int(8, per_tensor()), _int(4, per_token())
SCHEMES: dict[str, AttentionScheme] = {
    scheme.name: scheme
    for scheme in (
        AttentionScheme("int8", _TOKEN8, _TOKEN8),
        AttentionScheme("int8-tile", _TILE8, _TILE8),
        AttentionScheme("int8-int8", _TOKEN8, _TOKEN8, _p(_INT8), _v(_INT8)),
        AttentionScheme("int8-fp8", _TOKEN8, _TOKEN8, _p(FP8_E4M3), _v(FP8_E4M3)),
        AttentionScheme("int4-fp8", _TOKEN4, _TOKEN4, _p(FP8_E4M3), _v(FP8_E4M3), smooth_q=True),
    )
}


def get_attention_scheme(name: str | AttentionScheme) -> AttentionScheme:
    """The scheme called `name`. Raises SchemeError that lists all."""
    if isinstance(name, AttentionScheme):
        return name
    key = name.strip().lower().replace("_", "-").removeprefix("bitgrain-")
    if key in SCHEMES:
        return SCHEMES[key]
    raise SchemeError(unknown_name("attention scheme", name, list(SCHEMES), key))
