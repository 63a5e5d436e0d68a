"""Attention for training on a CPU: short rows by plain products, long ones by torch's kernel.

torch's fused attention keeps the scores out of memory, which long rows need. On a CPU its backward
pass is slow where rows are short: 16 rows of 72 tokens with 9 heads of 64 took 25 ms there and
back, the two products and the softmax written out 6 ms (Zen 5, bfloat16); at 8 rows of 512 tokens
and 4 heads the products were faster alone and slower in the training loop, where their scores are
too large for the allocator to keep. Hence a limit on the size of the scores.
"""

from typing import Any

import torch
from torch import Tensor

NAME = "short_rows_by_products"
MOST_SCORES = 1 << 22  # rows x heads x tokens x tokens: 16 MB in float32


def train_with_products(model: Any) -> None:
    """Let `model` (transformers') attend by `attention` below while it is on a CPU.

    A definition that takes no other attention than its own is left as it is.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' contract. query: (rows, heads, tokens, width); key, value: maybe fewer heads.

    Returns (rows, tokens, heads, width). Same values as the fused kernel up to rounding: under
    bfloat16 the scores are rounded once, to 8 bits of mantissa, before the softmax in float32.
    """
    rows, heads, tokens, width = query.shape
    groups = key.shape[1]
    plain = (
        query.device.type == "cpu"
        and mask is None
        and key.shape[2] == tokens
        and rows * heads * tokens * tokens <= MOST_SCORES
        and torch.is_grad_enabled()
    )
    if not plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
        )
    # The query heads that share a key stand below each other: one product for all of them.
    query = query * (width**-0.5 if scaling is None else scaling)
    scores = query.reshape(rows, groups, heads // groups * tokens, width) @ key.transpose(2, 3)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    scores = scores.view(rows, heads, tokens, tokens).masked_fill(later, -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=module.training)
    mixed = weights.view(rows, groups, heads // groups * tokens, tokens) @ value
    return mixed.view(rows, heads, tokens, width).transpose(1, 2).contiguous(), None
