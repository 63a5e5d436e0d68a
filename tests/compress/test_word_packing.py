"""Codes in 32-bit words: known words, the definition taken literally, back again."""

import pytest
import torch

from compress.export.word_packing import from_words, to_words, word_count


def row(values):
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, : len(values)] = torch.tensor(values, dtype=torch.uint8)
    return codes


def by_definition(codes, bits):
    """Words of one row as one long number."""
    number = sum(code << (bits * j) for j, code in enumerate(codes.tolist()))
    words = [number >> (32 * k) & 0xFFFFFFFF for k in range(word_count(len(codes), bits))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def test_words_by_hand():
    assert to_words(row([1, 2, 3, 4, 5, 6, 7, 0]), 4)[0].tolist() == [0x07654321, 0, 0, 0]
    assert to_words(row([0, 1, 2, 3]), 2)[0].tolist() == [0b11_10_01_00, 0]
    assert to_words(row([1, 0, 0, 0x80]), 8)[0, 0].item() == 0x80000001 - 2**32


def test_a_3_bit_code_straddles_two_words():
    codes = row([0] * 10 + [0b111] + [0] * 10 + [0b110])  # numbers 10 and 21
    low, middle, high = to_words(codes, 3)[0].tolist()
    assert low == (0b11 << 30) - 2**32
    assert middle == 0b1  # bit 2 of number 10; bit 0 of number 21, which is 0, is bit 31
    assert high == 0b11


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [8, 32, 57, 160])
def test_words_are_one_long_number(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(bits))
    words = to_words(codes.to(torch.uint8), bits)
    assert words.dtype == torch.int32
    assert [by_definition(one, bits) for one in codes] == words.tolist()
    assert torch.equal(from_words(words, bits, columns), codes.to(torch.uint8))
