"""Weights as a registered compression method will store them: `method:rtn(bits=4)`.

The method's own data-free `quantize(weight, bias)` makes the compressed layer and that layer
rebuilds its weight, in every forward pass. Nothing is imitated: what training saw is, bit for bit,
what `compress.apply` with the same settings writes after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import compress
from compress.base import Compressor

PREFIX = "method:"


@dataclass(frozen=True)
class MethodQuantizer:
    """method: as a person writes it. compressor: the registered value with its settings.

    The scales have the type of the method's setting `dtype` (bfloat16 unless it is given), as in
    the artefact.
    """

    method: str
    compressor: Compressor

    @classmethod
    def parse(cls, text: str) -> "MethodQuantizer":
        """Read `method:NAME(setting=value, ...)`.

        Raises ValueError for an unknown name or setting, and for a method that cannot quantize
        one weight on its own (it needs calibration data, or changes the type only).
        """
        name, settings = compress.parse(text.strip().removeprefix(PREFIX))
        compressor = compress.get(name, **settings)
        if data_free(compressor) is None:
            known = ", ".join(n for n in compress.names() if data_free(compress.get(n)) is not None)
            raise ValueError(
                f"method {name!r} does not quantize a weight without data, which training does at "
                f"every step; methods that do: {known}"
            )
        return cls(compress.describe(name, settings), compressor)

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return PREFIX + self.method

    def __call__(self, weight: Tensor) -> Tensor:
        """(out, in) -> the weight as the compressed layer rebuilds it in the type of `weight`.

        Raises ValueError if a weight is not finite.
        """
        quantize = data_free(self.compressor)
        assert quantize is not None  # parse has seen to it
        rebuilt = quantize(weight.detach().float(), None).weight
        if callable(rebuilt):  # codes; a layer that only stores another type has it as a tensor
            return rebuilt(weight.dtype)
        return rebuilt.to(weight.dtype)

    def quantize(self, values: Tensor, mark: bool = False) -> tuple[Tensor, Tensor | None]:
        """See Quantizer.quantize; what a method cuts off is not marked."""
        return self(values), None


def data_free(compressor: Compressor) -> Callable[[Tensor, Tensor | None], Any] | None:
    """The method's `quantize(weight, bias)`, if it has one."""
    return getattr(compressor, "quantize", None)
