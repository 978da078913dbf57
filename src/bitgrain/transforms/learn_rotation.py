"""A rotation of the residual stream, learned from what the stream holds.

SpinQuant (arXiv 2405.16406) learns rotations by the whole model's loss; KurTail (arXiv 2503.01483) by a statistic of
the activations, layers on their own, which needs no gradients through the model. This is of the second kind. With one
scale for each token its rounding error grows as the square of its largest element, so E ||x Q||_p^2 is lowered, p = 8
standing for infinity, over tokens x of all blocks. Steps follow Cayley's transform (J. Li et al., "Efficient Riemannian
Optimization on the Stiefel Manifold via the Cayley Transform", ICLR 2020), so that Q stays orthogonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_POWER = 8
_TOKENS = 512  # in one step
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Learned:
    """x -> x @ Q for row vectors [.., n], as `numerics.hadamard.Rotation`."""

    q: Tensor

    @property
    def n(self) -> int:
        return len(self.q)

    def __call__(self, x: Tensor) -> Tensor:
        """x @ Q, in float32."""
        return x.float() @ self.q.to(x.device)

    def undo(self, x: Tensor) -> Tensor:
        """x @ Q^T: the inverse."""
        return x.float() @ self.q.to(x.device).T


@torch.no_grad()
def learn_rotation(
    tokens: Tensor, start: Tensor, *, steps: int, rate: float = 0.02, keep_mean: bool = False, seed: int = 0
) -> tuple[Tensor, float, float]:
    """(Q, E ||x Q||_8^2 / n before, and after), over tokens scaled to ||x||^2 = n.

    tokens     float32 [t, n]
    start      orthogonal float32 [n, n]; keep_mean: it leaves (1, .., 1) where it is, and so will Q
    rate       how far the first step turns: the Frobenius norm of its angles, in units of sqrt(n); it falls to 0
    The best Q that was seen on all tokens is returned, `start` at worst.
    """
    n = len(start)
    tokens = tokens * (math.sqrt(n) / tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(n, device=tokens.device)
    q, best, velocity = start.to(tokens.device), start.to(tokens.device), torch.zeros_like(eye)
    first = lowest = _loss(tokens, q)[0]
    for step in range(steps):
        batch = tokens[torch.randint(len(tokens), (_TOKENS,), generator=generator).to(tokens.device)]
        gradient = batch.T @ _loss(batch, q)[1]
        turn = gradient @ q.T
        turn = turn - turn.T  # skew-symmetric: a direction in which Q may go
        if keep_mean:  # rows and columns without a mean: (1, .., 1) is not turned
            turn = turn - turn.mean(0, keepdim=True)
            turn = turn - turn.mean(1, keepdim=True)
        velocity = _MOMENTUM * velocity + turn
        size = rate * 0.5 * (1 + math.cos(math.pi * step / steps)) * math.sqrt(n) / velocity.norm().clamp(min=1e-30)
        half = 0.5 * size * velocity
        q = torch.linalg.solve(eye + half, (eye - half) @ q)
        if step % 10 == 9 or step == steps - 1:
            q = _orthogonal(q)
            now = _loss(tokens, q)[0]
            if now < lowest:
                lowest, best = now, q
    return best, first, lowest


def _loss(x: Tensor, q: Tensor) -> tuple[float, Tensor]:
    """E ||x Q||_p^2 / n, and its gradient by x Q [t, n]."""
    y = x @ q
    top = y.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    powers = (y / top).pow(_POWER - 1)  # odd: keeps the sign
    total = (powers * (y / top)).sum(-1, keepdim=True)
    squared = top.square() * total.pow(2 / _POWER)
    gradient = 2 * top * total.pow(2 / _POWER - 1) * powers
    count = len(x) * x.shape[-1]
    return float(squared.sum(dtype=torch.float64)) / count, gradient / count


def _orthogonal(q: Tensor) -> Tensor:
    """The nearest orthogonal matrix, by Newton's iteration."""
    x = q.double()
    for _ in range(3):
        x = 1.5 * x - 0.5 * x @ (x.T @ x)
    return x.to(q.dtype)
