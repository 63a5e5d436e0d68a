"""Where the linear layers of a decoder are: walk them, group them, make GPT-2's like Llama's.

GPT-2 and Llama blocks are two residual halves, x + module(norm(x)): attention, then the MLP.
In each half some linear layers read the half's input (q, k, v; gate, up) and one writes its
output (o; down). That is all a calibrated method needs to know of a model, and this file is
the only one that knows it. Another model family is one more entry in FAMILIES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SKIP = ("lm_head",)  # what every method leaves in floating point unless it is told otherwise


@dataclass(frozen=True)
class Half:
    """One residual half of a decoder block; all names are relative to the block.

    inputs: linear layers that read norm(x). output: the last linear layer of the half.
    before_output: the linear whose output channels reach `output` scaled one by one, so that a
    factor can move between the two exactly; None where a non-linearity stands between. parts: how
    many matrices each of `inputs` holds, one below the other.
    """

    norm: str
    module: str
    inputs: tuple[str, ...]
    output: str
    before_output: str | None
    parts: int = 1


@dataclass(frozen=True)
class Family:
    """The layout of one model type, by dotted names.

    blocks: the list of decoder blocks. embeddings: whose sum is the first block's input. norm: the
    last one, before the head.
    """

    blocks: str
    embeddings: tuple[str, ...]
    norm: str
    attention: Half
    mlp: Half


FAMILIES = {
    "llama": Family(
        "model.layers",
        ("model.embed_tokens",),
        "model.norm",
        Half(
            norm="input_layernorm",
            module="self_attn",
            inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output="self_attn.o_proj",
            before_output="self_attn.v_proj",
        ),
        Half(
            norm="post_attention_layernorm",
            module="mlp",
            inputs=("mlp.gate_proj", "mlp.up_proj"),
            output="mlp.down_proj",
            before_output="mlp.up_proj",
        ),
    ),
    "gpt2": Family(
        "transformer.h",
        ("transformer.wte", "transformer.wpe"),
        "transformer.ln_f",
        # Rows of c_attn are q, k, v. GELU stands between c_fc and mlp.c_proj.
        Half("ln_1", "attn", ("attn.c_attn",), "attn.c_proj", "attn.c_attn", parts=3),
        Half("ln_2", "mlp", ("mlp.c_fc",), "mlp.c_proj", None),
    ),
}


def family(model: nn.Module) -> Family:
    """The layout of `model`. Raises ValueError for a model type that is not in FAMILIES."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; known: {list(FAMILIES)}")
    return FAMILIES[model_type]


def model_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type that `model` computes in: that of its last norm."""
    return next(model.get_submodule(family(model).norm).parameters()).dtype


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, block) of every decoder block, first to last."""
    name = family(model).blocks
    return [
        (f"{name}.{index}", block) for index, block in model.get_submodule(name).named_children()
    ]


def named_linears(
    model: nn.Module, skip: tuple[str, ...] = SKIP
) -> Iterator[tuple[str, nn.Linear]]:
    """(dotted name, layer) of every nn.Linear whose name does not end in one of `skip`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(skip):
            yield name, module


def is_tied(config: dict[str, Any]) -> bool:
    """Whether a config.json means that the head is the embedding; GPT-2's leave it unsaid."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") == "gpt2"))


class LinearFromConv1D(nn.Linear):
    """A Linear that came from GPT-2's Conv1D: its weight is written transposed when saved."""


def linear_of(kind: type[nn.Linear], weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of `kind` that holds weight (out, in) and bias, neither to be trained."""
    made = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), False)
    return made


def conv1d_to_linear(model: nn.Module) -> nn.Module:
    """Replace every transformers Conv1D, weight (in, out), by a Linear, weight (out, in).

    Exact: y = x W + b either way. Works in place, also on the meta device, and returns `model`.
    """
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight = module.weight.detach().T.contiguous()
            model.set_submodule(name, linear_of(LinearFromConv1D, weight, module.bias))
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the parameters of `model` in place; buffers (codes, scales, rotary angles) stay.

    Every method ends here. Raises ValueError, naming it, if a parameter is not finite in `dtype`.
    """
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds NaN, or a number too large for {dtype}")
    return model


def replace_linears(
    model: nn.Module,
    skip: tuple[str, ...],
    make: Callable[[Tensor, Tensor | None], nn.Module],
    progress: Callable[[int, int], None],
) -> nn.Module:
    """Put make(weight, bias) where each Linear outside `skip` stands, one layer at a time.

    make gets the weight (out, in) as float32. Raises ValueError, naming the layer, if a weight is
    not finite or make refuses it, and if there is no layer.
    """
    refuse_no_effect(model, skip)
    linears = list(named_linears(model, skip))
    for done, (name, layer) in enumerate(linears, start=1):
        weight = named_finite(name, layer)
        try:
            model.set_submodule(name, make(weight, layer.bias))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        progress(done, len(linears))
    return model


def refuse_no_effect(model: nn.Module, skip: tuple[str, ...]) -> None:
    """Raises ValueError if `skip` leaves no Linear: such a method must not reach a table."""
    if not any(named_linears(model, skip)):
        raise ValueError(f"no Linear layer to compress outside skip={skip}")


def named_finite(name: str, layer: nn.Linear) -> Tensor:
    """The layer's weight as float32. Raises ValueError if it or the bias is not finite."""
    for part, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name}: the {part} holds NaN or infinity")
    return layer.weight.detach().float()
