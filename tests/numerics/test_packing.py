import pytest
import scalar_twin as twin
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics.packing import pack, packed_length, transpose_nibbles, unpack

WORDS = {torch.int32: 32, torch.uint8: 8}


def random_codes(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32).to(torch.uint8)


@given(st.integers(1, 8), st.sampled_from(list(WORDS)), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
@example(3, torch.int32, 1, 1, 0)
@example(7, torch.uint8, 2, 33, 0)
def test_words_are_the_scalar_twins_and_come_back(bits, word, rows, length, seed):
    codes = random_codes((rows, length), bits, seed)
    words = pack(codes, bits, word)
    assert words.dtype == word
    assert words.shape == (rows, packed_length(length, bits, word)) == (rows, -(-length * bits // WORDS[word]))
    unsigned = [[w % 2 ** WORDS[word] for w in row] for row in words.tolist()]
    assert unsigned == [twin.pack(row, bits, WORDS[word]) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, length), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [1, 7, 32, 45, 256])
def test_compressed_tensors_packs_the_same(bits, cols):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = random_codes((6, cols), bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(pack(codes.t(), bits, axis=0), pack_to_int32(signed.t(), bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, signed.shape), signed)


def test_fp4_nibbles_are_those_of_compressed_tensors_and_torchao():
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    from bitgrain.numerics import get_format

    codes = random_codes((8, 64), 4)
    numbers = get_format("fp4_e2m1").decode(codes).to(torch.bfloat16)
    assert torch.equal(pack(codes, 4, torch.uint8), pack_fp4_to_uint8(numbers))
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels", reason="this torchao has no FP4 kernels")
    assert torch.equal(pack(codes, 4, torch.uint8), kernels.pack_uint4(codes))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", list(WORDS))
def test_any_axis_layout_rank_and_alignment(bits, word):
    codes = random_codes((3, 5, 16), bits)
    for axis in (0, 1, 2, -1, -2):
        packed = pack(codes, bits, word, axis)
        assert packed.is_contiguous()
        assert torch.equal(unpack(packed, bits, codes.shape[axis], axis), codes)
    flat = random_codes((64,), bits)
    for start in range(1, 5):
        shifted = flat[start:]  # begins at an odd address
        assert torch.equal(unpack(pack(shifted, bits, word), bits, 64 - start), shifted)
    words = pack(flat, bits, torch.uint8)
    longer = torch.cat([torch.zeros(1, dtype=torch.uint8), words])
    assert torch.equal(unpack(longer[1:], bits, 64), flat)
    assert pack(codes[:0], bits, word).shape[0] == 0
    assert unpack(pack(codes[..., :0], bits, word), bits, 0).shape == (3, 5, 0)


def test_results_share_no_memory_with_the_input():
    codes = random_codes((4, 8), 8)
    words = pack(codes, 8, torch.uint8)
    words.zero_()
    assert codes.any()
    back = unpack(pack(codes, 8, torch.uint8), 8, 8)
    assert torch.equal(back, codes)


def test_bad_arguments_name_the_remedy():
    with pytest.raises(SchemeError, match="1 to 8 bits"):
        pack(random_codes((2, 2), 4), 9)
    with pytest.raises(SchemeError, match="int32 or uint8"):
        pack(random_codes((2, 2), 4), 4, torch.int64)
    with pytest.raises(NumericsError, match="do not fit in 4 bits"):
        pack(torch.tensor([16], dtype=torch.uint8), 4)
    with pytest.raises(NumericsError, match="from -1 to 3 do not fit"):
        pack(torch.tensor([-1, 3]), 4)
    with pytest.raises(SchemeError, match="take 1 words"):
        unpack(torch.zeros(2, dtype=torch.int32), 4, 8)


@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (8, 4096), (1048, 40), (520, 2056)])
def test_nibbles_are_transposed_where_they_lie(shape: tuple[int, int]):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    words = pack(codes, 4, torch.uint8)
    assert torch.equal(transpose_nibbles(words), pack(codes.T.contiguous(), 4, torch.uint8))
    assert torch.equal(words, pack(codes, 4, torch.uint8))
