"""The machine's limits: figures that a machine can have. How fast this one is, no test says."""

import pytest
import torch

from bitgrain.kernels.native import is_available, native
from bitgrain.kernels.probes import measure_bandwidth, measure_bf16_peak, measure_int8_peak

pytestmark = pytest.mark.skipif(not is_available(), reason="the native module was not built")


@pytest.mark.parametrize("isa", native().isas() if is_available() else [])
def test_every_level_measures_its_limits(isa):
    before = native().isa()
    native().use_isa(isa)
    try:
        # between one product in 100 cycles and 64 x 4 x 2 a cycle, of up to 256 cores
        assert 1e7 < measure_int8_peak(1) < 1e15
        assert 1e7 < measure_bf16_peak(1) < 1e15
    finally:
        native().use_isa(before)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 300_000])
def test_reads_any_size(size):
    assert measure_bandwidth(torch.zeros(size, dtype=torch.uint8), 2) >= 0
