"""Specs that may say the same numbers in what a layout holds, the nearest first (`Layout.spellings`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bitgrain.numerics import Format, Granularity, IntFormat, QuantSpec
from bitgrain.numerics.spec import ZeroPoint


def near_spellings(
    spec: QuantSpec,
    formats: Sequence[Format],
    scales: Sequence[Format | QuantSpec],
    zeros: Sequence[ZeroPoint],
    granularities: Sequence[Granularity] = (),
) -> Iterator[QuantSpec]:
    """`spec` itself, then with another storage of its scales, another kind of zero point, an integer format of at least
    as many bits and another granularity out of those that are given; fewer changes and fewer bits first.

    Formats that are no integers, and nested scales among `scales`, replace the spec's own only as they are.
    """
    yield spec
    wider = [f for f in formats if f == spec.format or _holds(f, spec.format)]
    tiles = (spec.granularity, *(g for g in granularities if g != spec.granularity))
    kinds = [zero for zero in (spec.zero_point, *zeros) if zero in zeros]
    stores = [scale for scale in (spec.scale, *scales) if scale in scales]
    for tile, format, zero, scale in itertools.product(tiles, wider, dict.fromkeys(kinds), dict.fromkeys(stores)):
        storage = (spec.minimum or scale) if zero == "minimum" else None
        yield replace(
            spec,
            format=format,
            granularity=tile,
            zero_point=zero,
            scale=scale,
            minimum=storage,
            restricted=spec.restricted and zero == "none",
            ordered=spec.ordered and tile.cols is not None,
        )


def _holds(wide: Format, narrow: Format) -> bool:
    return isinstance(wide, IntFormat) and isinstance(narrow, IntFormat) and wide.bits >= narrow.bits
