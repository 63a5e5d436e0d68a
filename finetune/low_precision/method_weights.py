"""Weights as a registered compression method will store them: `method:rtn(bits=4)`.

The method's own data-free `quantize(weight, bias)` makes the compressed layer and that layer
rebuilds its weight, in every forward pass. Nothing is imitated: what training saw is, bit for bit,
what `compress.apply` with the same settings writes after it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import compress

PREFIX = "method:"


@dataclass(frozen=True)
class MethodQuantizer:
    """method: as a person writes it. rebuild: (out, in) -> the weight that the method stores.

    The scales have the type of the method's setting `dtype` (bfloat16 unless it is given), as in
    the artefact. skip: the layers that the method leaves alone.
    """

    method: str
    skip: tuple[str, ...]
    rebuild: Callable[[Tensor], Tensor] = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> "MethodQuantizer":
        """Read `method:NAME(setting=value, ...)`.

        Raises ValueError for an unknown name or setting, and for a method that cannot quantize
        one weight on its own (it needs calibration data, or changes the type only).
        """
        name, settings = compress.parse(text.strip().removeprefix(PREFIX))
        method: Any = compress.get(name, **settings)
        if not hasattr(method, "quantize"):
            known = ", ".join(n for n in compress.names() if hasattr(compress.get(n), "quantize"))
            raise ValueError(
                f"method {name!r} does not quantize a weight without data, which training does at "
                f"every step; methods that do: {known}"
            )

        # Not compiled: the compiler keeps in float32 the scales that a method rounds to bfloat16.
        @torch.compiler.disable
        def rebuild(weight: Tensor) -> Tensor:
            rebuilt = method.quantize(weight.detach().float(), None).weight
            if callable(rebuilt):  # from codes; a layer of another type holds it as a tensor
                return rebuilt(weight.dtype)
            return rebuilt.to(weight.dtype)

        return cls(compress.describe(name, settings), tuple(getattr(method, "skip", ())), rebuild)

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return PREFIX + self.method

    def __call__(self, weight: Tensor) -> Tensor:
        """(out, in) -> the weight as the compressed layer rebuilds it in the type of `weight`.

        Raises ValueError if a weight is not finite.
        """
        return self.rebuild(weight)

    def quantize(self, values: Tensor, mark: bool = False) -> tuple[Tensor, Tensor | None]:
        """See Quantizer.quantize; what a method cuts off is not marked."""
        return self(values), None
