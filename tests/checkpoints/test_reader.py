"""Reading: equal to the reference library for every dtype and shape; each bad folder is one clear error."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bitgrain.checkpoints.reader import INDEX_FILE, SINGLE_FILE, open_checkpoint
from bitgrain.checkpoints.safetensors_header import DTYPES
from bitgrain.errors import CheckpointError

SHAPES = [(), (0,), (3, 0, 2), (5,), (3, 7), (2, 3, 5)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bit pattern (0 and 1 for bool)."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        return (raw & 1).to(torch.bool).view(shape)
    return raw.view(dtype).view(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str] | None = None) -> None:
    for file, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / file)
    weight_map = weight_map or {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


TWO = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(6.0).view(2, 3)},
    "model-00002-of-00002.safetensors": {"b": torch.arange(4, dtype=torch.int8)},
}
FIRST, SECOND = TWO


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("every")
    tensors = {
        f"{name}-{shape}": random_tensor(dtype, shape, seed=number)
        for number, (name, dtype) in enumerate(DTYPES.items())
        for shape in SHAPES
    }
    safetensors.torch.save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder, tensors


def test_reads_every_dtype_and_shape(every_dtype):
    folder, tensors = every_dtype
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.entries) == set(tensors)
    assert checkpoint.metadata == {SINGLE_FILE: {"format": "pt"}}
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert same_bytes(read, tensor), name
        assert read.is_contiguous()
        assert read.untyped_storage().nbytes() == tensor.nbytes == checkpoint.entries[name].nbytes


def test_reads_rows(every_dtype):
    folder, tensors = every_dtype
    checkpoint = open_checkpoint(folder)
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            with pytest.raises(IndexError):
                checkpoint.read_rows(name, 0, 0)
            continue
        rows = tensor.shape[0]
        for start, stop in [(0, 0), (0, rows), (rows // 2, rows), (0, rows // 2), (rows, rows)]:
            assert same_bytes(checkpoint.read_rows(name, start, stop), tensor[start:stop]), name
        for start, stop in [(-1, 0), (0, rows + 1), (1, 0)]:
            with pytest.raises(IndexError):
                checkpoint.read_rows(name, start, stop)


def test_reads_agree_between_threads(every_dtype):
    folder, tensors = every_dtype
    checkpoint = open_checkpoint(folder)
    with ThreadPoolExecutor(4) as pool:
        for name, read in zip(list(tensors) * 5, pool.map(checkpoint.read, list(tensors) * 5)):
            assert same_bytes(read, tensors[name])


def test_each_read_has_its_own_memory(tmp_path: Path):
    sharded(tmp_path, TWO)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), TWO[FIRST]["a"])


def test_reads_shards_and_a_single_file_of_any_name(tmp_path: Path):
    sharded(tmp_path, TWO)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == (FIRST, SECOND)
    assert torch.equal(checkpoint.read("b"), TWO[SECOND]["b"])
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / FIRST).unlink()
    assert list(open_checkpoint(tmp_path).entries) == ["b"]


def test_reads_a_hub_cache_of_links(tmp_path: Path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sharded(blobs, TWO)
    for name in (*TWO, INDEX_FILE):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert set(open_checkpoint(snapshot).entries) == {"a", "b"}
    (blobs / SECOND).unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*missing"):
        open_checkpoint(snapshot)


def test_fingerprint_tells_versions_apart(tmp_path: Path):
    sharded(tmp_path, TWO)
    before = open_checkpoint(tmp_path).fingerprint()
    assert before == open_checkpoint(tmp_path).fingerprint() == json.loads(json.dumps(before))
    assert set(before["files"]) == set(TWO)
    assert str(tmp_path) not in json.dumps(before)
    os.utime(tmp_path / FIRST, ns=(1, 1))
    touched = open_checkpoint(tmp_path).fingerprint()
    assert touched["files"][FIRST].pop("mtime_ns") == 1
    before["files"][FIRST].pop("mtime_ns")
    assert touched == before
    safetensors.torch.save_file({"a": torch.zeros(3, 2)}, tmp_path / FIRST)
    after = open_checkpoint(tmp_path).fingerprint()
    assert after["files"][FIRST]["header_sha256"] != before["files"][FIRST]["header_sha256"]


def test_unknown_tensor_suggests_names(tmp_path: Path):
    safetensors.torch.save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"Did you mean lm_head\.weight"):
        open_checkpoint(tmp_path).read("lm_head.weigth")


@pytest.mark.parametrize("change", ["grown", "cut", "touched", "replaced", "gone"])
def test_file_changed_after_opening_is_noticed(tmp_path: Path, change: str):
    sharded(tmp_path, TWO)
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / FIRST
    data = path.read_bytes()
    if change == "grown":
        path.write_bytes(data + b"x")
    elif change == "cut":
        path.write_bytes(data[:-1])
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "replaced":
        info = path.stat()
        (tmp_path / "new").write_bytes(data)
        os.utime(tmp_path / "new", ns=(info.st_atime_ns, info.st_mtime_ns))
        (tmp_path / "new").replace(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*(changed while|missing)"):
        checkpoint.read("a")
    assert torch.equal(checkpoint.read("b"), TWO[SECOND]["b"])


def test_missing_folder_and_empty_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: convert"):
        open_checkpoint(tmp_path)


def test_shards_without_index(tmp_path: Path):
    sharded(tmp_path, TWO)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match="Download the index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [f"{start}x.safetensors" for start in ("/etc/", "../", "sub/", "..\\", "C:", "\0")]
    + ["x.bin", "..", "", 3, None, ["x"]],
)
def test_index_naming_a_file_outside_is_refused(tmp_path: Path, name):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json: tensor 'a' names the file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"a": 1, "a": 2}', "\xff"]
)
def test_bad_index(tmp_path: Path, text: str):
    (tmp_path / INDEX_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index\.json: .*Download it again"):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path):
    sharded(tmp_path, TWO)
    (tmp_path / SECOND).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors, missing here"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path):
    sharded(tmp_path, TWO, {"a": FIRST, "b": SECOND, "c": SECOND})
    with pytest.raises(CheckpointError, match=r"has no tensor 'c'.* in no file"):
        open_checkpoint(tmp_path)
    sharded(tmp_path, TWO, {"a": SECOND, "b": FIRST})
    with pytest.raises(CheckpointError, match=r"has no tensor 'a'.* it is in model-00001"):
        open_checkpoint(tmp_path)
    sharded(tmp_path, {FIRST: {**TWO[FIRST], "extra": torch.zeros(1)}, SECOND: TWO[SECOND]}, {"a": FIRST, "b": SECOND})
    with pytest.raises(CheckpointError, match=r"'extra', which .* does not name"):
        open_checkpoint(tmp_path)
    twice = {FIRST: TWO[FIRST], SECOND: {**TWO[FIRST], **TWO[SECOND]}}
    sharded(tmp_path, twice, {"a": FIRST, "b": SECOND})
    with pytest.raises(CheckpointError, match=r"'a' is in model-00001-of-00002\.safetensors too"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_truncated_file(tmp_path: Path, keep: int):
    safetensors.torch.save_file(TWO[FIRST], tmp_path / SINGLE_FILE)
    data = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*again"):
        open_checkpoint(tmp_path)


def test_not_a_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).rmdir()
    (tmp_path / SINGLE_FILE).symlink_to("nothing")
    with pytest.raises(CheckpointError, match="a link to a file that is not there"):
        open_checkpoint(tmp_path)
