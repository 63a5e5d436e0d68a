"""Values of a layer's spec: the floating-point types that artefacts may use, and whole numbers."""

from typing import Any

import torch

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def check_dtype(name: str) -> None:
    """Raises ValueError unless `name` is a floating-point type that artefacts may use."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")


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
