"""Codes in 32-bit words, back to back: the packing that GPTQ, AWQ and compressed-tensors share.

Code j of a row takes bits j * bits and up of one long little-endian number, cut into int32 words.
Codes of 3 bits straddle words: number 10 has its low two bits in word 0 and its high bit in word 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

RUN = 32  # codes that fill whole words, whatever their bits


def word_count(columns: int, bits: int) -> int:
    """int32 words that hold so many codes."""
    return -(-columns * bits // 32)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes -> (rows, word_count) int32; a last word is filled with zeros."""
    rows, columns = codes.shape
    runs = F.pad(codes, (0, -columns % RUN)).view(rows, -1, RUN)
    words = torch.zeros(rows, runs.shape[1], bits, dtype=torch.int64, device=codes.device)
    for j in range(RUN):
        word, shift = divmod(j * bits, 32)
        code = runs[..., j].long() << shift
        words[..., word] |= code & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= code >> 32
    # Wraps to the signed number of the same bits.
    return words.view(rows, -1)[:, : word_count(columns, bits)].to(torch.int32).contiguous()


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `to_words`: (rows, word_count) int32 -> (rows, columns) uint8 codes."""
    rows, mask = len(words), 2**bits - 1
    runs = F.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, runs.shape[1], RUN, dtype=torch.uint8, device=words.device)
    for j in range(RUN):
        word, shift = divmod(j * bits, 32)
        code = (runs[..., word].long() & 0xFFFFFFFF) >> shift
        if shift + bits > 32:
            code |= runs[..., word + 1].long() << (32 - shift)
        codes[..., j] = code & mask
    return codes.view(rows, -1)[:, :columns]
