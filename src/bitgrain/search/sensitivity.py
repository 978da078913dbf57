"""How much the model's predictions suffer from an error in one weight, from one backward pass.

To second order the KL divergence that an error E in a weight W causes is 1/2 vec(E)^T F vec(E) per token, F being the
Fisher information of the model's own predictions. Its labels are drawn from the model, not taken from the text: then F
is the Hessian of that KL (Kunstner et al., arXiv 1905.12558). With g the gradient of the loss by the layer's output and
x its input, F = E[(g g^T) kron (x x^T)]. It is used here as A = E[|g|^2 x x^T], which knows which tokens matter and
takes the outputs for alike: the cost is 1/2 tr(E A E^T) / out. K-FAC (arXiv 1503.05671), which knows which outputs
matter and takes the tokens for alike, chooses the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.numerics.sums import row_sums

_PIECE = 1 << 20  # probabilities in float64 at a time


@dataclass
class FisherMoments:
    """Sums over the tokens of one linear layer, added to batch by batch.

    sensitivity  [in, in] float32: sum of |g|^2 x x^T
    outputs      [out] float32: sum of g^2
    tokens       how many
    """

    sensitivity: Tensor
    outputs: Tensor
    tokens: int = 0

    @staticmethod
    def zeros(out_features: int, in_features: int, device: torch.device | str = "cpu") -> FisherMoments:
        """Nothing seen yet."""
        return FisherMoments(
            torch.zeros(in_features, in_features, device=device), torch.zeros(out_features, device=device)
        )

    @torch.no_grad()
    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Tokens of one batch.

        inputs     x [.., in], any float dtype
        gradients  g [.., out]: of the sum over tokens (not the mean) of the loss by the layer's output
        """
        x = inputs.reshape(-1, inputs.shape[-1]).to(self.sensitivity)
        g = gradients.reshape(-1, gradients.shape[-1]).to(self.outputs)
        squares = g.square()
        norms = row_sums(squares).to(x.dtype)
        self.sensitivity += x.T @ (x * norms[:, None])
        self.outputs += squares.sum(0)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """[in, in] float32: A = E[|g|^2 x x^T]; zeros if no token was seen."""
        return self.sensitivity / max(1, self.tokens)

    def output_shares(self) -> Tensor:
        """[out] float32: the share of each output in |g|^2, with mean 1; ones if nothing flowed back."""
        total = self.outputs.mean()
        return torch.where(
            total > 0, self.outputs / total.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(self.outputs)
        )


def quantization_cost(
    weight: Tensor, dequantized: Tensor, sensitivity: Tensor, output_shares: Tensor | None = None, name: str = "weight"
) -> float:
    """Predicted KL divergence, nats per token, that storing `dequantized` for `weight` causes: 1/2 tr(E A E^T) / out.

    weight, dequantized  [out, in], any float dtype; computed in float32, added up in float64
    sensitivity          A [in, in]
    output_shares        [out] with mean 1: how much each output's row counts (see `FisherMoments`)
    Raises NumericsError if the result is not finite; names the weight.
    """
    error = dequantized.to(torch.float32) - weight.to(torch.float32)
    rows = row_sums((error @ sensitivity.to(error)) * error)
    if output_shares is not None:
        rows = rows * output_shares.to(rows)
    cost = 0.5 * float(row_sums(rows)) / weight.shape[0]
    if not math.isfinite(cost):
        raise NumericsError(f"{name}: the predicted cost is {cost}; its weights or its sensitivity are damaged")
    return max(0.0, cost)


@torch.no_grad()
def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token id for each row, drawn from the model's own predictions.

    logits     [.., vocabulary], any float dtype
    generator  on the CPU, seeded: the draws are the same for every device and any number of threads
    Returns int64 [..] on the device of `logits`. Each is the first id at which the cumulated probability exceeds a
    uniform number.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    uniform = torch.rand(flat.shape[0], 1, generator=generator, dtype=torch.float64).to(flat.device)
    step = max(1, _PIECE // flat.shape[-1])
    labels: list[Tensor] = []
    for rows, draws in zip(flat.split(step), uniform.split(step), strict=True):
        total = torch.softmax(rows.to(torch.float64), dim=-1).cumsum(dim=-1)
        labels.append(torch.searchsorted(total, draws * total[:, -1:], right=True))
    return torch.cat(labels).clamp_(max=flat.shape[-1] - 1).reshape(logits.shape[:-1])
