import torch

from bitgrain.numerics import QuantSpec, get_format, per_channel, quantize
from bitgrain.numerics.ranges import MSE


def test_the_best_factor_of_the_grid_is_found():
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(get_format("int4"), per_channel(), restricted=True)
    chosen = MSE(steps=20, smallest=0.4)
    q = quantize(x, QuantSpec(spec.format, spec.granularity, restricted=True, range=chosen))
    largest = x.abs().amax(-1, keepdim=True)
    for row in range(3):
        losses = []
        for i in range(21):
            scale = largest[row : row + 1] * (1 - 0.6 * i / 20) / 7
            x_hat = (x[row] / scale).round().clamp(-7, 7) * scale
            losses.append((float((x_hat.double() - x[row]).square().sum()), float(scale)))
        assert abs(min(losses)[1] - float(q.scale[row])) < 1e-6
        assert float(q.scale[row]) < float(largest[row]) / 7  # a Gaussian row is clipped at 4 bits


def test_both_ends_are_searched():
    x = torch.rand(1, 400, generator=torch.Generator().manual_seed(0))
    x[0, 0] = -1.5  # one outlier, at the low end only
    spec = QuantSpec(get_format("uint3"), per_channel(), zero_point="real")
    low, high = MSE().limits(x.unsqueeze(0), spec)
    assert float(low) > -0.8
    assert float(high) > 0.7


def test_counts_are_repetitions():
    x = torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(get_format("int4"), per_channel())
    counts = torch.ones_like(x)
    counts[..., :20] = 3
    repeated = torch.cat([x, x[..., :20], x[..., :20]], dim=-1)
    assert MSE().search(x, counts, spec) == MSE().search(repeated, None, spec)
