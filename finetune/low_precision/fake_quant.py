"""Train as if in low precision: linear layers whose numbers are rounded on the way.

    fake_quantize_linears(model, weights="fp8_e4m3", activations="fp8_e4m3", gradients="fp8_e5m2")
    ...                                      # train
    remove(model)

Each chosen layer rounds its weight and its input in the forward pass and the gradient of its
output in the backward pass, and multiplies the rounded numbers in the usual type: the error of
the format is there, its speed is not. Parameters keep full precision, their names and their
identity, so that optimizers, DDP, FSDP2, peft and checkpoints see the model that they know.

Rounding has a gradient of 0 almost everywhere; the straight-through estimator takes it as 1.
A saturated activation passes no gradient on: moving it a little would change nothing. A saturated
weight passes it: scales follow their values, so it lies within a factor of two of the range, and
without a gradient it could never come back. (Only power-of-two scales and posits saturate.)

With `weights="method:rtn(bits=4)"` the weight is rounded by that compression method itself: train,
`remove`, then `compress.apply("rtn", model, bits=4)` loses nothing more. This holds while the
layer sees the parameter that is saved: not under FSDP2's param_dtype (use autocast instead), and
not under a LoRA update, which is added beside the rounded weight.

Source: Y. Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
Conditional Computation", 2013, https://arxiv.org/abs/1308.3432
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.layers import SKIP
from finetune.low_precision.method_weights import PREFIX, MethodQuantizer
from finetune.low_precision.scaling import Quantizer

# What peft puts into the name of a layer that it wraps; and the parts that it adds.
WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.|$)")
ADAPTER = re.compile(r"(^|\.)lora_\w+(\.|$)")


class FakeQuant(torch.autograd.Function):
    """Forward: quantized and rebuilt. Backward: straight through."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, quantizer: Quantizer | MethodQuantizer, clipped: bool
    ) -> Tensor:
        """clipped: pass no gradient where a value was saturated."""
        rebuilt, inside = quantizer.quantize(values, mark=clipped and ctx.needs_input_grad[0])
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return rebuilt

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient as it comes, without what was saturated if so asked."""
        gradient = gradients[0]
        for inside in ctx.saved_tensors:
            gradient = gradient * inside
        return gradient, None, None


class RoundGradient(torch.autograd.Function):
    """Forward: nothing. Backward: the gradient, quantized and rebuilt."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, quantizer: Quantizer) -> Tensor:
        """`values` as they are; a copy, since FSDP2 warns of modules that return a view."""
        ctx.quantizer = quantizer
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The rounded gradient."""
        return ctx.quantizer(gradients[0]), None


@dataclass(frozen=True)
class Rounding:
    """What a layer rounds, and how; None for what it leaves alone."""

    weights: Quantizer | MethodQuantizer | None
    activations: Quantizer | None
    gradients: Quantizer | None


class FakeQuantLinear(nn.Module):
    """The part of a fake-quantized layer's class that stands before its plain class."""

    plain: type[nn.Module]  # of the class: what the layer was, and will be
    rounding: Rounding  # of the layer
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). The bias is added apart, as compressed layers do it.

        Rows of the weight that share scales are output channels: (out, in), contiguous, is also
        how a compressed layer holds it, so that both multiply alike.
        """
        rounding = self.rounding
        linear = isinstance(self, nn.Linear)  # else Conv1D, whose weight is (in, out)
        weight = self.weight if linear else self.weight.T.contiguous()
        if rounding.weights is not None:
            weight = FakeQuant.apply(weight, rounding.weights, False)
        if rounding.activations is not None:
            x = FakeQuant.apply(x, rounding.activations, True)
        y = F.linear(x, weight)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if rounding.gradients is not None:
            y = RoundGradient.apply(y, rounding.gradients)
        return y

    def __repr__(self) -> str:
        """Shown when a model is printed."""
        parts = ("weights", "activations", "gradients")
        used = ((part, getattr(self.rounding, part)) for part in parts)
        text = ", ".join(f"{part}={value}" for part, value in used if value is not None)
        return f"FakeQuant({super().__repr__()}, {text})"


def fake_quantize_linears(
    model: nn.Module,
    weights: str | None = None,
    activations: str | None = None,
    gradients: str | None = None,
    skip: tuple[str, ...] = SKIP,
) -> list[str]:
    """Make the linear layers of `model` round, in place; returns the names of those that do.

    weights, activations, gradients: FORMAT[:tensor|row|blockN][:pow2] or None; weights also
    method:NAME(setting=value, ...). gradients are those of the layers' outputs. skip: layers
    whose dotted name ends in one of these stay as they are; so do the parts that LoRA adds.

    Raises ValueError for a text that cannot be read, if nothing is to be rounded or no layer is
    left to do it, and for a layer that rounds already or computes in a way of its own.
    """
    rounding = Rounding(
        _read_weights(weights, skip),
        None if activations is None else _read("activations", activations),
        None if gradients is None else _read("gradients", gradients),
    )
    if rounding == Rounding(None, None, None):
        raise ValueError("nothing to round; give a format for weights, activations or gradients")
    layers = _linears(model, skip)
    for layer in layers.values():
        # A class of our own before the layer's: hooks, parameters and isinstance stay as they are.
        layer.__class__ = _fake_class(type(layer))  # type: ignore[arg-type]
        layer.rounding = rounding  # type: ignore[assignment]
    return list(layers)


def remove(model: nn.Module) -> list[str]:
    """Undo `fake_quantize_linears`: plain layers again, in place; returns their names.

    Raises ValueError if no layer rounds, or if another library has since put a class of its own
    before ours (FSDP2 does, to a layer that is given to fully_shard by itself).
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    if not layers:
        raise ValueError("no fake-quantized layer to remove")
    for name, layer in layers.items():
        if "plain" not in vars(type(layer)):
            raise ValueError(f"{name} is a {type(layer).__name__}; undo what was applied to it")
    for layer in layers.values():
        del layer.rounding
        layer.__class__ = type(layer).plain  # type: ignore[assignment]
    return list(layers)


@functools.cache
def _fake_class(plain: type[nn.Module]) -> type[FakeQuantLinear]:
    """The class that rounds and is otherwise `plain`."""
    return type(f"FakeQuant{plain.__name__}", (FakeQuantLinear, plain), {"plain": plain})


def _linears(model: nn.Module, skip: tuple[str, ...]) -> dict[str, nn.Module]:
    """Dotted name -> layer that is to round. Raises ValueError if one is unfit or there is none."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or ADAPTER.search(name):
            continue
        if WRAPPERS.sub("", name).endswith(skip):
            continue
        if isinstance(module, FakeQuantLinear):
            raise ValueError(f"{name} is fake-quantized already; call remove(model) first")
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
            raise ValueError(
                f"{name}: {type(module).__name__} computes in a way of its own; add it to skip"
            )
        found[name] = module
    if not found:
        raise ValueError(f"no linear layer to fake-quantize outside skip={skip}")
    return found


def _read_weights(text: str | None, skip: tuple[str, ...]) -> Quantizer | MethodQuantizer | None:
    """The quantizer of `weights`; a method must skip the layers that we skip."""
    if text is None or not text.strip().startswith(PREFIX):
        return None if text is None else _read("weights", text)
    method = MethodQuantizer.parse(text)
    if set(method.skip) != set(skip):
        own, ours = list(method.skip), list(skip)
        raise ValueError(f"{text} skips {own} but training skips {ours}; make both the same")
    return method


def _read(name: str, text: str) -> Quantizer:
    """Quantizer.parse with the name of the setting in its message."""
    if text.strip().startswith(PREFIX):
        raise ValueError(f"{name}: {text!r} is for weights only; give a number format")
    try:
        return Quantizer.parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
