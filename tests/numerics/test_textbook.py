"""Every number of docs/textbook.md, read from the page."""

from pathlib import Path

import pytest
import scalar_twin as twin
import torch

from bitgrain.numerics import QuantSpec, get_format, per_channel, per_tensor, quantize
from bitgrain.numerics.measures import measure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "textbook.md"


def tables() -> dict[str, list[list[str]]]:
    """Rows (without the header) of the table under each heading."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: rows[2:] for heading, rows in found.items()}


def numbers(heading: str, columns: int = 4) -> list[list[float]]:
    return [[float(cell) for cell in row[1 : 1 + columns]] for row in tables()[heading]]


W = torch.tensor(numbers("W"))
GRANULARITIES = {"Per tensor": per_tensor(), "Per channel": per_channel()}
both = pytest.mark.parametrize("name", GRANULARITIES)


def quantized(name: str):
    return quantize(W, QuantSpec(get_format("int8"), GRANULARITIES[name], restricted=True))


def test_the_page_is_about_this_matrix():
    assert torch.equal(W, torch.tensor([[-0.5, -0.3, 0.2, 0.4], [-2, -1.5, 1, 1.8], [-0.1, -0.08, 0.05, 0.09]]))


def test_the_codes_are_the_textbooks():
    expected = {
        "Per tensor": [[-32, -19, 13, 25], [-127, -95, 64, 114], [-6, -5, 3, 6]],
        "Per channel": [[-127, -76, 51, 102], [-127, -95, 64, 114], [-127, -102, 64, 114]],
    }
    for name, codes in expected.items():
        assert quantized(name).codes.tolist() == codes


@both
def test_codes_scales_and_quotients(name):
    q = quantized(name)
    assert q.codes.tolist() == numbers(f"{name}: codes")
    scales = [row[4] for row in numbers(f"{name}: codes", 5)]
    assert [f"{s:.8f}" for s in q.scale.expand(3, 1).flatten().tolist()] == [f"{s:.8f}" for s in scales]
    assert torch.allclose(W / q.scale, torch.tensor(numbers(f"{name}: x / s")), rtol=1e-6)


@both
def test_dequantized_numbers_and_errors(name):
    q = quantized(name)
    for heading, got in (("dequantized", q.dequantize()), ("error x̂ - x", q.dequantize().double() - W)):
        on_page = torch.tensor(numbers(f"{name}: {heading}"), dtype=torch.float64)
        assert float((got.double() - on_page).abs().max()) < 6e-7
    assert float((q.dequantize() - W).abs().max()) <= 0.007874 + 1e-6


def test_the_comparison():
    rows = {row[0]: row[1:] for row in tables()["Both side by side"]}
    for column, name in enumerate(GRANULARITIES):
        q = quantized(name)
        report = measure(W, q)
        assert f"{report.mse:.3e}" == rows["mean squared error"][column]
        assert f"{report.sqnr_db:.2f}" == rows["SQNR (dB)"][column]
        assert f"{report.max_error:.6f}" == rows["largest error"][column]
        assert str(q.count_bits()) == rows["bits, with float32 scales"][column]
        for channel in range(3):
            row = [W[channel].tolist()], [q.dequantize()[channel].tolist()]
            on_page = float(rows[f"mean squared error of channel {channel}"][column])
            assert twin.mean_squared_error(*row) == pytest.approx(on_page, rel=2e-3)


def test_the_twin_agrees_with_the_page():
    for name, tile in (("Per tensor", (3, 4)), ("Per channel", (1, 4))):
        v, *_ = twin.quantize(W.tolist(), "int8", tile, restricted=True)
        assert v == numbers(f"{name}: codes")
