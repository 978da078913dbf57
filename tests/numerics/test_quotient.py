"""x / number: the nearest float32, on the device of the jobs too."""

import numpy as np
import pytest
import torch

from bitgrain.numerics.quotient import quotient


@pytest.mark.parametrize("number", [7, 127, 448.0, 6.0, 3, 0.1])
def test_the_nearest_number(number: float, device: str):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(quotient(x.to(device), number).cpu().numpy(), x.numpy() / np.float32(number))
