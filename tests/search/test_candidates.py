"""What each engine's layers may be stored as: sizes fit, and the engine's own rules are kept."""

import pytest

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat
from bitgrain.numerics.formats import BF16, E8M0, FP16, FP32
from bitgrain.numerics.gguf_types import GGUF_TYPES
from bitgrain.search.candidates import ENGINES, candidate_specs


def short(engine: str, shape: tuple[int, ...], around: float | None = None) -> list[str]:
    return [
        f"{spec.format.bits}{'' if spec.symmetric else 'a'}/{spec.granularity.cols or 'row'}"
        for spec in candidate_specs(engine, shape, around=around)
    ]


def test_the_default_holds_every_width_and_group():
    found = short("compressed-tensors", (64, 256))
    assert len(found) == 7 * 4
    assert set(found) == {f"{bits}a/{group}" for bits in range(2, 9) for group in (32, 64, 128, "row")}


@pytest.mark.parametrize("engine", ENGINES)
def test_sizes_rise_and_groups_divide(engine: str):
    for shape in ((64, 256), (128, 96), (48, 172), (3, 64, 384), (64, 32)):
        specs = candidate_specs(engine, shape)
        sizes = [spec.count_bits(shape) for spec in specs]
        assert sizes == sorted(sizes)
        assert all(isinstance(spec.format, IntFormat) and spec.granularity.divides(shape) for spec in specs)
        assert len({spec.describe() for spec in specs}) == len(specs)


def test_a_group_as_long_as_the_row_is_the_row():
    assert short("compressed-tensors", (8, 64), 2.0) == ["2a/row", "2a/32", "3a/row", "3a/32", "4a/row", "4a/32"]
    assert short("compressed-tensors", (8, 30), 2.0) == ["2a/row", "3a/row", "4a/row"]


def test_only_bits_near_the_target_are_tried():
    assert {name[0] for name in short("compressed-tensors", (64, 256), 4.15)} == set("234567")
    assert {name[0] for name in short("compressed-tensors", (64, 256), 2.45)} == set("2345")


def test_vllm_has_four_and_eight_bits():
    assert short("vLLM", (64, 256)) == [
        *("4a/row", "4a/128", "4a/64", "4a/32"),
        *("8/row", "8/128", "8/64", "8/32"),
    ]
    assert short("vllm", (64, 192)) == ["8/row", "8/64", "8/32"]  # 4-bit kernels need inputs % 128 = 0
    assert short("sglang", (64, 192)) == []


@pytest.mark.parametrize("engine", ["llama.cpp", "GGUF"])
def test_gguf_has_blocks_of_32_and_of_256(engine: str):
    assert candidate_specs(engine, (16, 512), scale=BF16) == sorted(
        GGUF_TYPES.values(), key=lambda spec: spec.count_bits((16, 512))
    )
    of_32 = candidate_specs(engine, (16, 288), around=5.0)
    assert {spec.granularity.cols for spec in of_32} == {32}
    assert {spec.scale for spec in of_32} == {FP16, E8M0}
    assert GGUF_TYPES["Q8_0"] not in of_32
    assert candidate_specs(engine, (16, 172)) == []


def test_the_scales_are_stored_as_asked():
    assert {spec.scale for spec in candidate_specs("compressed-tensors", (8, 64))} == {FP32}
    assert {spec.scale for spec in candidate_specs("compressed-tensors", (8, 64), scale=BF16)} == {BF16}


def test_an_unknown_engine_is_named():
    with pytest.raises(
        SchemeError,
        match=r"unknown engine 'mlx'; --bits knows compressed-tensors, vllm, .*, llama.cpp",
    ):
        candidate_specs("mlx", (8, 8))
