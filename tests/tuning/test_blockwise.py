"""Block-wise tuning of a small gated block: better than round-to-nearest, and than a start from other codes."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, nvfp4, quantize
from bitgrain.numerics.spec import int_weight
from bitgrain.tuning.blockwise import AUTO_ROUND, BlockSettings, mean_squared_error, tune_block
from random_specs import same

NAMES = ("gate", "up", "down")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"gate": random(48, 32, seed=0) / 5, "up": random(48, 32, seed=1) / 5, "down": random(32, 48, seed=2) / 6}
INPUTS = random(8, 64, 12, seed=3) @ random(12, 32, seed=4) / 3  # correlated, as activations are


def block(dense: dict[str, Tensor], index: int) -> Tensor:
    x = INPUTS[index]
    return x + (silu(x @ dense["gate"].T) * (x @ dense["up"].T)) @ dense["down"].T


def target(index: int) -> Tensor:
    return block(WEIGHTS, index)


def rounded(bits: int) -> dict[str, QTensor]:
    return {name: quantize(weight, int_weight(bits, 16, asymmetric=True)) for name, weight in WEIGHTS.items()}


def test_the_authors_settings():
    assert (AUTO_ROUND.steps, AUTO_ROUND.batch_size, AUTO_ROUND.optimizer) == (200, 8, "sign")
    assert (AUTO_ROUND.codes, AUTO_ROUND.scales, AUTO_ROUND.decay) == (True, "range", "linear")
    schedule = AUTO_ROUND.schedule()
    assert schedule.rates["offsets"] == schedule.rates["scales"] == schedule.rates["lows"] == 1 / 200


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        BlockSettings(steps=40, batch_size=2),
        BlockSettings(steps=40, batch_size=2, optimizer="adam", rate=0.02, scales="factor", scale_rate=2e-3),
        BlockSettings(steps=40, batch_size=2, optimizer="adam", codes=False, scales="factor", rate=5e-3),
        BlockSettings(steps=40, batch_size=2, optimizer="adam", scales="kept", free=True, rate=0.05),
    ],
    ids=["sign", "adam", "scales", "distilled"],
)
def test_the_output_comes_nearer(bits: int, settings: BlockSettings):
    start = rounded(bits)
    found = tune_block(WEIGHTS, start, block, target, 8, settings)
    assert found.best_loss < (0.85 if settings.codes else 0.97) * found.first_loss
    assert list(found.qtensors) == list(NAMES)
    dense = {name: q.dequantize() for name, q in found.qtensors.items()}
    measured = sum(float(mean_squared_error(block(dense, i), target(i))) for i in range(8)) / 8
    assert measured == pytest.approx(found.best_loss)
    assert all(q.spec == start[name].spec for name, q in found.qtensors.items())
    if not settings.codes:
        assert all(torch.equal(q.codes, start[name].codes) for name, q in found.qtensors.items())


def test_it_goes_on_from_given_codes():
    first = tune_block(WEIGHTS, rounded(3), block, target, 8, BlockSettings(steps=40, batch_size=2))
    second = tune_block(WEIGHTS, first.qtensors, block, target, 8, BlockSettings(steps=40, batch_size=2, seed=1))
    assert second.first_loss == first.best_loss
    assert second.best_loss < first.best_loss


def test_what_cannot_be_tuned_stays():
    start = {**rounded(3), "up": quantize(WEIGHTS["up"], nvfp4())}
    found = tune_block(WEIGHTS, start, block, target, 8, BlockSettings(steps=20, batch_size=2))
    assert same(found.qtensors["up"], start["up"])
    assert found.best_loss < found.first_loss
    fixed = {name: quantize(weight, nvfp4()) for name, weight in WEIGHTS.items()}
    left = tune_block(WEIGHTS, fixed, block, target, 8, BlockSettings(steps=20))
    assert (left.steps, left.qtensors) == (0, fixed)


def test_a_missing_weight_is_named():
    with pytest.raises(SchemeError, match="original weight of down, up"):
        tune_block({"gate": WEIGHTS["gate"]}, rounded(4), block, target, 8)


def test_the_mean_squared_error():
    a, b = random(3, 1500, seed=0), random(3, 1500, seed=1)
    assert float(mean_squared_error(a, b)) == pytest.approx(float((a - b).double().square().mean()))
