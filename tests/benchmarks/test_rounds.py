"""The benchmarks in rounds: their protocol, and what their pages say."""

import sys
from pathlib import Path

import pytest
import torch

from bitgrain.kernels.native import is_available

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import generate_report  # noqa: E402
import kernels_report  # noqa: E402
from layout_facts import innermost  # noqa: E402
from rounds import Contestant, PeerError, median  # noqa: E402

native_only = pytest.mark.skipif(not is_available(), reason="the native module was not built")


@native_only
def test_our_contestants_run_and_are_timed():
    ours = Contestant("linear_bitgrain", 1, Path(sys.executable))
    try:
        assert ours.versions["torch"] == torch.__version__
        limits = ours.ask("probe")
        assert all(limits[key] > 0 for key in ("bandwidth", "int8", "bf16"))
        for name in ours.ask("names"):
            made = ours.ask("make", name=name, k=256, n=64, m=3, rotate=0)
            bits = 8 * made["nbytes"] / (256 * 64)
            assert made["copies"] == 2
            assert int(name[1]) <= bits < int(name[1]) + 0.6
            assert ours.ask("time", name=name, seconds=0.001) > 0
        with pytest.raises(PeerError, match="KeyError: 'W9A9'"):
            ours.ask("make", name="W9A9", k=256, n=64, m=3, rotate=0)
        assert ours.ask("free") is None  # it goes on after an error
    finally:
        ours.close()


def test_a_library_that_is_not_here_is_told():
    with pytest.raises(PeerError, match="No module named"):
        Contestant("linear_nobody", 1, Path(sys.executable))


def test_medians_do_not_invent_figures():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0]) == 1.0


def test_ratios_are_ours_to_the_best_of_as_many_bits():
    contestants = {
        "W8A8": {"ms": 2.0, "nbytes": 8e6},
        "W4A8 g128": {"ms": 1.0, "nbytes": 4e6},
        "ggml Q4_0": {"ms": 0.5, "nbytes": 4e6},
        "OpenVINO int8": {"ms": 4.0, "nbytes": 8e6},
        "ggml Q8_0": {"ms": 8.0, "nbytes": 8e6},
    }
    cell = {"k": 1000, "n": 2000, "m": 4, "limits": {"bandwidth": 8e9, "int8": 8e9, "bf16": 4e9}}
    cell |= {"contestants": contestants, "failed": {}}
    assert kernels_report.row_of(cell, "W8A8")[5:] == ["OpenVINO int8", "0.50", "50 %", "50 %"]
    assert kernels_report.row_of(cell, "W4A8 g128")[5:] == ["ggml Q4_0", "2.00", "50 %", "100 %"]


def test_end_to_end_ratios_are_ours_to_theirs():
    speeds = {"prefill": 100.0, "decode": 10.0, "peak": 2e9, "bare": 1e8}
    half = {"prefill": 50.0, "decode": 5.0, "peak": 4e9, "bare": 1e8}
    results = {"bitgrain W4A8": speeds, "llama.cpp Q4_0": half, "llama.cpp Q8_0": half}
    assert generate_report.comparisons(results) == [["bitgrain W4A8", "llama.cpp Q4_0", "2.00", "2.00", "0.50"]]


def test_instructions_are_counted_in_the_loop_that_multiplies():
    listing = """0000000000000000 <void x::int_tile<4, 1, false>(long)>:
   0:\tpush   %rbp
   4:\tvmovdqu64 (%rax),%zmm0
   8:\tvpdpbusd %zmm1,%zmm2,%zmm0
   c:\tvpdpbusd %zmm1,%zmm3,%zmm4
  10:\tadd    $0x40,%rax
  14:\tcmp    %rdx,%rax
  18:\tjne    4 <x+0x4>
  1c:\tadd    $0x1,%rcx
  20:\tjne    0 <x>
  24:\tret"""
    assert innermost(listing) == 3.0


def test_pages_tell_what_busy_processes_cost():
    contestants = {"W8A8": {"ms": 2.0, "busy_ms": 3.0, "nbytes": 8e6}, "ggml Q8_0": {"ms": 1.0, "busy_ms": 9.0}}
    cell = {"k": 8, "n": 16, "m": 1, "limits": {}, "contestants": contestants, "failed": {"ggml Q4_0": "no"}}
    data = {
        "settings": {"threads": 2, "busy": 1, "processes": 3},
        "versions": {"torch": "2"},
        "absent": {"openvino": "no module"},
    }
    page = kernels_report.report({**data, "cells": [cell], "layouts": []}, "here")
    assert "| 8 x 16 | 1 | W8A8 | 2.000 | 1.000 | ggml Q8_0 | 2.00 | - | - |" in page
    assert "| 8 x 16 | 1 | ggml Q8_0 | 1.000 | 9.000 | 9.0 |" in page
    assert "- left out: openvino (no module)\n" in page
    assert "- failed: ggml Q4_0 (no)\n" in page

    one = {"prefill": 100.0, "decode": 10.0, "peak": 2e9, "bare": 1e8, "all_decode": [10.0], "decode_beside": 4.0}
    settings = {"threads": 2, "busy": 1, "prefill": 512, "prompt": 8, "tokens": 64}
    page = generate_report.report({**data, "settings": settings, "results": {"bitgrain W4A8": one}}, "here")
    assert "| bitgrain W4A8 | 100.0 | 10.00 | 2.00 | 0.10 | 4.00 | 2.5 |" in page
