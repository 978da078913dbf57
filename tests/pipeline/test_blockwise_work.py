"""What a calibrated job keeps between its passes: whole files, and the tensors as they were."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bitgrain.errors import OutputError
from bitgrain.pipeline.blockwise import work as work_module
from bitgrain.pipeline.blockwise.work import Work, block_file, hidden_file


def some() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 7, generator=generator) for i in range(6)}
    return {**tensors, "codes": torch.arange(5, dtype=torch.uint8), "half": torch.ones(3).bfloat16()}


def test_round_trip(tmp_path: Path):
    work = Work(tmp_path)
    assert not work.has("one")
    work.save("one", some(), {"layers": {"a": {"loss": 0.1}}, "ä": [1]})
    assert work.has("one")
    assert work.record("one") == {"layers": {"a": {"loss": 0.1}}, "ä": [1]}
    assert work.keys("one") == some().keys()
    found = work.tensors("one")
    assert found.keys() == some().keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in some().items())
    assert work.tensors("one", ["t3", "stranger"]).keys() == {"t3"}
    work.save("one", {})
    assert work.tensors("one") == {}
    assert work.record("one") == {}
    work.remove("one")
    work.remove("one")
    assert not work.has("one")
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_aligned_as_computed_ones_are(tmp_path: Path):
    """Products of the same values have the same bits only then: a resumed job must not differ from another."""
    work = Work(tmp_path)
    work.save("one", some())
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert any(file.get_tensor(key).data_ptr() % 64 for key in some())  # they are not by themselves
    assert not any(tensor.data_ptr() % 64 for tensor in work.tensors("one").values())


def test_parts_of_larger_tensors_are_kept(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    Work(tmp_path).save("one", {"row": whole[1], "turned": whole.T, "other": whole[2:]})
    found = Work(tmp_path).tensors("one")
    assert torch.equal(found["row"], whole[1])
    assert torch.equal(found["turned"], whole.T)
    assert torch.equal(found["other"], whole[2:])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = Work(tmp_path)
    work.save("one", {"a": torch.zeros(2)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "fsync_file", full)
        for name in ("one", "two"):
            with pytest.raises(OutputError, match=f"{name}.*No space left on device"):
                work.save(name, {"a": torch.ones(2)})
    assert torch.equal(work.tensors("one")["a"], torch.zeros(2))
    assert not work.has("two")
    work.save("two", {"a": torch.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_files_sort_as_blocks_do():
    names = [f(index) for f in (block_file, hidden_file) for index in (9, 10, 100)]
    assert sorted(names) == names
