"""Which attention to train with: fused, or written out as two products and a softmax.

torch's fused attention saves memory, which grows with the square of the context otherwise. On a
CPU it is not faster: for windows of 512 tokens the products, done by the matrix kernels of the
machine, made a training step of a small GPT-2 1.19 times as fast (Zen 5, bfloat16).
"""

from typing import Any

from finetune.training.parallel import Place

KINDS = ("auto", "fused", "products")
SHORT = 512  # tokens up to which `auto` takes products on a CPU


def attend(model: Any, kind: str, context: int, place: Place) -> None:
    """Have `model` (transformers') compute attention by `kind` of KINDS, for windows of `context`.

    The result is the same up to rounding.
    """
    if kind == "auto":
        kind = "products" if place.device.type == "cpu" and context <= SHORT else "fused"
    model.set_attn_implementation({"fused": "sdpa", "products": "eager"}[kind])
