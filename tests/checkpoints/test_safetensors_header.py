"""The strict parser: it takes what the reference writer makes, and nothing that the format forbids."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.checkpoints.safetensors_header import DTYPES, header_length, parse_header
from bitgrain.errors import CheckpointError

I8 = {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}


def info(begin: int, end: int, **other):
    return {"dtype": "I8", "shape": [end - begin], "data_offsets": [begin, end], **other}


def parse(table, data_bytes: int):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return parse_header(text, 8 + len(text) + data_bytes, "some/file.safetensors")


def test_reference_file_is_understood():
    tensors = {name: torch.zeros(8, dtype=torch.uint8).view(dtype) for name, dtype in DTYPES.items()}
    data = safetensors.torch.save(tensors, {"format": "pt"})
    length = header_length(data[:8], len(data), "x")
    header = parse_header(data[8 : 8 + length], len(data), "x")
    assert {entry.name: entry.dtype for entry in header.entries} == dict(DTYPES)
    assert header.metadata == {"format": "pt"}


def test_no_tensors_and_empty_tensors_are_sound():
    assert parse({}, 0).entries == ()
    table = {"b": info(0, 2), "a": info(0, 0), "c": info(2, 2, shape=[3, 0]), "__metadata__": None}
    assert [entry.name for entry in parse(table, 2).entries] == ["a", "b", "c"]


BAD = {
    "not JSON": (b"{", 0),
    "not an object": (b"[]", 0),
    "leading space": (b' {"a":1}', 0),
    "not UTF-8": (b'{"\xff":1}', 0),
    "nested deeply": (b'{"a":' * 100_000, 0),
    "NaN": (b'{"a":{"dtype":"I8","shape":[NaN],"data_offsets":[0,2]}}', 2),
    "huge integer": (b'{"a":{"dtype":"I8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,2]}}', 2),
    "duplicate tensor": (b'{"a":' + json.dumps(I8).encode() + b',"a":' + json.dumps(I8).encode() + b"}", 2),
    "duplicate key": (b'{"a":{"dtype":"I8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}', 2),
    "lone surrogate": (b'{"\\ud800":' + json.dumps(I8).encode() + b"}", 2),
    "metadata not strings": ({"__metadata__": {"format": 1}}, 0),
    "metadata a list": ({"__metadata__": []}, 0),
    "entry not an object": ({"a": 3}, 0),
    "missing key": ({"a": {"dtype": "I8", "shape": [2]}}, 2),
    "extra key": ({"a": {**I8, "more": 1}}, 2),
    "unknown dtype": ({"a": {**I8, "dtype": "F4"}}, 2),
    "dtype a list": ({"a": {**I8, "dtype": ["I8"]}}, 2),
    "negative size": ({"a": {**I8, "shape": [-2]}}, 2),
    "size true": ({"a": {**I8, "shape": [2, True]}}, 2),
    "size a float": ({"a": {**I8, "shape": [2.0]}}, 2),
    "overflow": ({"a": {**I8, "shape": [1 << 40, 1 << 40]}}, 2),
    "overflow hidden by zero": ({"a": {**I8, "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}}, 0),
    "wrong length": ({"a": {**I8, "dtype": "F32"}}, 2),
    "offsets reversed": ({"a": {**I8, "data_offsets": [2, 0]}}, 2),
    "three offsets": ({"a": {**I8, "data_offsets": [0, 2, 2]}}, 2),
    "hole in front": ({"a": info(1, 3)}, 3),
    "hole between": ({"a": info(0, 2), "b": info(3, 4)}, 4),
    "overlap": ({"a": info(0, 2), "b": info(1, 3)}, 3),
    "same bytes twice": ({"a": info(0, 2), "b": info(0, 2)}, 2),
    "truncated": ({"a": info(0, 2)}, 1),
    "trailing bytes": ({"a": info(0, 2)}, 3),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_one_clear_error(case: str):
    with pytest.raises(CheckpointError, match=r"^some/file\.safetensors: ") as caught:
        parse(*BAD[case])
    assert any(word in str(caught.value) for word in ("again", "Convert"))


@pytest.mark.parametrize(
    ("first", "size", "why"),
    [
        (b"", 0, "too few"),
        (b"1234567", 7, "too few"),
        ((100_000_001).to_bytes(8, "little"), 1 << 40, "limit"),
        (b"\xff" * 8, 100, "limit"),
        ((93).to_bytes(8, "little"), 100, "needs 101"),
        (b"version https://git-lfs", 130, "git lfs pull"),
    ],
)
def test_bad_length_is_one_clear_error(first: bytes, size: int, why: str):
    with pytest.raises(CheckpointError, match=why):
        header_length(first, size, "x")


SOUND = safetensors.torch.save({"a": torch.arange(6, dtype=torch.int16).view(2, 3), "b": torch.ones(3)}, {"k": "v"})


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(SOUND) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(SOUND)), whole=st.booleans())
def test_never_more_lenient_than_the_reference(at: int, byte: int, cut: int, whole: bool):
    """Whatever one changed byte or a cut makes of a file: an error that we raise, or tensors as the reference sees."""
    data = bytearray(SOUND if whole else SOUND[:cut])
    if at < len(data):
        data[at] = byte
    try:
        length = header_length(bytes(data[:8]), len(data), "x")
        header = parse_header(bytes(data[8 : 8 + length]), len(data), "x")
    except CheckpointError:
        return
    theirs = safetensors.torch.load(bytes(data))
    assert {entry.name: (entry.dtype, entry.shape) for entry in header.entries} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in theirs.items()
    }
