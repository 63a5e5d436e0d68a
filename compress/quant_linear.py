"""Linear layers whose weights are stored as codes: what a compressed checkpoint is made of.

`QuantLinear` keeps its codes packed (4-bit is 4 bits in memory and on disk) and means exactly
scale * (code - zero). Few rows of input (decoding) are multiplied by the codes themselves, by the
kernel of kernels.py that is fastest for the layer's shape and grid; many rows (prefill,
evaluation), and every grid that no kernel takes, go through the reference path: rebuild the weight
piece by piece, then a plain matrix product.
"""

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress import int4_layout
from compress.compiled import Matrix
from compress.dtypes import dtype_of, whole
from compress.kernel_choice import kernel_for
from compress.kernels import FOR_WEIGHTS, Kernel, matmul_nt
from compress.quant_math import BITS, pack, packed_bytes, unpack

GRID = ("bits", "group_size", "in_features")


class QuantLinear(nn.Module):
    """y = x W^T + bias with W = scale * (code - zero), or scale * code + offset.

    codes: pack()ed (out, bytes). scale: (out or 1, groups). zero: pack()ed (out or 1, bytes), or
    None for symmetric codes. bias: (out,) or None. order: (in,) int32 or None; code column j
    belongs to input order[j] (GPTQ's act-order without static groups). offset: like scale, or None;
    where it is given there is no zero, not even the symmetric one (GGUF's Q4_1).
    """

    kind = "quant"
    candidates: tuple[Kernel, ...] = FOR_WEIGHTS
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    order: Tensor | None
    offset: Tensor | None
    int4: tuple[int, Tensor, Tensor | None] | None  # this and the following: see as_stored
    int8: tuple[Tensor, Tensor | None] | None
    pairs: Tensor | None
    structs: dict[bool, Matrix]
    chosen: dict[torch.dtype, tuple[Kernel, Kernel]]

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        in_features: int,
        order: Tensor | None = None,
        offset: Tensor | None = None,
    ):
        super().__init__()
        self.bits, self.group_size, self.in_features = bits, group_size, in_features
        self.out_features = codes.shape[0]
        for name, tensor in dict(codes=codes, scale=scale, zero=zero, bias=bias).items():
            self.register_buffer(name, tensor)
        self.register_buffer("order", order)
        self.register_buffer("offset", offset)
        self.int4 = None
        self.as_stored()

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        order: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        offset: Tensor | None = None,
    ) -> Self:
        """Pack unsigned codes (out, in) with scale and zero (out or 1, groups); zero None = middle.

        Scale, offset and bias are stored in `dtype`. Raises ValueError if a scale or an offset is
        not finite, or an offset stands beside a zero.
        """
        if not all(part.isfinite().all() for part in (scale, offset) if part is not None):
            raise ValueError("the scale holds NaN or infinity")
        if offset is not None and zero is not None:
            raise ValueError("a layer has zeros or offsets, not both")
        columns = codes.shape[1]
        size = columns if group_size == -1 else min(group_size, columns)
        return cls(
            pack(codes, bits),
            scale.to(dtype).contiguous(),
            None if zero is None else pack(zero, bits),
            None if bias is None else bias.detach().to(dtype),
            bits,
            size,
            columns,
            None if order is None else order.to(torch.int32),
            None if offset is None else offset.to(dtype).contiguous(),
        )

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to build the same empty layer: JSON values only."""
        return {
            "kind": self.kind,
            **{name: getattr(self, name) for name in (*GRID, "out_features")},
            "scale_rows": self.scale.shape[0],
            "symmetric": self.zero is None,
            **{name: getattr(self, name) is not None for name in ("bias", "order", "offset")},
            "dtype": str(self.scale.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """An empty layer on the meta device. Raises ValueError on a spec that makes no sense."""
        bits, columns, rows = (whole(spec, k) for k in ("bits", "in_features", "out_features"))
        size, scale_rows = whole(spec, "group_size"), whole(spec, "scale_rows")
        if bits not in BITS or size > columns or scale_rows not in (1, rows):
            raise ValueError(f"not a layer: {spec}")
        if spec.get("offset") and not spec.get("symmetric"):
            raise ValueError(f"a layer has zeros or offsets, not both: {spec}")
        groups, dtype = -(-columns // size), dtype_of(spec)
        code_type = torch.int8 if bits == 8 else torch.uint8
        empty = partial(torch.empty, device="meta")
        return cls(
            empty(rows, packed_bytes(columns, bits), dtype=code_type),
            empty(scale_rows, groups, dtype=dtype),
            None
            if spec.get("symmetric")
            else empty(scale_rows, packed_bytes(groups, bits), dtype=code_type),
            empty(rows, dtype=dtype) if spec.get("bias") else None,
            bits,
            size,
            columns,
            empty(columns, dtype=torch.int32) if spec.get("order") else None,
            empty(scale_rows, groups, dtype=dtype) if spec.get("offset") else None,
        )

    def codes_and_zero(self) -> tuple[Tensor, Tensor]:
        """Unsigned codes (out, in) and zero (out or 1, groups), both uint8."""
        if self.int4 is None:
            codes = unpack(self.codes, self.bits, self.in_features)
        else:
            codes = int4_layout.unpack(self.codes, 0, self.out_features).T - self._raised()
        return codes, self.zeros()

    def zeros(self) -> Tensor:
        """Zero (out or 1, groups), uint8: the middle of a symmetric grid, 0 beside offsets."""
        if self.zero is not None:
            return unpack(self.zero, self.bits, self.scale.shape[1])
        zero = 0 if self.offset is not None else 2 ** (self.bits - 1)
        return torch.full_like(self.scale, zero, dtype=torch.uint8)

    def hold_int4(self) -> None:
        """Hold the codes as the int4 kernel wants them, instead of the file's way.

        Codes of 2 and 3 bits are raised, so that the middle is 8 for all. Kernels that were chosen
        for the other way, for another type of input, are forgotten.
        """
        self.chosen.clear()
        self.codes = int4_layout.pack(self.codes_and_zero()[0] + self._raise())

    def _raise(self) -> int:
        return 8 - 2 ** (self.bits - 1)

    def _raised(self) -> int:
        return 0 if self.int4 is None else self._raise()

    def twin(self) -> Self:
        """Another layer over the same tensors, as it comes from a file."""
        rest = self.bits, self.group_size, self.in_features, self.order, self.offset
        codes = self.state_dict()["codes"]
        return type(self)(codes, self.scale, self.zero, self.bias, *rest)

    def per_row(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scale, zero (also where it is the middle) and offset (0 for none), a row each."""
        zero = pack(self.zeros(), self.bits)
        offset = torch.zeros_like(self.scale) if self.offset is None else self.offset
        scale, zero, offset = (x.expand(self.out_features, -1) for x in (self.scale, zero, offset))
        return self.state_dict()["codes"], scale, zero, offset

    def look_into(self, joined: "QuantLinear", start: int) -> None:
        """Hold no codes any more but rows `start` and following of `joined`, which has the same."""
        rows = slice(start, start + self.out_features)
        self.codes, self.int4 = int4_layout.part(joined.codes, start, self.out_features), None
        self.as_stored()
        if joined.int4 is not None:
            size, grid, shift = joined.int4
            self.int4 = size, grid[:, rows], None if shift is None else shift[:, rows]
        self.pairs = None if joined.pairs is None else joined.pairs[rows]

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of the rebuilt weight, (n, in) for numbers (n,) int64, in the scale's type."""
        parts = (self.scale, self.zero, self.offset)
        one = len(self.scale) == 1
        scale, zero, offset = (x if x is None or one else x[numbers] for x in parts)
        if self.int4 is None:
            codes = self.codes[numbers]
        else:
            codes = pack(int4_layout.rows(self.codes, numbers) - self._raised(), self.bits)
        assert scale is not None
        size, columns, order = self.group_size, self.in_features, self.order
        picked = QuantLinear(codes, scale, zero, None, self.bits, size, columns, order, offset)
        return picked.weight()

    def as_stored(self) -> None:
        """Forget what kernels have prepared and measured; see kernels.py and compiled.py."""
        if self.int4 is not None:
            self.codes, self.int4 = self.state_dict()["codes"], None
        self.int8, self.pairs, self.structs, self.chosen = None, None, {}, {}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.as_stored()  # it was prepared for this type and device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.as_stored()
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.int4 is not None:
            destination[f"{prefix}codes"] = pack(self.codes_and_zero()[0], self.bits)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The rebuilt weight (out, in), in the scale's type or `dtype`.

        code - zero is a whole number below 256 and so exact in every type; one rounding follows.
        """
        values = self._rebuilt(0, self.out_features, dtype or self.scale.dtype).T.contiguous()
        return values if self.order is None else values[:, torch.argsort(self.order)]

    def multiply_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x W^T for rows start to stop of W alone: (n, in) -> (n, stop - start).

        x: in the order of the codes; its type is that of the arithmetic. One scale a row goes into
        the output instead of the weight: fewer numbers, unless x has more rows than columns.
        """
        rows = slice(None) if len(self.scale) == 1 else slice(start, stop)
        if self.scale.shape[1] == 1 and self.offset is None and len(x) < self.in_features:
            y = matmul_nt(x, self._steps(start, stop, x.dtype).T)
            return y.mul_(self.scale[rows, 0].to(x.dtype))
        return matmul_nt(x, self._rebuilt(start, stop, x.dtype).T)

    def _rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, transposed: (in, stop - start), inputs in the order of the codes."""
        values = self._by_groups(self._steps(start, stop, dtype), self.scale, "mul", start, stop)
        if self.offset is not None:
            values = self._by_groups(values, self.offset, "add", start, stop)
        return values

    def _steps(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """code - zero of rows start to stop, (in, stop - start) in `dtype`."""
        if self.int4 is not None:
            codes = int4_layout.unpack(self.codes, start, stop)
        elif self.bits == 8 and self.zero is None and self.offset is None:
            return self.codes[start:stop].to(dtype).T  # stored minus 128, the symmetric zero
        else:
            codes = unpack(self.codes[start:stop], self.bits, self.in_features).T
        values = codes.to(dtype)
        if self.offset is not None:
            return values
        if self.zero is None:
            return values.sub_(2 ** (self.bits - 1) + self._raised())
        rows = slice(None) if len(self.zero) == 1 else slice(start, stop)
        zero = unpack(self.zero[rows], self.bits, self.scale.shape[1]) + self._raised()
        return self._by_groups(values, zero, "sub", 0, stop - start)

    def _by_groups(self, values: Tensor, each: Tensor, what: str, start: int, stop: int) -> Tensor:
        """Add, subtract or multiply, in place, one number a group into values (in, rows)."""
        each = (each if len(each) == 1 else each[start:stop]).to(values.dtype).T  # (groups, rows)
        act = getattr(Tensor, f"{what}_")
        groups, whole = len(each), self.in_features // self.group_size
        if whole:
            act(values[: whole * self.group_size].unflatten(0, (whole, -1)), each[:whole, None])
        if groups > whole:
            act(values[whole * self.group_size :], each[whole:])
        return values

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the type of x."""
        flat = x.reshape(-1, self.in_features)
        y = kernel_for(self, len(flat), x.dtype).multiply(self, flat)
        if self.bias is not None:
            y += self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def kernel(self, rows: int, dtype: torch.dtype) -> str:
        """Which arithmetic `forward` uses for so many input rows: a name for records."""
        return kernel_for(self, rows, dtype).name

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        shape = f"{self.in_features} -> {self.out_features}"
        return f"{shape}, {self.bits} bits, groups of {self.group_size}"
