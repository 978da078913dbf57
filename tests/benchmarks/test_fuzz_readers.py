"""A few of the damaged files of benchmarks/fuzz_readers.py for every reader; ten minutes of them: `make fuzz`."""

import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzz_readers


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fuzz_readers.make_seeds(tmp_path_factory.mktemp("seeds"))


def test_undamaged_files_are_read(seeds: dict[str, Path]):
    for name, folder in seeds.items():
        assert fuzz_readers.attempt(folder, fuzz_readers.read_everything) == "read", name


def test_damaged_files_are_read_or_refused(seeds: dict[str, Path], tmp_path: Path):
    rng, told = random.Random(7), {}
    for name, folder in seeds.items():
        for number in range(25):
            damaged = tmp_path / f"{name}-{number}"
            shutil.copytree(folder, damaged)
            fuzz_readers.damage(damaged, rng)
            told[damaged.name] = fuzz_readers.attempt(damaged, fuzz_readers.read_everything)
    assert {name: what for name, what in told.items() if what.startswith("FAILED")} == {}
    assert {"read", "CheckpointError"} <= set(told.values())


def test_what_it_looks_for_is_found(seeds: dict[str, Path]):
    folder = next(iter(seeds.values()))
    attempt = fuzz_readers.attempt
    assert "MemoryError" in attempt(folder, lambda _: bytearray(500 << 20))
    assert "opened /etc/hostname" in attempt(folder, lambda _: Path("/etc/hostname").read_bytes())
    assert "ZeroDivisionError" in attempt(folder, lambda _: 1 // 0)
