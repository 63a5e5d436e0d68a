"""Embedding and head as codes: what `head_bits` of every weight method does.

On a small model they are a fifth of the weights, and multiplying by the head a good part of the
time a token takes. They are rounded to nearest whatever the method: no calibration run reaches the
head, and an embedding has no inputs to weigh. 8 bits have one scale a row, fewer have groups whose
ranges are shrunk to the least squared error. A tied pair is stored once.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compress.layers import cast_parameters
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear
from compress.quant_math import BITS, fit_range, grouped, to_codes

ROWS = 4096  # of the matrix, worked on at a time


def check_head_bits(head_bits: int | None) -> None:
    """Raises ValueError unless head_bits is None or a number of bits that codes may have."""
    if head_bits is not None and head_bits not in BITS:
        raise ValueError(f"head_bits must be none or one of {BITS}, not {head_bits}")


def finish(
    model: Any, dtype: torch.dtype, head_bits: int | None = None, group_size: int = 64
) -> nn.Module:
    """The last step of a weight method: the vocabulary to codes if asked for, the rest to `dtype`.

    head_bits: None leaves embedding and head as they are. group_size: inputs that share a scale,
    below 8 bits. Raises ValueError if a parameter is not finite, or the head is quantized already.
    """
    if head_bits is not None:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ValueError("head_bits: the head is quantized already; leave it in skip")
        tied = head.weight is embedding.weight
        table = quantized(embedding.weight, head_bits, group_size, dtype)
        model.set_input_embeddings(QuantEmbedding(table))
        if not tied:
            table = quantized(head.weight, head_bits, group_size, dtype)
        model.set_output_embeddings(table)
    return cast_parameters(model, dtype)


def quantized(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> QuantLinear:
    """(vocabulary, width) to the nearest codes; symmetric where they have 8 bits."""
    if not weight.isfinite().all():
        raise ValueError("the embedding or the head holds NaN or infinity")
    size, symmetric = (-1, True) if bits == 8 else (group_size, False)
    parts = []
    for rows in weight.detach().split(ROWS):
        groups = grouped(rows.float(), size)
        scale, zero = fit_range(groups, bits, symmetric, dtype, clip=bits < 8)
        codes = to_codes(groups, scale, zero, bits).flatten(1)[:, : rows.shape[1]]
        parts.append((codes.to(torch.uint8), scale[..., 0], zero[..., 0]))
    codes, scale, zero = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantLinear.from_codes(
        codes, scale, None if symmetric else zero, None, bits, size, dtype=dtype
    )
