"""Block types: what the gguf package reads out of any bytes, and what it writes, is ours bit for bit."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES, get_type, spec_of, type_for
from bitgrain.errors import CheckpointError, NumericsError, SchemeError
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_group, quantize
from bitgrain.numerics.ranges import get_range
from bitgrain.numerics.spec import mxfp4

KNOWN_TO_GGUF = [name for name in STORAGES if name in gguf.GGMLQuantizationType.__members__]
QUANTIZED = [name for name, found in BLOCK_TYPES.items() if found.spec is not None]
SYMMETRIC = [name for name in QUANTIZED if spec_of(name).symmetric]
WRITTEN_BY_GGUF = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0"]
SIGNED_ZEROS = ("MXFP4", "NVFP4")
"""ggml reads their code 8 as 0, E2M1 as -0."""


def theirs(data: torch.Tensor, name: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.array(values, dtype=np.float32))


def assert_same_numbers(mine: torch.Tensor, other: torch.Tensor, name: str) -> None:
    nan = other.isnan()
    assert torch.equal(mine.isnan(), nan)
    mine, other = mine[~nan], other[~nan]
    if name in SIGNED_ZEROS:
        assert torch.equal(mine, other)
    else:
        assert torch.equal(mine.view(torch.int32), other.view(torch.int32))


def sound(data: torch.Tensor, name: str) -> torch.Tensor:
    """The bytes without what is refused: scales that are not numbers, codes that are not ternary."""
    blocks = data.clone().view(-1, BLOCK_TYPES[name].block_bytes)
    if name == "MXFP4":
        blocks[:, :1].clamp_(max=254)
    elif name == "NVFP4":
        blocks[:, :4].clamp_(max=126)
    elif name == "TQ2_0":
        codes = blocks[:, :64]
        codes &= ~((codes >> 1) & codes & 0x55)
    return blocks.view(data.shape)


def random_rows(name: str, rows: int, blocks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = blocks * BLOCK_TYPES[name].block_bytes
    return sound(torch.randint(256, (rows, width), dtype=torch.uint8, generator=generator), name)


@pytest.mark.parametrize("name", KNOWN_TO_GGUF)
def test_sizes_are_those_of_the_gguf_package(name: str):
    storage = STORAGES[name]
    number = gguf.GGMLQuantizationType[name]
    assert (storage.number, (storage.size, storage.nbytes)) == (number.value, gguf.GGML_QUANT_SIZES[number])


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_bytes_mean_what_gguf_says_and_come_back(name: str, data: st.DataObject):
    found = BLOCK_TYPES[name]
    rows, blocks = data.draw(st.sampled_from([(1, 1), (1, 2), (3, 1), (2, 3)]))
    nbytes = rows * blocks * found.block_bytes
    drawn = data.draw(st.binary(min_size=nbytes, max_size=nbytes))
    stored = sound(torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(rows, -1), name)
    q = found.unpack(stored, (rows, blocks * found.block_size))
    assert q.spec == found.spec
    assert_same_numbers(q.dequantize(), theirs(stored, name), name)
    again = found.pack(q)
    if name == "TQ1_0":  # 256 bytes for 243 numbers: what is written is the byte that ggml writes
        assert torch.equal(found.unpack(again, q.shape).codes, q.codes)
        assert torch.equal(found.pack(found.unpack(again, q.shape)), again)
    else:
        assert torch.equal(again, stored)


@pytest.mark.parametrize("name", QUANTIZED)
def test_many_blocks_are_as_few(name: str):
    found = BLOCK_TYPES[name]
    blocks, rows = 2048 // found.block_size, 600  # more codes than are handled at once
    stored = random_rows(name, rows, blocks, seed=1)
    q = found.unpack(stored, (rows, 2048))
    assert_same_numbers(q.dequantize(), theirs(stored, name), name)
    assert torch.equal(found.unpack(found.pack(q), q.shape).codes, q.codes)
    assert torch.equal(found.pack(q)[3:4], found.pack(found.unpack(stored[3:4], (1, 2048))))


@pytest.mark.parametrize("name", WRITTEN_BY_GGUF)
def test_what_gguf_writes_comes_back_bit_for_bit(name: str):
    x = torch.randn(5, 768, generator=torch.Generator().manual_seed(2))
    x[1, :256] = 0
    with np.errstate(all="ignore"):
        stored = torch.from_numpy(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name]).copy())
    q = BLOCK_TYPES[name].unpack(stored, (5, 768))
    assert_same_numbers(q.dequantize(), theirs(stored, name), name)
    assert torch.equal(BLOCK_TYPES[name].pack(q), stored)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_what_we_quantize_is_read_by_gguf(name: str):
    found = BLOCK_TYPES[name]
    assert found.spec is not None
    q = quantize(torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(3)), found.spec)
    assert_same_numbers(q.dequantize().view(6, 512), theirs(found.pack(q), name), name)
    again = found.unpack(found.pack(q), (2, 3, 512))
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_empty_tensors():
    for name in QUANTIZED:
        found = BLOCK_TYPES[name]
        for shape in ((0, 256), (3, 0)):
            rows = torch.empty(shape[0], found.row_bytes(shape[1]), dtype=torch.uint8)
            q = found.unpack(rows, shape)
            assert q.shape == shape
            assert torch.equal(found.pack(q), rows)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_numbers(name: str):
    found = get_type(name.lower())
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(4))
    stored = found.store(x)
    assert torch.equal(stored.view(-1), torch.from_numpy(_plain(x.numpy(), name)))
    assert torch.equal(found.values(stored, (3, 2, 5)), x.to(found.dtype))
    assert spec_of(name) is None
    with pytest.raises(SchemeError, match="plain numbers"):
        found.unpack(stored, (3, 2, 5))
    with pytest.raises(SchemeError, match=f"^{name} holds torch"):
        found.pack(quantize(torch.ones(1, 32), spec_of("Q4_0")))


def _plain(x: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.quantize(x, gguf.GGMLQuantizationType[name]).reshape(-1).view(np.uint8).copy()


def test_values_of_quantized_types():
    stored = random_rows("Q8_0", 2, 3, seed=5)
    stored.view(-1, 34)[:, 1] = 0x3C
    assert torch.equal(BLOCK_TYPES["Q8_0"].values(stored, (2, 96)), theirs(stored, "Q8_0"))
    with pytest.raises(SchemeError, match="holds codes"):
        BLOCK_TYPES["Q8_0"].store(torch.ones(2, 32))


@pytest.mark.parametrize("name", QUANTIZED)
def test_type_is_found_by_spec(name: str):
    spec = spec_of(name)
    found = type_for(replace(spec, range=get_range("mse")))
    assert found is not None
    assert found.name == ("TQ2_0" if name == "TQ1_0" else name)
    assert type_for(replace(spec, granularity=per_group(64))) is None


def test_restricted_codes_are_still_codes():
    spec = replace(spec_of("Q8_0"), restricted=True)
    assert type_for(spec) is BLOCK_TYPES["Q8_0"]
    q = quantize(torch.randn(2, 64), spec)
    assert torch.equal(BLOCK_TYPES["Q8_0"].unpack(BLOCK_TYPES["Q8_0"].pack(q), (2, 64)).codes, q.codes)


def test_specs_of_the_field():
    assert spec_of("MXFP4") == mxfp4()
    assert spec_of("Q4_0") == QuantSpec(get_format("int4"), per_group(32), scale=get_format("float16"))
    bits = {name: spec_of(name).count_bits((1, 256)) / 256 for name in QUANTIZED}
    stored = {name: 8 * BLOCK_TYPES[name].block_bytes / BLOCK_TYPES[name].block_size for name in QUANTIZED}
    stored["TQ1_0"] = stored["TQ2_0"]  # a ternary code counts as two bits
    assert bits == stored


def test_wrong_input_is_one_clear_error():
    found = BLOCK_TYPES["Q4_K"]
    with pytest.raises(SchemeError, match="cannot be read"):
        get_type("Q9_K")
    with pytest.raises(SchemeError, match=r"^Q4_K holds uint4 per_group\(32\)"):
        found.pack(quantize(torch.ones(1, 256), spec_of("Q4_0")))
    with pytest.raises(SchemeError, match="blocks of 256"):
        found.unpack(torch.zeros(1, 144, dtype=torch.uint8), (1, 128))
    with pytest.raises(SchemeError, match=r"uint8 \[2, 144\]"):
        found.unpack(torch.zeros(1, 288, dtype=torch.uint8), (2, 256))
    q = quantize(torch.ones(1, 32), spec_of("Q4_0"))
    with pytest.raises(NumericsError, match="beyond the 16 of int4"):
        BLOCK_TYPES["Q4_0"].pack(QTensor(q.codes + 9, q.scale, None, q.spec))
    three = quantize(torch.ones(1, 256), spec_of("TQ2_0"))
    with pytest.raises(NumericsError, match="beyond the 3 of ternary"):
        BLOCK_TYPES["TQ1_0"].pack(replace(three, codes=three.codes + 1))


@pytest.mark.parametrize(("name", "place", "byte"), [("MXFP4", 17, 255), ("NVFP4", 39, 127), ("NVFP4", 36, 128)])
def test_scales_that_are_no_numbers(name: str, place: int, byte: int):
    stored = random_rows(name, 1, 2, seed=6)
    stored[0, place] = byte
    with pytest.raises(CheckpointError, match="not a number"):
        BLOCK_TYPES[name].unpack(stored, (1, 2 * BLOCK_TYPES[name].block_size))


@pytest.mark.parametrize(("name", "number"), [("MXFP4", float("nan")), ("NVFP4", float("nan")), ("NVFP4", -1.0)])
def test_scales_that_ggml_reads_otherwise_are_not_written(name: str, number: float):
    q = quantize(torch.randn(2, 64, generator=torch.Generator().manual_seed(6)), spec_of(name))
    scale = q.scale.float()
    scale[1, 1] = number
    with pytest.raises(SchemeError, match="negative or not a number"):
        BLOCK_TYPES[name].pack(replace(q, scale=scale.to(q.scale.dtype)))


def test_codes_that_are_not_ternary():
    stored = random_rows("TQ2_0", 1, 2, seed=7)
    stored[0, 70] |= 3
    with pytest.raises(CheckpointError, match="not ternary"):
        BLOCK_TYPES["TQ2_0"].unpack(stored, (1, 512))


def test_rows_of_another_tensors_memory():
    """Codes and bytes may begin anywhere in memory."""
    found = BLOCK_TYPES["Q5_1"]
    stored = random_rows("Q5_1", 3, 2, seed=8)
    shifted = torch.zeros(stored.numel() + 3, dtype=torch.uint8)[3:].view(3, -1).copy_(stored)
    q = found.unpack(shifted, (3, 64))
    codes = torch.zeros(q.codes.numel() + 1, dtype=torch.uint8)[1:].view(3, 64).copy_(q.codes)
    assert torch.equal(found.pack(replace(q, codes=codes)), stored)
