"""The sum that tells one checkpoint from another."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitgrain.checkpoints import content
from bitgrain.checkpoints.content import content_sha256
from bitgrain.checkpoints.reader import open_checkpoint

TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.tensor(1.5), "c": torch.zeros(0, 5), "d": torch.ones(2, 8, 8)}


def written(folder: Path, **changes: torch.Tensor) -> str:
    folder.mkdir()
    save_file({**TENSORS, **changes}, folder / "model.safetensors")
    return content_sha256(open_checkpoint(folder))


def test_it_is_the_same_wherever_it_lies(tmp_path: Path):
    assert written(tmp_path / "one") == written(tmp_path / "other")


@pytest.mark.parametrize("row", [0, 2, 3])
def test_first_middle_and_last_rows_count(row: int, tmp_path: Path):
    changed = TENSORS["a"].clone()
    changed[row, 1] += 1
    assert written(tmp_path / "one") != written(tmp_path / "other", a=changed)


def test_names_shapes_and_dtypes_count(tmp_path: Path):
    first = written(tmp_path / "first")
    assert written(tmp_path / "shape", a=TENSORS["a"].view(3, 4)) != first
    assert written(tmp_path / "dtype", c=torch.zeros(0, 5, dtype=torch.int32)) != first
    assert written(tmp_path / "name", e=torch.zeros(0)) != first


def test_long_rows_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(content, "_ROW_BYTES", 200)
    assert written(tmp_path / "one") == written(tmp_path / "other", d=torch.zeros(2, 8, 8))
