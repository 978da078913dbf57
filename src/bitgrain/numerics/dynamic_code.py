"""The dynamic code of 8 bits: numbers over seven decades, the finer the larger they are.

Dynamic tree quantization (Dettmers et al., arXiv 2110.02861, section 1.3 and figure 2): zeros in front stand for powers
of ten, the first one ends them, and the bits behind it count linearly through [0.1, 1). Here a number is the middle of
its interval, 0 is the code without a one, and the code that is left over is 1. Without a sign (second moments) the
bit goes to the fraction.
"""

from __future__ import annotations

import torch

_ZEROS = 7  # numbers of leading zeros: 0 to 6


def dynamic_values(*, signed: bool) -> tuple[float, ...]:
    """The 256 numbers, each a float32, ascending: from -0.993 or 0 to 1."""
    positive: list[float] = []
    for zeros in range(_ZEROS):
        count = 2 ** (_ZEROS - 1 - zeros + (0 if signed else 1))
        positive += [10.0**-zeros * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
    negative = [-value for value in positive] if signed else []
    return tuple(torch.tensor(sorted([*negative, 0.0, *positive, 1.0]), dtype=torch.float32).tolist())
