"""Statistics on disk: the same bits back, whole or not there, and an error for everything that does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from bitgrain.calibration.statistics import Accumulator, LayerStatistics
from bitgrain.calibration.statistics_file import (
    MANIFEST,
    About,
    StatisticsWriter,
    open_statistics,
    pack_symmetric,
    save_statistics,
    unpack_symmetric,
)
from bitgrain.errors import OutputError, StatisticsError

ABOUT = About("f" * 64, {"sources": ["a.txt"], "tokens": 70}, {"activations": "quantized"})


def layer(seed: int, width: int = 6, **options: bool) -> LayerStatistics:
    found = Accumulator(width, "layer", **options)
    found.update(torch.randn(70, width, generator=torch.Generator().manual_seed(seed)))
    return found.finish()


def equal(a: LayerStatistics, b: LayerStatistics) -> bool:
    for name in ("hessian", "mean_abs", "low", "high", "ends", "counts", "rows"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
            return False
    return (a.tokens, a.exponent) == (b.tokens, b.exponent)


def blocks() -> list[dict[str, LayerStatistics]]:
    shared = layer(0, histogram=True)
    return [
        {"0.q": shared, "0.k": shared, "0.o": layer(1, 9)},
        {
            "1.q": replace(layer(2, hessian=False, histogram=True), rows=torch.arange(18.0).view(3, 6)),
            "1.experts[1]": Accumulator(4, "e").finish(),
        },
    ]


def test_everything_comes_back(tmp_path: Path):
    save_statistics(tmp_path / "stats", ABOUT, blocks())
    stored = open_statistics(tmp_path / "stats", model=ABOUT.model)
    assert stored.about == ABOUT
    assert stored.keys == ("0.q", "0.k", "0.o", "1.q", "1.experts[1]")
    assert "0.o" in stored
    assert "2.q" not in stored
    for block in blocks():
        for key, statistics in block.items():
            assert equal(stored.read(key), statistics)
            assert stored.tokens(key) == statistics.tokens
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "block-00000.safetensors", "block-00001.safetensors", MANIFEST, "stats"
    ]  # fmt: skip


def test_shared_inputs_are_stored_once_and_the_hessian_by_half(tmp_path: Path):
    save_statistics(tmp_path / "stats", ABOUT, blocks())
    with safe_open(tmp_path / "stats" / "block-00000.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: shape for name, shape in shapes.items() if "hessian" in name} == {
        "0.hessian": (21,), "1.hessian": (45,)
    }  # fmt: skip


@given(st.integers(0, 1000), st.integers(1, 12))
def test_triangles_give_back_symmetric_matrices(seed: int, n: int):
    half = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    matrix = half + half.T
    packed = pack_symmetric(matrix)
    assert packed.tolist() == [float(matrix[i, j]) for i in range(n) for j in range(i, n)]
    assert torch.equal(unpack_symmetric(packed, n), matrix)


def test_the_same_statistics_are_the_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        save_statistics(tmp_path / name, ABOUT, blocks())
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


def test_nothing_has_the_name_before_it_is_whole(tmp_path: Path):
    out = tmp_path / "new" / "stats"
    writer = StatisticsWriter(out, ABOUT)
    writer.add(blocks()[0])
    assert not out.exists()
    with pytest.raises(StatisticsError, match=r"stats holds no statistics \(statistics\.json is missing\)"):
        open_statistics(out)
    other = StatisticsWriter(out, About("other", {}, {}))  # what another run left is replaced
    other.add(blocks()[1])
    assert other.files == 1
    again = StatisticsWriter(out, About("other", {}, {}))  # what the same run left, before it was killed, is taken up
    assert again.files == 1
    assert again.tokens == {"1.q": 70, "1.experts[1]": 0}
    again.add(blocks()[0])
    (again.partial / "work").mkdir()
    again.finish()
    assert open_statistics(out).keys == ("1.q", "1.experts[1]", "0.q", "0.k", "0.o")
    assert sorted(path.name for path in out.iterdir()) == [*(f"block-0000{i}.safetensors" for i in range(2)), MANIFEST]
    assert [path.name for path in out.parent.iterdir()] == ["stats"]
    with pytest.raises(OutputError, match="stats exists already"):
        StatisticsWriter(out, ABOUT)


def test_a_layer_is_written_once(tmp_path: Path):
    writer = StatisticsWriter(tmp_path / "stats", ABOUT)
    writer.add({"0.q": layer(0)})
    with pytest.raises(ValueError, match=r"0\.q are written already"):
        writer.add({"0.q": layer(0)})


def test_another_model_and_missing_layers_are_refused(tmp_path: Path):
    save_statistics(tmp_path / "stats", ABOUT, blocks())
    with pytest.raises(StatisticsError, match=r"calibrated on another model \(fingerprint ffffffff"):
        open_statistics(tmp_path / "stats", model="0" * 64)
    stored = open_statistics(tmp_path / "stats")
    for ask in (stored.read, stored.tokens):
        with pytest.raises(StatisticsError, match=r"has no statistics of 7\.q \(it has 5 layers\)"):
            ask("7.q")


def test_damage_is_noticed(tmp_path: Path):
    folder = tmp_path / "stats"
    save_statistics(folder, ABOUT, blocks())
    path = folder / "block-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    stored = open_statistics(folder)
    stored.read("0.q")  # lies in front of the damage
    with pytest.raises(StatisticsError, match=r"the statistics of 0\.o are damaged: calibrate again"):
        stored.read("0.o")
    path.write_bytes(whole[:100])
    with pytest.raises(StatisticsError, match=r"block-00000\.safetensors cannot be read"):
        stored.read("0.q")
    path.unlink()
    with pytest.raises(StatisticsError, match=r"block-00000\.safetensors cannot be read"):
        stored.read("0.q")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "is damaged"), (b"[]", "is damaged"), (b'{"version": 1}', "is damaged"), (None, "has layout 2")],
)
def test_bad_manifests(tmp_path: Path, content: bytes | None, words: str):
    folder = tmp_path / "stats"
    save_statistics(folder, ABOUT, [])
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(content or json.dumps({**manifest, "version": 2}).encode())
    with pytest.raises(StatisticsError, match=words):
        open_statistics(folder)
