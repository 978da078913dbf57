"""Layouts: predicted bytes are written bytes, the reference library reads them, and every tensor is aligned."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.checkpoints.reader import INDEX_FILE, open_checkpoint
from bitgrain.checkpoints.safetensors_header import DTYPES
from bitgrain.checkpoints.shard_writer import ShardWriter, tensor_bytes
from bitgrain.checkpoints.shards import TensorSpec, index_bytes, layouts_sha256, plan_shards, weights_nbytes
from bitgrain.errors import OutputError, PlanError

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SPECS = st.lists(
    st.builds(
        TensorSpec,
        NAMES,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 7), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda spec: spec.name,
)


def filled(spec: TensorSpec) -> torch.Tensor:
    seed = sum(spec.name.encode())
    raw = torch.randint(256, (spec.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if spec.dtype == torch.bool:
        raw &= 1
    return raw.view(spec.dtype).view(spec.shape) if spec.nbytes else torch.empty(spec.shape, dtype=spec.dtype)


def write_all(folder: Path, layouts, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    random.Random(0).shuffle(names)
    with ShardWriter(folder, layouts) as writer:
        for name in names:
            writer.write(name, tensors[name])
        writer.sync(names)
        writer.finish()


@settings(max_examples=60, deadline=None)
@given(specs=SPECS, limit=st.integers(1, 3000))
def test_written_is_as_planned(specs: list[TensorSpec], limit: int):
    layouts = plan_shards(specs, limit)
    tensors = {spec.name: filled(spec) for spec in specs}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_all(folder, layouts, tensors)
        assert weights_nbytes(layouts) == sum(path.stat().st_size for path in folder.iterdir())
        names = {path.name for path in folder.iterdir()}
        assert names == {layout.file for layout in layouts} | ({INDEX_FILE} if len(layouts) > 1 else set())
        for layout in layouts:
            assert (folder / layout.file).stat().st_size == layout.nbytes
            data = (folder / layout.file).read_bytes()
            mine = {placed.spec.name: tensors[placed.spec.name] for placed in layout.tensors}
            # The reference writer is the oracle of the whole file, header and all.
            assert data == safetensors.torch.save(mine, {"format": "pt"})
            for tensor_name, entry in safetensors.deserialize(data):
                assert bytes(entry["data"]) == bytes(tensor_bytes(tensors[tensor_name]))
                assert tuple(entry["shape"]) == tuple(tensors[tensor_name].shape)
            for placed in layout.tensors:
                assert placed.offset % placed.spec.dtype.itemsize == 0
            assert len(layout.tensors) == 1 or sum(p.spec.nbytes for p in layout.tensors) <= limit
        checkpoint = open_checkpoint(folder)
        for spec in specs:
            assert bytes(tensor_bytes(checkpoint.read(spec.name))) == bytes(tensor_bytes(tensors[spec.name]))


def test_odd_int8_beside_bf16_loads_in_the_reference_library(tmp_path: Path):
    tensors = {
        "a.codes": torch.arange(7, dtype=torch.int8),
        "b.scale": torch.randn(3, 5).to(torch.bfloat16),
        "c.zero": torch.tensor(3, dtype=torch.int8),
        "d.bias": torch.randn(5),
        "e.none": torch.zeros(0, 4, dtype=torch.float16),
    }
    layouts = plan_shards([TensorSpec(k, v.dtype, tuple(v.shape)) for k, v in tensors.items()], 10**9)
    write_all(tmp_path, layouts, tensors)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert index_bytes(layouts) is None


def test_shards_fill_in_the_given_order():
    specs = [TensorSpec(name, torch.int8, (size,)) for name, size in [("z", 4), ("big", 50), ("a", 6), ("c", 5)]]
    layouts = plan_shards(specs, 10)
    assert [[placed.spec.name for placed in layout.tensors] for layout in layouts] == [["z"], ["big"], ["a"], ["c"]]
    assert [layout.file for layout in layouts][::3] == [
        "model-00001-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
    ]
    index = json.loads(index_bytes(layouts) or b"")
    assert index["metadata"]["total_size"] == 65
    assert list(index["weight_map"]) == ["a", "big", "c", "z"]
    assert len(plan_shards(specs, 11)) == 3


def test_plan_is_deterministic_and_its_digest_tells():
    specs = [TensorSpec(f"t{i}", torch.bfloat16, (i, 3)) for i in range(9)]
    assert plan_shards(specs, 100, {"b": "1", "a": "2"}) == plan_shards(specs, 100, {"a": "2", "b": "1"})
    digests = {layouts_sha256(plan_shards(specs, limit)) for limit in (50, 100, 1000)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("specs", "limit", "why"),
    [
        ([], 10, "no tensors"),
        ([TensorSpec("a", torch.int8, (1,))], 0, "at least 1"),
        ([TensorSpec("a", torch.int8, (1,))] * 2, 10, "Two output tensors"),
        ([TensorSpec("__metadata__", torch.int8, (1,))], 10, "cannot be named"),
        ([TensorSpec("", torch.int8, (1,))], 10, "cannot be named"),
        ([TensorSpec("\ud800", torch.int8, (1,))], 10, "cannot be named"),
        ([TensorSpec("a", torch.complex128, (1,))], 10, "another dtype"),
    ],
)
def test_impossible_plans(specs, limit, why):
    with pytest.raises(PlanError, match=why):
        plan_shards(specs, limit)


SPECS_2 = [TensorSpec("a", torch.bfloat16, (2, 3)), TensorSpec("b", torch.int8, (5,))]


def test_misuse_of_the_writer_is_an_error(tmp_path: Path):
    layouts = plan_shards(SPECS_2, 100)
    with ShardWriter(tmp_path, layouts) as writer:
        with pytest.raises(ValueError, match="not in the layout"):
            writer.write("c", torch.zeros(1))
        with pytest.raises(ValueError, match="is planned as"):
            writer.write("a", torch.zeros(2, 3))
        with pytest.raises(ValueError, match="is planned as"):
            writer.write("a", torch.zeros(3, 2, dtype=torch.bfloat16))
        writer.write("a", torch.zeros(2, 3, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="written already"):
            writer.write("a", torch.zeros(2, 3, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match=r"never written: \['b'\]"):
            writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.part"]
    with pytest.raises(ValueError, match="not in the layout"):
        ShardWriter(tmp_path, layouts, ["nobody"])


def test_strided_tensors_are_written_row_major(tmp_path: Path):
    a, b = torch.randn(3, 2).to(torch.bfloat16).T, torch.arange(10, dtype=torch.int8)[::2]
    write_all(tmp_path, plan_shards(SPECS_2, 100), {"a": a, "b": b})
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["a"], a)
    assert torch.equal(loaded["b"], b)


def test_threads_write_the_same_bytes(tmp_path: Path):
    specs = [TensorSpec(f"t{i}", random.Random(i).choice(list(DTYPES.values())), (i, 5)) for i in range(40)]
    tensors = {spec.name: filled(spec) for spec in specs}
    layouts = plan_shards(specs, 2000)
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    write_all(one, layouts, tensors)
    with ShardWriter(many, layouts) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: (writer.write(name, tensors[name]), writer.sync([name])), tensors))
        writer.finish()
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in many.iterdir()}


def test_full_disk_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"model\.safetensors\.part: .*Free some space"):
        ShardWriter(tmp_path, plan_shards(SPECS_2, 100))
