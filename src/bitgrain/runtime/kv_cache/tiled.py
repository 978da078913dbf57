"""Keys, or values, of one layer on the CPU, packed as the kernels of decode attention read them.

It stands where `Held` does, for schemes with a scale and a real zero point for each token (int8, int4, int2): the same
codes, the same numbers, in another order. What it returns for a few tokens is a `Past` (`past.py`): attention reads the
packed codes, everything else sees the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.kernels.native import DTYPES, is_available
from bitgrain.kernels.packed_states import PackedStates, fits
from bitgrain.numerics import QuantSpec, quantize
from bitgrain.runtime.kv_cache.schemes import token_bits


def is_served(spec: QuantSpec, states: Tensor) -> bool:
    """Whether there is a kernel for such keys or values."""
    return (
        is_available()
        and token_bits(spec) is not None
        and states.device.type == "cpu"
        and states.dtype in DTYPES
        and fits(states.shape[-1])
    )


class Tiled:
    """Tensors are [b, h, tokens, d]. states: like those that will be held. Methods as of `Held`.

    changes  how often tokens that were held became others
    formats  of keys and values, as the operator table names them
    """

    def __init__(self, spec: QuantSpec, states: Tensor, *, values: bool) -> None:
        bits = token_bits(spec)
        assert bits is not None
        self.spec, self.changes = spec, 0
        self.formats = (f"{spec.format} {spec.granularity}",) * 2
        batch, heads, _, size = states.shape
        self.packed = PackedStates(batch, heads, size, bits, values=values)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.packed.tokens

    @property
    def nbytes(self) -> int:
        """Of everything held, but not of memory taken for tokens to come."""
        return self.packed.nbytes

    @property
    def allocated(self) -> int:
        """With the memory that is taken for tokens to come, or that dropped ones left."""
        return self.packed.allocated

    def add(self, x: Tensor) -> None:
        """Round and add tokens. Raises NumericsError for NaN, Inf and scales beyond float16."""
        if x.shape[2] and not self.packed.append(x.detach()):
            try:
                quantize(x, self.spec, name="the keys or values of a cache")
            except NumericsError as error:
                raise NumericsError(f"{str(error).partition(';')[0]}: run the model in bfloat16 or float32") from error

    def newest(self, count: int, dtype: torch.dtype) -> Tensor:
        """So many of the newest tokens, as numbers."""
        return self.packed.read(dtype, (self.packed.first + self.packed.tokens - count, count))

    def append(self, x: Tensor) -> Tensor:
        """Add tokens; returns all that are held as numbers, in the dtype of x."""
        self.add(x)
        return self.newest(self.tokens, x.dtype)

    def drop_oldest(self, count: int) -> None:
        """Forget the first tokens."""
        self.packed.drop_oldest(count)

    def crop(self, count: int) -> None:
        """Forget the newest tokens."""
        self.changes += 1
        self.packed.crop(count)

    def select(self, rows: Tensor) -> None:
        """Let the batch be `rows` of it, int64 [new batch]."""
        self.changes += 1
        self.packed.select(rows)

    def repeat(self, times: int) -> None:
        """Each row of the batch `times` times, one behind the other."""
        self.select(torch.arange(self.packed.batch).repeat_interleave(times))

    def to(self, device: torch.device | str) -> None:
        """It stays on the CPU."""
