"""Orthogonal matrices with entries of one magnitude (Hadamard) or nearly so, for any size, applied fast.

Sizes are split into a power of two and a rest: H_n = H_(2^k) x H_m (Kronecker). H_m is Paley's (R. Paley, "On
orthogonal matrices", J. Math. Phys. 12, 1933) where m is 4, 8, ... times such an order, else random and orthogonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_LARGEST_PIECE = 64
"""Sylvester's matrices are applied in pieces of at most this size."""


@dataclass(frozen=True)
class Rotation:
    """x -> x @ Q for row vectors [.., n]; Q is orthogonal, and its own kind for every seed.

    keep_mean  False: Q = diag(s) H, with random signs s, as QuaRot's (arXiv 2404.00456, section 3)
               True: Q = H diag(s) H^T with H's first column constant and s_0 = 1, so that (1, .., 1) stays where it is:
               then a LayerNorm, which subtracts the mean, commutes with Q as an RMSNorm does with any rotation
    """

    n: int
    seed: int
    keep_mean: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x @ Q, in float32."""
        signs = self._signs(x.device)
        if self.keep_mean:
            return self._times(self._times(x) * signs, transposed=True)
        return self._times(x * signs)

    def undo(self, x: Tensor) -> Tensor:
        """x @ Q^T: the inverse."""
        signs = self._signs(x.device)
        if self.keep_mean:
            return self(x)  # Q is symmetric
        return self._times(x, transposed=True) * signs

    def matrix(self, device: torch.device | None = None) -> Tensor:
        """Q itself, float32 [n, n]."""
        return self(torch.eye(self.n, device=device))

    def _signs(self, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.n,), generator=generator).float() * 2 - 1
        if self.keep_mean:
            signs[0] = 1.0
        return signs.to(device)

    def _times(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x @ H or x @ H^T, one Kronecker factor after the other."""
        factors = _factors(self.n, self.seed, self.keep_mean)
        shape = x.shape
        x = x.float().reshape(-1, *(len(factor) for factor in factors))
        for axis, factor in enumerate(factors, 1):
            factor = (factor.T if transposed else factor).to(x.device)
            x = (x.movedim(axis, -1) @ factor).movedim(-1, axis)
        return x.reshape(shape)


@cache
def _factors(n: int, seed: int, constant_column: bool) -> tuple[Tensor, ...]:
    """Orthogonal float32 matrices whose Kronecker product is H. `constant_column`: its first one is constant."""
    power = n & -n  # the largest power of two in n; the smallest order is the fastest to apply
    order = next((m for m in (n // power * 2**k for k in range(power.bit_length())) if _has_paley(m)), 0)
    if power == n:
        rest: list[Tensor] = []
    elif order:
        power = n // order
        rest = [paley(order)]
    else:
        rest = [_orthogonal(n // power, seed, constant_column)]
    if constant_column and rest and order:
        rest[0] = rest[0] * rest[0][:, :1].sign()  # rows may change their sign
    pieces: list[int] = []
    while power > 1:
        pieces.append(min(power, _LARGEST_PIECE))
        power //= pieces[-1]
    return tuple(one.float() for one in (*(sylvester(size) for size in pieces), *rest)) or (torch.ones(1, 1),)


def sylvester(n: int) -> Tensor:
    """Orthogonal float64 [n, n] of entries +-1/sqrt(n), n a power of two; the first column is constant."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def paley(order: int) -> Tensor:
    """Orthogonal float64 [order, order] of entries +-1/sqrt(order): Paley's first or second construction."""
    if _field(order - 1) and (order - 1) % 4 == 3:
        q = order - 1
        jacobsthal = _jacobsthal(q)
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, jacobsthal
        matrix = skew + torch.eye(order, dtype=torch.float64)
    else:
        q = order // 2 - 1
        symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1.0, 1.0, _jacobsthal(q)
        on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(symmetric, on) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return matrix / math.sqrt(order)


def _has_paley(order: int) -> bool:
    if order < 4 or order % 4:
        return False
    first = _field(order - 1) and (order - 1) % 4 == 3
    second = _field(order // 2 - 1) and (order // 2 - 1) % 4 == 1
    return bool(first or second)


def _field(q: int) -> int:
    """The prime whose first or second power q is; 0 if there is none."""
    if _is_prime(q):
        return q
    root = math.isqrt(q)
    return root if root * root == q and _is_prime(root) else 0


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, math.isqrt(q) + 1))


def _jacobsthal(q: int) -> Tensor:
    """chi(a - b) for the elements of the field of q: 1 for squares, -1 for others, 0 for zero."""
    p = _field(q)
    if p == q:
        squares = {a * a % p for a in range(1, p)}
        chi = [0 if a == 0 else 1 if a in squares else -1 for a in range(p)]
        index = torch.arange(p)
        return torch.tensor(chi, dtype=torch.float64)[(index[:, None] - index) % p]
    # pairs a + b t with t^2 = r, r no square in the field of p
    known = {a * a % p for a in range(p)}
    r = next(a for a in range(2, p) if a not in known)
    pairs = [(a, b) for a in range(p) for b in range(p)]
    squared = {((a * a + r * b * b) % p, 2 * a * b % p) for a, b in pairs} - {(0, 0)}

    def chi_of(a: int, b: int) -> int:
        return 0 if (a, b) == (0, 0) else 1 if (a, b) in squared else -1

    rows = [[chi_of((a - c) % p, (b - d) % p) for c, d in pairs] for a, b in pairs]
    return torch.tensor(rows, dtype=torch.float64)


def _orthogonal(n: int, seed: int, constant_column: bool) -> Tensor:
    """Random orthogonal float64 [n, n]; with a constant first column where asked."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if constant_column:
        start[:, 0] = 1.0
    q, r = torch.linalg.qr(start)
    return q * r.diagonal().sign()
