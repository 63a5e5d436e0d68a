"""`rotate`: turn the residual stream by an orthogonal matrix; the model's function stays.

RMSNorm divides by a length, which a rotation leaves alone; only its gains stand in the way, so they
are folded into the layers that read the norm. Then x Q instead of x may flow from block to block:
what writes to the stream is multiplied by Q, what reads it by Q^T. LayerNorm also takes the mean
off, so for GPT-2 Q is drawn among the rotations that keep the vector of ones, and with it every
mean. Each new weight is a mixture of old ones, nearly Gaussian: large channels are spread over all,
and no grid that the weights lay on is left. The head takes in the last norm's gains and can be tied
to the embedding no more, so the file grows by it.

It compresses nothing by itself: what it writes is a plain model for another method to start from.

Source: S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section
4, https://arxiv.org/abs/2404.00456; the folding of the gains: S. Ashkboos et al., "SliceGPT", 2024,
https://arxiv.org/abs/2401.15024
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.base import Compressor, Progress, silent
from compress.layers import cast_parameters, decoder_blocks, family, named_finite
from compress.quant_linear import DTYPES, check_dtype
from compress.registry import register


@dataclass(frozen=True)
class Rotate(Compressor):
    """seed: of the rotation, drawn evenly from all. dtype: of every parameter."""

    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError on an unknown dtype."""
        check_dtype(self.dtype)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> nn.Module:
        """Rotate `model` in place. Raises ValueError if a weight is not finite."""
        layout, blocks = family(model), decoder_blocks(model)
        last, head = model.get_submodule(layout.norm), model.get_output_embeddings()
        turn = rotation(model.config.hidden_size, self.seed, keep_ones=_bias(last) is not None)
        gains = last.weight.double()
        _put(head, (named_finite("lm_head", head).double() * gains) @ turn)
        if _bias(last) is not None:  # a head has no bias to take it in
            last.bias = _parameter((last.bias.double() / gains) @ turn)
        _put(last, torch.ones_like(gains))
        model.config.tie_word_embeddings = False
        for name in layout.embeddings:
            embedding: Any = model.get_submodule(name)
            _put(embedding, embedding.weight.double() @ turn)
        for done, (block_name, block) in enumerate(blocks, start=1):
            for half in (layout.attention, layout.mlp):
                norm: Any = block.get_submodule(half.norm)
                for name in half.inputs:
                    layer: Any = block.get_submodule(name)
                    weight = named_finite(f"{block_name}.{name}", layer).double()
                    if _bias(norm) is not None:
                        layer.bias = _parameter(layer.bias + weight @ norm.bias.double())
                    _put(layer, (weight * norm.weight.double()) @ turn)
                _put(norm, torch.ones_like(norm.weight))
                if _bias(norm) is not None:
                    norm.bias = _parameter(torch.zeros_like(norm.bias))
                writer: Any = block.get_submodule(half.output)
                weight = named_finite(f"{block_name}.{half.output}", writer).double()
                _put(writer, turn.T @ weight)
                if writer.bias is not None:
                    writer.bias = _parameter(writer.bias.double() @ turn)
            progress(done, len(blocks))
        return cast_parameters(model, DTYPES[self.dtype])


def rotation(width: int, seed: int, keep_ones: bool = False) -> Tensor:
    """An orthogonal matrix (width, width) float64, drawn evenly from all of them.

    keep_ones: from those that leave the vector of ones where it is.
    """
    free = width - keep_ones
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(free, free, dtype=torch.float64, generator=generator)
    turn, triangle = torch.linalg.qr(noise)
    turn *= triangle.diagonal().sign()  # without the signs, the draw would follow QR's convention
    if not keep_ones:
        return turn
    # A reflection swaps the first axis and the direction of ones; what is free turns the rest.
    axis = torch.zeros(width, dtype=torch.float64)
    axis[0] = 1
    across = axis - torch.ones(width, dtype=torch.float64) / width**0.5
    swap = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(across, across) / across.dot(
        across
    )
    return swap @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), turn) @ swap


def _bias(norm: Any) -> Tensor | None:
    return getattr(norm, "bias", None)


def _put(module: Any, weight: Tensor) -> None:
    module.weight = _parameter(weight)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float().contiguous(), False)


register("rotate", Rotate())
