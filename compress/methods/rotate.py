"""`rotate`: turn the residual stream by an orthogonal matrix; the model's function stays.

RMSNorm divides by a length, which a rotation Q leaves alone; only its gains stand in the way, so
they are folded into the layers that read the norm. Then x Q instead of x may flow from block to
block: what writes to the stream is multiplied by Q, what reads it by Q^T. LayerNorm also takes the
mean off, so for GPT-2 Q is drawn among the rotations that keep the vector of ones, and with it
every mean. Weights become mixtures of old ones, nearly Gaussian: large channels of the stream are
spread over all, and no grid that weights lay on is left. What attention and the MLP hold inside is
not turned. The head takes in the last norm and can be tied to the embedding no more, so the file
grows.

It compresses nothing by itself: what it writes is a plain model for another method to start from.

Source: S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section
4, https://arxiv.org/abs/2404.00456, for the stream; Q is uniformly random, no Hadamard matrix. The
gains are folded as in S. Ashkboos et al., "SliceGPT", 2024, https://arxiv.org/abs/2401.15024
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.base import Compressor, Progress, silent
from compress.dtypes import DTYPES, check_dtype
from compress.layers import cast_parameters, decoder_blocks, family
from compress.registry import register


@dataclass(frozen=True)
class Rotate(Compressor):
    """seed: of Q, uniform over all orthogonal matrices (Haar). dtype: of every parameter."""

    leaves: ClassVar[str] = "floats"

    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on an unknown dtype."""
        check_dtype(self.dtype)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Rotate `model` in place.

        Raises ValueError, before anything is changed, if a layer is compressed already or a
        parameter is not finite.
        """
        layout, blocks = family(model), decoder_blocks(model)
        refuse_unfit(model, blocks)
        last, head = model.get_submodule(layout.norm), model.get_output_embeddings()
        rotation = random_rotation(model.config.hidden_size, self.seed, bias_of(last) is not None)
        put(head, head_behind(last, head.weight.double()) @ rotation)
        model.config.tie_word_embeddings = False
        for name in layout.embeddings:
            embedding: Any = model.get_submodule(name)
            put(embedding, embedding.weight.double() @ rotation)
        for done, (_, block) in enumerate(blocks, start=1):
            for half in (layout.attention, layout.mlp):
                norm: Any = block.get_submodule(half.norm)
                shift = bias_of(norm)
                for name in half.inputs:
                    layer: Any = block.get_submodule(name)
                    weight = layer.weight.double()
                    if shift is not None:
                        layer.bias = parameter(layer.bias + weight @ shift.double())
                    put(layer, (weight * norm.weight.double()) @ rotation)
                put(norm, torch.ones_like(norm.weight))
                if shift is not None:
                    norm.bias = parameter(torch.zeros_like(shift))
                writer: Any = block.get_submodule(half.output)
                put(writer, rotation.T @ writer.weight.double())
                if writer.bias is not None:
                    writer.bias = parameter(writer.bias.double() @ rotation)
            progress(done, len(blocks))
        return cast_parameters(model, DTYPES[self.dtype])


def random_rotation(width: int, seed: int, keep_ones: bool = False) -> Tensor:
    """An orthogonal matrix (width, width) float64, uniform over all of them.

    keep_ones: over those that leave the vector of ones where it is.
    """
    free = width - keep_ones
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(free, free, dtype=torch.float64, generator=generator)
    rotation, triangle = torch.linalg.qr(noise)
    rotation *= triangle.diagonal().sign()  # else the draw would follow QR's convention
    if not keep_ones:
        return rotation
    # A reflection swaps the first axis and the direction of ones; what is free turns the rest.
    across = -torch.ones(width, dtype=torch.float64) / width**0.5
    across[0] += 1
    swap = torch.eye(width, dtype=torch.float64)
    swap -= 2 * torch.outer(across, across) / across.dot(across)
    one = torch.ones(1, 1, dtype=torch.float64)
    return swap @ torch.block_diag(one, rotation) @ swap


def refuse_unfit(model: Any, blocks: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError unless every linear layer is a plain one and every parameter is finite."""
    for name, values in model.named_parameters():
        if not values.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    layout = family(model)
    for name, block in blocks:
        for half in (layout.attention, layout.mlp):
            for layer in (*half.inputs, half.output):
                if not isinstance(block.get_submodule(layer), nn.Linear):
                    raise ValueError(f"{name}.{layer} is compressed already: rotate first")


def head_behind(norm: Any, head: Tensor) -> Tensor:
    """The weight that gives head @ norm(x) behind `norm` without its gains, (vocab, width) float64.

    A bias b of the norm needs a place, since a head has none: the norm's becomes 1, which Q keeps.
    Its other part sums to 0, so c 1^T / width more in the head adds c to the output alone.
    """
    gains, shift = norm.weight.double(), bias_of(norm)
    folded = head * gains
    if shift is not None:
        folded += (head @ (shift.double() - gains))[:, None] / len(gains)
        norm.bias = parameter(torch.ones_like(shift))
    put(norm, torch.ones_like(gains))
    return folded


def bias_of(norm: Any) -> Tensor | None:
    """A LayerNorm's; RMSNorm has none."""
    return getattr(norm, "bias", None)


def put(module: Any, weight: Tensor) -> None:
    """Give `module` a weight of its own."""
    module.weight = parameter(weight)


def parameter(values: Tensor) -> nn.Parameter:
    """float32, without gradients."""
    return nn.Parameter(values.float().contiguous(), False)


register("rotate", Rotate())
