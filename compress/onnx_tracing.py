"""What stands in for parts of transformers' forward pass while torch.onnx traces it.

Attention with its past, and the rotation of queries and keys, are operators of ONNX: here they are
put where transformers would write them out.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out

NAME = "slimbench_onnx"  # under which transformers finds `attention`


class Past:
    """Keys and values of every block, as transformers' blocks ask for them."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = list(tensors)

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values: it is `attention` that joins them to the past."""
        return key, value

    def get_seq_length(self, block: int = 0) -> int:
        """Tokens in the past."""
        return self.tensors[0].shape[2]


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """The operator Attention, which reads the past and gives it back longer.

    query: (batch, heads, seq, width); key, value: (batch, key heads, seq, width), the new ones
    alone; mask: (batch, 1, seq, past + seq), added. Returns (batch, seq, heads, width).
    """
    held, place = options["held"].tensors, 2 * module.layer_idx
    before = held[place : place + 2]
    total = (*key.shape[:2], before[0].shape[2] + key.shape[2], key.shape[3])
    y, *held[place : place + 2] = symbolic_multi_out(
        "Attention",
        (query, key, value, mask, *before),
        {"scale": float(options.get("scaling") or query.shape[-1] ** -0.5)},
        dtypes=[query.dtype] * 3,
        shapes=[query.shape, total, total],
    )
    return y.transpose(1, 2), None


def rotated(
    query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """The operator RotaryEmbedding on both, in place of transformers' dozen.

    query, key: (batch, heads, seq, width). cosines, sines: (batch, seq, width), both halves equal.
    """
    half = cosines.shape[-1] // 2
    angles = cosines[..., :half], sines[..., :half]
    turned = [
        symbolic("RotaryEmbedding", (each, *angles), dtype=each.dtype, shape=each.shape)
        for each in (query, key)
    ]
    return turned[0], turned[1]


@contextmanager
def tracing() -> Iterator[None]:
    """With `attention` known and Llama's rotation one operator; the exporter says nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    log = logging.getLogger("torch.onnx")
    level, plain = log.level, modeling_llama.apply_rotary_pos_emb
    log.setLevel(logging.ERROR)
    modeling_llama.apply_rotary_pos_emb = rotated
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        modeling_llama.apply_rotary_pos_emb = plain
