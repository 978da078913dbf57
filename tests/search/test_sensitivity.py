"""Predicted costs against sums written out, and against the KL divergence that they predict."""

import pytest
import torch

from bitgrain.errors import NumericsError
from bitgrain.search.sensitivity import FisherMoments, quantization_cost, sample_labels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_equal_the_sum_over_tokens():
    x, g = random(3, 7, 5), random(3, 7, 4, seed=1)
    moments = FisherMoments.zeros(4, 5)
    for i in range(3):
        moments.add(x[i], g[i])
    expected, outputs = torch.zeros(5, 5), torch.zeros(4)
    for token, gradient in zip(x.reshape(-1, 5), g.reshape(-1, 4), strict=True):
        expected += gradient.square().sum() * torch.outer(token, token)
        outputs += gradient.square()
    assert moments.tokens == 21
    torch.testing.assert_close(moments.mean(), expected / 21)
    torch.testing.assert_close(moments.output_shares(), outputs / outputs.mean())


def test_moments_of_nothing():
    moments = FisherMoments.zeros(4, 5)
    assert torch.equal(moments.mean(), torch.zeros(5, 5))
    assert torch.equal(moments.output_shares(), torch.ones(4))


def test_cost_equals_the_sum_over_elements():
    w, d, root = random(3, 4), random(3, 4, seed=1), random(4, 4, seed=2)
    a, shares = root @ root.T, torch.tensor([0.5, 1.0, 1.5])
    e = d - w
    plain = sum(float(e[o, i] * a[i, j] * e[o, j]) for o in range(3) for i in range(4) for j in range(4)) / 6
    shared = (
        sum(float(shares[o] * e[o, i] * a[i, j] * e[o, j]) for o in range(3) for i in range(4) for j in range(4)) / 6
    )
    assert quantization_cost(w, d, a) == pytest.approx(plain, rel=1e-5)
    assert quantization_cost(w, d, a, shares) == pytest.approx(shared, rel=1e-5)
    assert quantization_cost(w, w, a) == 0.0


def test_cost_is_quadratic_in_the_error():
    w, e = random(6, 8), random(6, 8, seed=1) * 0.1
    a = torch.eye(8) + 0.5
    assert quantization_cost(w, w + 2 * e, a) == pytest.approx(4 * quantization_cost(w, w + e, a), rel=1e-5)


def test_a_damaged_layer_is_named():
    with pytest.raises(NumericsError, match=r"layer\.3: the predicted cost is nan"):
        quantization_cost(torch.zeros(2, 2), torch.full((2, 2), torch.nan), torch.eye(2), name="layer.3")


def test_the_cost_predicts_the_divergence_of_a_small_classifier():
    """A softmax layer is its own Fisher information: small random errors, all of the same size, cost what is said."""
    x, w = random(4000, 6), random(5, 6, seed=1)
    logits = (x @ w.T).requires_grad_(True)
    labels = sample_labels(logits, torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert logits.grad is not None
    moments = FisherMoments.zeros(5, 6)
    moments.add(x, logits.grad)
    predicted, measured = 0.0, 0.0
    base = torch.log_softmax(x @ w.T, -1)
    for seed in range(40):
        d = w + 0.02 * random(5, 6, seed=100 + seed)
        predicted += quantization_cost(w, d, moments.mean())
        measured += float((base.exp() * (base - torch.log_softmax(x @ d.T, -1))).sum(-1).mean())
    assert predicted == pytest.approx(measured, rel=0.1)


def test_labels_follow_the_predictions_and_the_seed():
    logits = torch.log(torch.tensor([0.1, 0.0, 0.6, 0.3])).expand(3, 5000, 4)
    labels = sample_labels(logits, torch.Generator().manual_seed(3))
    assert labels.shape == (3, 5000)
    assert labels.dtype == torch.int64
    shares = torch.bincount(labels.reshape(-1), minlength=4) / 15000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.015, rtol=0)
    assert torch.equal(labels, sample_labels(logits, torch.Generator().manual_seed(3)))
    assert not torch.equal(labels, sample_labels(logits, torch.Generator().manual_seed(4)))


def test_labels_of_a_certain_model():
    logits = torch.full((300, 9), -torch.inf)
    logits[:, 8] = 0.0
    assert sample_labels(logits, torch.Generator().manual_seed(0)).eq(8).all()
