"""Packing is checked against bytes written by hand, Python's own big integers, and compressed-tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsquant.ops.pack import pack, packed_words, unpack

AWKWARD_COLS = [1, 2, 3, 5, 7, 8, 9, 10, 11, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100]


def random_codes(rows, cols, n_bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (n_bits - 1)
    return torch.randint(-half, half, (rows, cols), generator=generator).to(torch.int8)


def packed_by_definition(codes, n_bits):
    """Write each row as one big integer, element i at bit i * n_bits, and cut it into words."""
    rows = []
    for row in codes.tolist():
        bits = sum((code + 2 ** (n_bits - 1)) << (i * n_bits) for i, code in enumerate(row))
        data = bits.to_bytes(4 * packed_words(len(row), n_bits), "little")
        rows.append([int.from_bytes(data[k : k + 4], "little", signed=True) for k in range(0, len(data), 4)])
    return torch.tensor(rows, dtype=torch.int32)


def raw(packed):
    return packed.numpy().astype("<i4").tobytes()


def test_two_bit_codes_have_these_bytes():
    codes = torch.tensor([[-2, -1, 0, 1, 1, 0, -1, -2, 1]], dtype=torch.int8)
    # unsigned 0 1 2 3 | 3 2 1 0 | 3, the first element in the lowest bits of each byte
    expected = bytes([0b11_10_01_00, 0b00_01_10_11, 0b00_00_00_11, 0])
    assert raw(pack(codes, 2)) == expected


def test_three_bit_codes_straddle_bytes_and_words():
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3, 3, -4, 2], [3] * 11], dtype=torch.int8)
    # unsigned 0 1 2 3 4 5 6 7 | 7 0 6: 33 bits, so element 10 = 0b110 has two bits in word 0 and one in word 1
    first = bytes([0b10_001_000, 0b1_100_011_0, 0b111_110_10, 0b10_000_111, 0b1, 0, 0, 0])
    second = bytes([255, 255, 255, 255, 1, 0, 0, 0])
    assert raw(pack(codes, 3)) == first + second


@pytest.mark.parametrize("n_bits", range(1, 9))
@pytest.mark.parametrize("cols", AWKWARD_COLS)
def test_words_are_those_of_the_definition(n_bits, cols):
    codes = random_codes(3, cols, n_bits, seed=cols)
    packed = pack(codes, n_bits)
    assert torch.equal(packed, packed_by_definition(codes, n_bits))
    assert torch.equal(unpack(packed, n_bits, cols), codes)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_unpack_undoes_pack(data):
    n_bits = data.draw(st.integers(1, 8))
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 80))
    half = 2 ** (n_bits - 1)
    values = data.draw(st.lists(st.integers(-half, half - 1), min_size=rows * cols, max_size=rows * cols))
    codes = torch.tensor(values, dtype=torch.int8).view(rows, cols)
    packed = pack(codes, n_bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-cols * n_bits // 32))
    assert torch.equal(unpack(packed, n_bits, cols), codes)


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_both_ends_of_the_range_survive(n_bits):
    half = 2 ** (n_bits - 1)
    codes = torch.tensor([[-half, half - 1] * 17], dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, n_bits), n_bits, 34), codes)


def test_a_view_that_is_not_contiguous_packs_like_its_copy():
    codes = random_codes(20, 12, 3).t()
    packed = pack(codes, 3)
    assert torch.equal(packed, pack(codes.contiguous(), 3))
    wide = torch.stack([packed, packed], dim=-1)[..., 0]
    assert torch.equal(unpack(wide, 3, 20), codes)


@pytest.mark.parametrize("n_bits", range(1, 9))
@pytest.mark.parametrize("cols", AWKWARD_COLS)
def test_compressed_tensors_gives_the_same_words(n_bits, cols):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="needs compressed-tensors, the oracle of the packing order: pip install -e '.[dev]'",
    )
    codes = random_codes(4, cols, n_bits, seed=cols)
    packed = pack(codes, n_bits)
    assert torch.equal(packed, helpers.pack_to_int32(codes, n_bits))
    assert torch.equal(helpers.unpack_from_int32(packed, n_bits, torch.Size((4, cols))), codes)


@pytest.mark.parametrize(
    ("codes", "n_bits", "message"),
    [
        (torch.tensor([[2]], dtype=torch.int8), 2, "codes from 2 to 2 do not fit 2 bits"),
        (torch.tensor([[-5, 0]], dtype=torch.int8), 3, "codes from -5 to 0 do not fit 3 bits"),
        (torch.tensor([[1]], dtype=torch.int8), 1, "codes from 1 to 1 do not fit 1 bits"),
        (torch.zeros(2, 2), 2, "expected torch.int8 of 2 dimensions, not torch.float32"),
        (torch.zeros(2, dtype=torch.int8), 2, "of 2 dimensions, not torch.int8 of shape"),
        (torch.zeros(2, 2, dtype=torch.int8), 9, "n_bits is 9; packing takes 1 to 8 bits"),
        (torch.zeros(2, 2, dtype=torch.int8), 0, "n_bits is 0; packing takes 1 to 8 bits"),
    ],
)
def test_what_cannot_be_packed_is_refused(codes, n_bits, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, n_bits)


def test_words_of_another_length_are_refused():
    with pytest.raises(ValueError, match="17 codes of 2 bits take 2 words a row, not 1"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), 2, 17)
