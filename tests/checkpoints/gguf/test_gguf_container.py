"""GGUF files: ours are read by the gguf package, its are read by us, and nothing unsound gets through."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitgrain.checkpoints.gguf.container import MOST_ENTRIES, GgufFile, open_gguf
from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.checkpoints.gguf.writer import GgufWriter, plan_gguf
from bitgrain.errors import CheckpointError, OutputError, PlanError

METADATA = {
    "general.architecture": "llama",
    "general.name": "naïve",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "a.negative": -3,
    "a.flag": True,
    "a.large": 1 << 40,
    "a.tokens": ["<s>", "▁the", "", "é"],
    "a.types": [1, 3, -1],
    "a.scores": [0.0, -1.5],
    "a.flags": [True, False],
}
TENSORS = [("token_embd.weight", "Q4_K", (3, 512)), ("norm.weight", "F32", (5,)), ("experts", "Q8_0", (2, 3, 32))]


def write(path: Path, metadata=METADATA, tensors=TENSORS, **more) -> dict[str, torch.Tensor]:
    plan = plan_gguf(metadata, tensors, **more)
    generator = torch.Generator().manual_seed(len(tensors))
    written = {}
    with GgufWriter(path, plan) as writer:
        for tensor in reversed(plan.tensors):
            written[tensor.name] = torch.randint(256, tensor.matrix, dtype=torch.uint8, generator=generator)
            writer.write(tensor.name, written[tensor.name])
        writer.finish()
    assert path.stat().st_size == plan.nbytes
    return written


def same(mine: GgufFile, written: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(mine.read(name), data) for name, data in written.items()) and set(mine.tensors) == set(
        written
    )


def test_what_is_written_is_read(tmp_path: Path):
    written = write(tmp_path / "m.gguf")
    mine = open_gguf(tmp_path / "m.gguf")
    assert mine.metadata == METADATA
    assert mine.kinds["a.large"] == "uint64"
    assert mine.kinds["a.types"] == "array[int32]"
    assert mine.tensors["experts"].shape == (2, 3, 32)
    assert mine.tensors["experts"].matrix == (6, 34)
    assert same(mine, written)
    assert torch.equal(mine.read_rows("experts", 2, 5), written["experts"][2:5])
    assert mine.read_rows("experts", 6, 6).shape == (0, 34)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


def test_the_gguf_package_reads_ours(tmp_path: Path):
    for alignment in (32, 64):
        path = tmp_path / f"{alignment}.gguf"
        written = write(path, alignment=alignment)
        reader = gguf.GGUFReader(path)
        found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert found == METADATA | ({"general.alignment": 64} if alignment == 64 else {})
        for tensor in reader.tensors:
            assert tensor.data_offset % alignment == 0
            assert tensor.data.tobytes() == written[tensor.name].numpy().tobytes()
        assert [tensor.name for tensor in reader.tensors] == [name for name, *_ in TENSORS]


def test_we_read_what_the_gguf_package_writes(tmp_path: Path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "b c", "▁"])
    writer.add_token_scores([1.0, 2.0, 3.0])
    writer.add_rope_freq_base(5e5)
    x = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    writer.add_tensor("x", x)
    stored = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("q", stored, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    mine = open_gguf(path)
    assert mine.metadata["tokenizer.ggml.tokens"] == ["a", "b c", "▁"]
    assert mine.metadata["llama.rope.freq_base"] == 5e5
    assert (mine.tensors["q"].type, mine.tensors["q"].shape) == ("Q5_1", (4, 64))
    assert mine.read("q").numpy().tobytes() == stored.tobytes()
    assert mine.read("x").numpy().tobytes() == x.tobytes()
    again = plan_gguf(mine.metadata, [(t.name, t.type, t.shape) for t in mine.tensors.values()], 64, mine.kinds)
    assert path.read_bytes().startswith(again.header)


def test_same_input_same_bytes(tmp_path: Path):
    (tmp_path / "b.gguf.part").write_bytes(b"\xff" * 5000)  # what a killed run left
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_file_has_its_name_only_when_whole(tmp_path: Path):
    plan = plan_gguf({}, TENSORS)
    with GgufWriter(tmp_path / "m.gguf", plan) as writer:
        with pytest.raises(ValueError, match="never written"):
            writer.finish()
        with pytest.raises(ValueError, match="planned as"):
            writer.write("experts", torch.zeros(204, dtype=torch.uint8))
    assert not (tmp_path / "m.gguf").exists()
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        GgufWriter(tmp_path / "m.gguf", plan)
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


BAD_PLANS = {
    "alignment": ({}, [], {"alignment": 24}),
    "two alignments": ({"general.alignment": 64}, [], {}),
    "empty key": ({"": 1}, [], {}),
    "lone surrogate": ({"\ud800": 1}, [], {}),
    "surrogate value": ({"a": "\ud800"}, [], {}),
    "no kind": ({"a": None}, [], {}),
    "nested": ({"a": [[1]]}, [], {}),
    "empty array": ({"a": []}, [], {}),
    "mixed array": ({"a": [1, "b"]}, [], {}),
    "too large": ({"a": 1 << 64}, [], {}),
    "too large for its kind": ({"a": 300}, [], {"kinds": {"a": "uint8"}}),
    "not a number": ({"a": "x"}, [], {"kinds": {"a": "uint8"}}),
    "bool as a number": ({"a": True}, [], {"kinds": {"a": "uint8"}}),
    "text as an array": ({"a": "xy"}, [], {"kinds": {"a": "array[string]"}}),
    "unknown kind": ({"a": 1}, [], {"kinds": {"a": "uint7"}}),
    "name twice": ({}, [("t", "F32", (1,))] * 2, {}),
    "long name": ({}, [("t" * 64, "F32", (1,))], {}),
    "unknown type": ({}, [("t", "Q9_K", (1,))], {}),
    "half a block": ({}, [("t", "Q4_0", (4, 48))], {}),
    "dimensions": ({}, [("t", "F32", (1, 1, 1, 1, 1))], {}),
    "too many keys": ({str(i): 0 for i in range(MOST_ENTRIES + 1)}, [], {}),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plan_is_one_clear_error(case: str):
    metadata, tensors, more = BAD_PLANS[case]
    with pytest.raises(PlanError):
        plan_gguf(metadata, tensors, **more)


def test_kinds_are_kept_when_asked_for():
    kinds = {"a": "uint8", "b": "float64", "c": "array[uint16]", "d": "array[string]"}
    assert len(plan_gguf({"a": 200, "b": 0.1, "c": [1, 2], "d": []}, [], kinds=kinds).header) % 32 == 0


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return b"".join([magic, struct.pack("<IQQ", version, tensors, keys), *parts])


def entry(name=b"t", sizes=(4,), kind=0, offset=0, rank=None) -> bytes:
    rank = len(sizes) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", rank, *sizes, kind, offset)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def with_data(head: bytes, nbytes: int) -> bytes:
    return head + bytes(-len(head) % 32) + bytes(nbytes)


NESTED = struct.pack("<IQ", 9, 1) * 5 + struct.pack("<IQ", 4, 0)
HUGE = struct.pack("<Q", 1 << 62)
BAD_FILES = {
    "empty": b"",
    "magic": header(magic=b"GGML"),
    "git lfs": b"version https://git-lfs.github.com/spec/v1\n",
    "version 1": header(version=1),
    "version 4": header(version=4),
    "version 0": header(version=0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "cut in the counts": header()[:-3],
    "many tensors": header(tensors=MOST_ENTRIES + 1),
    "many keys": header(keys=1 << 63),
    "fewer keys": header(keys=1),
    "fewer tensors": header(tensors=1),
    "key length": header(HUGE, keys=1),
    "long key": header(text(b"k" * 70000) + struct.pack("<IB", 0, 1), keys=1),
    "empty key": header(key(b"", 0, b"\1"), keys=1),
    "key twice": header(key(b"k", 0, b"\1") * 2, keys=2),
    "key not UTF-8": header(key(b"\xff", 0, b"\1"), keys=1),
    "value not UTF-8": header(key(b"k", 8, text(b"\xc3")), keys=1),
    "string length": header(key(b"k", 8, HUGE), keys=1),
    "unknown kind": header(key(b"k", 13, b"\1"), keys=1),
    "bool 2": header(key(b"k", 7, b"\2"), keys=1),
    "array of unknown kind": header(key(b"k", 9, struct.pack("<IQ", 77, 1)), keys=1),
    "array length": header(key(b"k", 9, struct.pack("<I", 0) + HUGE), keys=1),
    "strings length": header(key(b"k", 9, struct.pack("<I", 8) + HUGE), keys=1),
    "arrays length": header(key(b"k", 9, struct.pack("<I", 9) + HUGE), keys=1),
    "strings not UTF-8": header(key(b"k", 9, struct.pack("<IQ", 8, 2) + text(b"\xc3") + text(b"\xa9")), keys=1),
    "string length in array": header(key(b"k", 9, struct.pack("<IQ", 8, 1) + HUGE), keys=1),
    "bools of 2": header(key(b"k", 9, struct.pack("<IQ", 7, 3) + b"\0\2\1"), keys=1),
    "nested too deep": header(key(b"k", 9, NESTED), keys=1),
    "arrays without end": header(key(b"k", 9, struct.pack("<IQ", 9, 70000) + struct.pack("<IQ", 0, 0) * 70000), keys=1),
    "alignment 0": header(key(b"general.alignment", 4, struct.pack("<I", 0)), keys=1),
    "alignment 24": header(key(b"general.alignment", 4, struct.pack("<I", 24)), keys=1),
    "alignment a string": header(key(b"general.alignment", 8, text(b"32")), keys=1),
    "five dimensions": with_data(header(entry(sizes=(1,) * 5), tensors=1), 32),
    "claimed dimensions": with_data(header(entry(rank=1 << 31), tensors=1), 32),
    "unknown type": with_data(header(entry(kind=4), tensors=1), 32),
    "half a block": with_data(header(entry(kind=2), tensors=1), 32),
    "overflow": with_data(header(entry(sizes=(1 << 40, 1 << 40)), tensors=1), 32),
    "overflow hidden by zero": with_data(header(entry(sizes=(0, 1 << 62, 4)), tensors=1), 32),
    "unaligned": with_data(header(entry(offset=4), tensors=1), 64),
    "overlap": with_data(header(entry(sizes=(9,)), entry(b"u", offset=32), tensors=2), 96),
    "same bytes twice": with_data(header(entry(), entry(b"u"), tensors=2), 96),
    "name twice": with_data(header(entry(), entry(offset=32), tensors=2), 96),
    "name not UTF-8": with_data(header(entry(b"\xff"), tensors=1), 32),
    "truncated": with_data(header(entry(), tensors=1), 15),
    "truncated, without a name": with_data(header(entry(b""), tensors=1), 15),
    "beyond the file": with_data(header(entry(offset=1 << 62), tensors=1), 64),
    "no data": header(entry(), tensors=1),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_error(case: str, tmp_path: Path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD_FILES[case])
    with pytest.raises(CheckpointError, match=r"^/\S+/bad\.gguf: ") as caught:
        open_gguf(path)
    assert len(str(caught.value)) < 400


def test_what_is_left_open_is_read(tmp_path: Path):
    """Version 2, nested arrays, holes, scalars, empty tensors, bytes behind the last tensor."""
    nested = struct.pack("<IQ", 9, 2) + struct.pack("<IQ3B", 0, 3, 1, 2, 3) + struct.pack("<IQ", 8, 1) + text(b"x")
    head = header(
        *(key(b"k", 9, nested), entry(offset=96), entry(b"scalar", sizes=()), entry(b"none", sizes=(0, 3), offset=32)),
        tensors=3,
        keys=1,
        version=2,
    )
    (tmp_path / "m.gguf").write_bytes(with_data(head, 200))
    mine = open_gguf(tmp_path / "m.gguf")
    assert mine.version == 2
    assert mine.metadata == {"k": [[1, 2, 3], ["x"]]}
    assert (mine.tensors["scalar"].shape, mine.tensors["none"].shape) == ((), (3, 0))
    assert mine.read("none").shape == (3, 0)
    assert mine.read("scalar").shape == (1, 4)


def test_reading_says_what_is_wrong(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write(path)
    mine = open_gguf(path)
    with pytest.raises(CheckpointError, match=r"no tensor 'norm\.weigh'.*Did you mean norm\.weight"):
        mine.read("norm.weigh")
    with pytest.raises(IndexError):
        mine.read_rows("experts", 3, 7)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="changed while"):
        mine.read("experts")
    for wrong in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError):
            open_gguf(wrong)


ARRAYS = {
    "empty strings": (8, struct.pack("<Q", 0)),
    "short strings": (8, text(b"x")),
    "bytes": (0, b"x"),
    "bools": (7, b"\1"),
    "long": (11, struct.pack("<q", -1)),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_take_about_what_they_take_in_the_file(case: str, tmp_path: Path):
    """Twice: the header, and the arrays in it."""
    kind, item = ARRAYS[case]
    count = 4_000_000 // len(item) if kind != 8 else 80_000
    path = tmp_path / "m.gguf"
    path.write_bytes(header(key(b"k", 9, struct.pack("<IQ", kind, count) + item * count), keys=1))
    tracemalloc.start()
    try:
        mine = open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(mine.metadata["k"]) == count
    assert peak < 2.5 * path.stat().st_size + (1 << 20)


def test_a_long_string_is_refused_before_it_is_read(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(key(b"k" * 60000, 8, text(bytes((1 << 24) + 1))), keys=1))
    with pytest.raises(CheckpointError, match="claims a string of 16777217 bytes") as caught:
        open_gguf(path)
    assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path)
    return path.read_bytes()


EDITS = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 700), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 1600), st.just(0)),
    st.tuples(
        st.just("long"), st.integers(0, 700), st.sampled_from([0, 1, 255, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1])
    ),
    st.tuples(st.just("word"), st.integers(0, 700), st.integers(0, 48)),
    st.tuples(st.just("repeat"), st.integers(0, 600), st.integers(1, 64)),
    st.tuples(st.just("drop"), st.integers(0, 600), st.integers(1, 64)),
)


def edited(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    for what, place, value in edits:
        if what == "flip":
            data = data[:place] + bytes(byte ^ value for byte in data[place : place + 1]) + data[place + 1 :]
        elif what == "cut":
            data = data[:place]
        elif what in ("long", "word"):
            new = value.to_bytes(8 if what == "long" else 4, "little")
            data = data[:place] + new + data[place + len(new) :]
        elif what == "repeat":
            data = data[:place] + data[place : place + value] + data[place:]
        else:
            data = data[:place] + data[place + value :]
    return data


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDITS, min_size=1, max_size=3))
def test_any_damage_is_an_error_or_harmless(small: bytes, tmp_path: Path, edits: list[tuple[str, int, int]]):
    path = tmp_path / "m.gguf"
    path.write_bytes(edited(small, edits))
    try:
        mine = open_gguf(path)
    except CheckpointError as error:
        assert len(str(error)) < 1000  # noqa: PT017
        return
    size = path.stat().st_size
    assert sum(tensor.nbytes for tensor in mine.tensors.values()) <= size
    for name, tensor in mine.tensors.items():
        rows, width = tensor.matrix
        assert mine.read(name).shape == (rows, width)
        assert tensor.type in STORAGES
    for value in mine.metadata.values():
        assert len(repr(value)) <= 20 * size
