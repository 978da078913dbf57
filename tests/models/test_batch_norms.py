"""Batch norms go into the layer before them, exactly, and only where nothing else reads it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitgrain.errors import ModelError
from bitgrain.models.batch_norms import fold_batch_norms_
from vision import images, network


def trained(*parts: nn.Module, shape: tuple[int, ...]) -> Any:
    """The parts in eval mode with norms that are not the identity."""
    net = nn.Sequential(*parts)
    generator = torch.Generator().manual_seed(3)
    for part in net.modules():
        for name in ("running_mean", "bias"):
            if "BatchNorm" in type(part).__name__ and getattr(part, name, None) is not None:
                getattr(part, name).data.normal_(generator=generator)
        for name in ("running_var", "weight"):
            if "BatchNorm" in type(part).__name__ and getattr(part, name, None) is not None:
                getattr(part, name).data.uniform_(0.5, 2, generator=generator)
    return net.eval().double(), torch.randn(shape, generator=generator, dtype=torch.float64)


def test_a_network_stays_the_same():
    net, x = network(), images(5)
    before = net(x)
    keys = {key for key in net.state_dict() if "running" not in key}
    done = fold_batch_norms_(net, x)
    assert done.folded == {"1": "0", "3.norm1": "3.wide", "3.norm2": "3.deep"}
    assert not done.kept
    assert done.error < 1e-5
    torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in net.modules())
    assert {key for key in net.state_dict() if "norm" not in key} - keys == {"3.wide.bias"}
    assert net[3].wide.bias.requires_grad


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ([nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6)], (2, 4, 9)),
        ([nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (2, 2, 4, 4, 4)),
        ([nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6, affine=False)], (2, 4, 5, 5)),
        ([nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7)], (3, 5)),
    ],
)
def test_every_layer_by_the_formula(parts: list[nn.Module], shape: tuple[int, ...]):
    torch.manual_seed(0)
    net, x = trained(*copy.deepcopy(parts), shape=shape)
    before, norm = net(x), net[1]
    weight = net[0].weight.detach().clone()
    assert fold_batch_norms_(net, x).folded == {"1": "0"}
    torch.testing.assert_close(net(x), before)
    if isinstance(net[0], nn.Linear):
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close(net[0].weight, weight * factor.unsqueeze(1))
        torch.testing.assert_close(net[0].bias, norm.bias - norm.running_mean * factor)


class Twice(nn.Module):
    """A convolution that is read beside its norm, in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), way
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.way == "added":
            return self.norm(y) + y
        if self.way == "returned":
            return self.norm(y), y
        if self.way == "changed":
            return self.norm(torch.relu_(y))
        if self.way == "two norms":
            return self.norm(y) + self.other(y)
        if self.way == "twice":
            return self.norm(y) + self.conv(x + 1)
        assert y.shape[1] == 4  # a look at its shape is no use of its numbers
        return self.norm(y)


@pytest.mark.parametrize("way", ["added", "returned", "changed", "two norms", "twice", "alone"])
def test_a_layer_that_is_read_elsewhere_keeps_its_norm(way: str):
    torch.manual_seed(0)
    net = Twice(way).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    done = fold_batch_norms_(net, images(2))
    if way == "alone":
        assert done.folded == {"norm": "conv"}
        assert done.kept == {"other": "it runs 0 times"}
        return
    assert not done.folded
    assert "conv" in done.kept["norm"]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_what_cannot_be_folded_says_why():
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 1)
    twin = nn.Conv2d(4, 4, 1)
    twin.weight = shared.weight
    net, x = trained(
        *(shared, nn.BatchNorm2d(4), twin, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
        *(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.BatchNorm2d(4)),
        shape=(2, 4, 3, 3),
    )
    reasons = fold_batch_norms_(net, x).kept
    assert list(reasons) == ["1", "3", "5", "7"]
    assert "shares its weight" in reasons["1"]
    assert "follows each batch" in reasons["5"]
    assert "does not read the output of a convolution" in reasons["7"]


def test_training_mode_is_refused():
    net = network()
    net[3].norm1.train()
    with pytest.raises(ModelError, match="eval mode only"):
        fold_batch_norms_(net, images(2))


def test_a_fold_that_changes_the_outputs_is_undone():
    class Peeks(nn.Module):
        """Reads the weight itself, which no look at tensors shows."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) * self.conv.weight.norm()

    torch.manual_seed(0)
    net = Peeks()
    net(images(8) * 3)
    net.eval()
    before, x = copy.deepcopy(net.state_dict()), images(2)
    with pytest.raises(ModelError, match="changes the module's outputs"):
        fold_batch_norms_(net, x)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.conv.bias is None
