"""What a cache of keys and values holds: a QuantSpec each for keys and values, and how many tokens stay as they are.

| scheme               | keys                                  | values                              | kept newest |
|----------------------|---------------------------------------|-------------------------------------|-------------|
| int8, int4, int2     | per token and head                    | likewise                            | none        |
| kivi-int4, kivi-int2 | per channel, in groups of 32 tokens   | per token, in groups of 32 channels | 32 to 63    |
| fp8                  | E4M3, one static scale for each layer | likewise                            | none        |

KIVI (arXiv 2402.02750): outliers of keys sit in fixed channels, those of values do not. Its groups of tokens are
rounded when they are whole, once; until then they stay in full precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bitgrain.errors import SchemeError, unknown_name
from bitgrain.numerics import QuantSpec, per_block, per_group, per_tensor, per_token
from bitgrain.numerics.formats import FP8_E4M3, FP16, FP32, IntFormat
from bitgrain.numerics.packing import packed_length

GROUP = 32


@dataclass(frozen=True)
class CacheScheme:
    """keys, values: specs of [.., tokens, head size]; recent: how many tokens stay in full precision at least.

    scales  of static specs, for each layer of the cache those of keys and values (None: it keeps none); (): all are 1
    """

    name: str
    keys: QuantSpec
    values: QuantSpec
    recent: int = 0
    scales: tuple[tuple[float, float] | None, ...] = ()

    def __post_init__(self) -> None:
        for what, spec in (("keys", self.keys), ("values", self.values)):
            if spec.dynamic and spec.granularity.rows is None:
                raise SchemeError(
                    f"{self.name}: {what} {spec.describe()} would change the scale of tokens already held"
                )
            if isinstance(spec.scale, QuantSpec) or spec.outliers or spec.format.bits > 8:
                raise SchemeError(f"{self.name}: {what} {spec.describe()} have no place in a cache")

    @property
    def static(self) -> bool:
        """Whether its scales come from calibration."""
        return not (self.keys.dynamic or self.values.dynamic)

    @property
    def step(self) -> int:
        """Tokens that are rounded together; 1 for none."""
        return math.lcm(*(tokens_of(spec) for spec in (self.keys, self.values)))

    def indivisible(self, head_size: int) -> str | None:
        """Why groups do not fit heads of this size, or None."""
        for what, spec in (("keys", self.keys), ("values", self.values)):
            group = spec.granularity.cols
            if group not in (None, 1) and head_size % group:
                return f"the {what} of {self.name} have groups of {group} channels, which do not divide {head_size}"
        return None

    def count_bytes(self, tokens: int, key_size: int, value_size: int, dtype: torch.dtype) -> int:
        """What is held of `tokens` tokens of one head, with keys and values of so many channels."""
        whole = max(0, tokens - self.recent) // self.step * self.step
        newest = (tokens - whole) * (key_size + value_size) * dtype.itemsize
        sides = ((self.keys, key_size), (self.values, value_size))
        return newest + sum(_block_bytes(spec, size) * whole // tokens_of(spec) for spec, size in sides)


def tokens_of(spec: QuantSpec) -> int:
    """How many tokens share a scale; 1 where the scale is static."""
    return spec.granularity.rows or 1


def _block_bytes(spec: QuantSpec, head_size: int) -> int:
    """Of the tokens that share scales: packed codes, scales, zero points."""
    rows = tokens_of(spec)
    codes = rows * packed_length(head_size, spec.format.bits, torch.uint8)
    if not spec.dynamic:
        return codes
    across = spec.granularity.tiles((rows, head_size))[1]
    return codes + across * spec.scale_format.bits // 8 * (1 if spec.symmetric else 2)


def _by_token(bits: int) -> QuantSpec:
    return QuantSpec(IntFormat(bits, is_signed=False), per_token(), zero_point="real", scale=FP16, dynamic=True)


def token_bits(spec: QuantSpec) -> int | None:
    """The bits of codes with a scale and a real zero point in float16 for each token; None for any other spec."""
    return next((bits for bits in (8, 4, 2) if spec == _by_token(bits)), None)


def _kivi(bits: int) -> CacheScheme:
    format = IntFormat(bits, is_signed=False)
    keys = QuantSpec(format, per_block(GROUP, 1), zero_point="real", scale=FP16, dynamic=True)
    values = QuantSpec(format, per_group(GROUP), zero_point="real", scale=FP16, dynamic=True)
    return CacheScheme(f"kivi-int{bits}", keys, values, recent=GROUP)


_FP8 = QuantSpec(FP8_E4M3, per_tensor(), scale=FP32)
SCHEMES: dict[str, CacheScheme] = {
    scheme.name: scheme
    for scheme in (
        *(CacheScheme(f"int{bits}", _by_token(bits), _by_token(bits)) for bits in (8, 4, 2)),
        *(_kivi(bits) for bits in (4, 2)),
        CacheScheme("fp8", _FP8, _FP8),
    )
}


def get_cache_scheme(name: str | CacheScheme) -> CacheScheme:
    """The scheme called `name`. Raises SchemeError that lists all."""
    if isinstance(name, CacheScheme):
        return name
    known = SCHEMES.get(name.strip().lower().replace("_", "-"))
    if known is None:
        raise SchemeError(unknown_name("KV cache scheme", name, list(SCHEMES), name.lower()))
    return known
