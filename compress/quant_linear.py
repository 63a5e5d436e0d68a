"""Linear layers whose weights are stored as codes: what a compressed checkpoint is made of.

`QuantLinear` keeps its codes packed (4-bit is 4 bits in memory and on disk) and means exactly
scale * (code - zero). Few rows of input (decoding) go through torch's own int4 / int8 kernels
where the layer's shape and grid fit them; many rows (prefill, evaluation), and every grid that
no kernel takes, go through the reference path: rebuild the weight, then one plain matrix product.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quant_math import BITS, pack, packed_bytes, unpack

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
FEW_ROWS = 16  # below it torch's weight-only kernels win over rebuilding the weight
ALIGNMENT = 64  # bytes; what torch's allocator gives, and a memory-mapped file does not
INT4_GROUPS = (32, 64, 128, 256)  # what _weight_int4pack_mm_for_cpu takes; it does not check


def check_dtype(name: str) -> None:
    """Raises ValueError unless `name` is a floating-point type that artefacts may use."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")


class QuantLinear(nn.Module):
    """y = x W^T + bias with W = scale * (code - zero), or scale * code + offset.

    codes: pack()ed (out, bytes). scale: (out or 1, groups). zero: pack()ed (out or 1, bytes), or
    None for symmetric codes. bias: (out,) or None. order: (in,) int32 or None; code column j
    belongs to input order[j] (GPTQ's act-order without static groups). offset: like scale, or None;
    where it is given there is no zero, not even the symmetric one (GGUF's Q4_1).
    """

    kind = "quant"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    order: Tensor | None
    offset: Tensor | None

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
        self._int4: tuple[Tensor, Tensor, Tensor | None] | None = None

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
            "bits": self.bits,
            "group_size": self.group_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "scale_rows": self.scale.shape[0],
            "symmetric": self.zero is None,
            "bias": self.bias is not None,
            "order": self.order is not None,
            "offset": self.offset is not None,
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

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

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
        codes = unpack(self.codes, self.bits, self.in_features)
        if self.zero is None:
            zero = 0 if self.offset is not None else 2 ** (self.bits - 1)
            return codes, torch.full_like(self.scale, zero, dtype=torch.uint8)
        return codes, unpack(self.zero, self.bits, self.scale.shape[1])

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The rebuilt weight (out, in), in the scale's type or `dtype`.

        code - zero is a whole number below 256 and so exact in every type; one rounding follows.
        """
        dtype = dtype or self.scale.dtype
        return self._weight(dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of the rebuilt weight, (n, in) for numbers (n,) int64, in the scale's type."""
        scale, zero, offset = (
            part if part is None or len(self.scale) == 1 else part[numbers]
            for part in (self.scale, self.zero, self.offset)
        )
        assert scale is not None
        size, columns, order = self.group_size, self.in_features, self.order
        codes = self.codes[numbers]
        part = QuantLinear(codes, scale, zero, None, self.bits, size, columns, order, offset)
        return part.weight()

    def _weight(self, dtype: torch.dtype) -> Tensor:
        values, scale = self._steps(dtype), self.scale.to(dtype)
        groups = scale.shape[1]
        if groups == 1:
            values = values.mul_(scale)
        elif groups * self.group_size == self.in_features:
            values.view(-1, groups, self.group_size).mul_(scale[..., None])
        else:
            values = values.mul_(self._per_column(scale))
        if self.offset is not None:
            values = values.add_(self._per_column(self.offset.to(dtype)))
        if self.order is not None:
            values = values[:, torch.argsort(self.order)]
        return values

    def _steps(self, dtype: torch.dtype) -> Tensor:
        """code - zero, (out, in) in `dtype`, in the order of the codes."""
        if self.bits == 8 and self.zero is None and self.offset is None:
            return self.codes.to(dtype)  # stored minus 128, which is the symmetric zero
        codes, zero = self.codes_and_zero()
        values, zero = codes.to(dtype), zero.to(dtype)
        groups = zero.shape[1]
        if self.offset is not None:
            return values
        if self.zero is None:
            return values.sub_(2 ** (self.bits - 1))
        if groups * self.group_size == self.in_features:
            values.view(-1, groups, self.group_size).sub_(zero[..., None])
            return values
        return values.sub_(self._per_column(zero))

    def _per_column(self, per_group: Tensor) -> Tensor:
        """(rows, groups) -> (rows, in) where the last group is short."""
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the type of x."""
        kernel = self.kernel(x.numel() // self.in_features, x.dtype)
        if kernel == "int4pack":
            y = self._int4_forward(x)
        elif kernel == "int8pack":
            scale = self.scale[:, 0].expand(self.out_features).to(x.dtype)
            flat = x.reshape(-1, self.in_features).contiguous()
            y = torch.ops.aten._weight_int8pack_mm(flat, self.codes, scale.contiguous())
            y = y.view(*x.shape[:-1], -1)
        elif self._scales_output(x):
            y = F.linear(x, self._steps(x.dtype)) * self.scale[:, 0].to(x.dtype)
        else:
            y = F.linear(x, self.weight(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _scales_output(self, x: Tensor) -> bool:
        """Whether one scale a row is better multiplied into the output than into the weight.

        It is while x has fewer rows than columns; but unscaled sums leave the range of float16.
        """
        fewer = x.numel() < self.in_features**2 and x.dtype != torch.float16
        plain = self.order is None and self.offset is None
        return fewer and self.scale.shape[1] == 1 and plain

    def kernel(self, rows: int, dtype: torch.dtype) -> str:
        """Which arithmetic `forward` uses for so many input rows: a name for records."""
        fits = rows < FEW_ROWS and dtype == torch.bfloat16 and self.codes.device.type == "cpu"
        if fits and self.order is None and self.offset is None:
            divides = self.in_features % self.group_size == 0
            shape = self.group_size in INT4_GROUPS and divides and self.out_features % 16 == 0
            if self.bits == 4 and shape and self.scale.shape[0] == self.out_features:
                return "int4pack"
            # Unchecked by the kernel: it reads 16 codes at a time, with aligned loads.
            aligned = self.in_features % 16 == 0 and self.codes.data_ptr() % ALIGNMENT == 0
            if self.bits == 8 and self.zero is None and self.scale.shape[1] == 1 and aligned:
                return "int8pack"
        return "rebuild"

    def _int4_forward(self, x: Tensor) -> Tensor:
        """torch's kernel computes (code - 8) * scale + offset; our zero is added apart.

        The kernel's own offset is rounded to bfloat16 and would shift the weights, so it stays 0
        and the exact term sum over a group of x, times scale * (8 - zero), is added in float32.
        The packed copy (half a byte a weight) is made on the first call.
        """
        if self._int4 is None:
            codes, zero = self.codes_and_zero()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
            scale = self.scale.to(torch.bfloat16)
            both = torch.stack([scale, torch.zeros_like(scale)], dim=-1)  # (out, groups, 2)
            offset = None if self.zero is None else (8 - zero.float()).mul_(self.scale.float()).T
            self._int4 = packed, both.transpose(0, 1).contiguous(), offset
        packed, scale_and_offset, offset = self._int4
        flat = x.reshape(-1, self.in_features).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, packed, self.group_size, scale_and_offset
        )
        if offset is not None:
            sums = flat.view(len(flat), -1, self.group_size).sum(-1, dtype=torch.float32)
            y = (y.float() + sums @ offset).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        shape = f"{self.in_features} -> {self.out_features}"
        return f"{shape}, {self.bits} bits, groups of {self.group_size}"


def whole(spec: dict[str, Any], key: str) -> int:
    """A positive whole number of a spec. Raises ValueError if it is anything else."""
    value = spec.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{key} must be a positive whole number, not {value!r}")
    return value


def dtype_of(spec: dict[str, Any], key: str = "dtype") -> torch.dtype:
    """A floating-point type of a spec. Raises ValueError if it is anything else."""
    name = spec.get(key)
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{key} must be one of {list(DTYPES)}, not {name!r}")
    return DTYPES[name]
