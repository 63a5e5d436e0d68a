"""The C functions of native/token.c, called with tensors: for tests of single ones."""

import ctypes

import torch

from compress import compiled

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "add_norm": [POINTER] * 5 + [LONG] * 2 + [FLOAT, INT],
    "gate": [POINTER] * 2 + [LONG] * 2 + [INT],
    "gelu": [POINTER] * 2 + [LONG, INT],
    "attend": [POINTER] * 5 + [LONG] * 6 + [FLOAT, INT],
}


def call(name, *arguments):
    """Call it, tensors as pointers, with bfloat16 or not from the first one; must answer 0."""
    function = getattr(compiled.loaded(), name)
    function.argtypes = ARGUMENTS[name]
    function.restype = INT if name == "attend" else None
    assert all(not isinstance(each, torch.Tensor) or each.is_contiguous() for each in arguments)
    plain = (each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments)
    assert not function(*plain, arguments[0].dtype == torch.bfloat16)


def add_norm(x, delta, norm):
    """x += delta in place, then its norm: (..., width) -> the same."""
    y, width = torch.empty_like(x), x.shape[-1]
    bias = getattr(norm, "bias", None)
    call("add_norm", x, delta, norm.weight, bias, y, x.numel() // width, width, norm.eps)
    return y


def gate(x):
    """silu(gate) * up of the two halves of (..., 2 * inner): (..., inner)."""
    inner = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], inner)
    call("gate", x, y, y.numel() // inner, inner)
    return y


def gelu(x):
    """GELU by tanh, of any shape."""
    y = torch.empty_like(x)
    call("gelu", x, y, x.numel())
    return y


def attend(heads, key_heads, scale, qkv, angles, held, before):
    """(batch, 1, (heads + 2 key heads) * width) -> (batch, 1, heads * width)."""
    _, batch, _, room, width = held.shape
    y = qkv.new_empty(batch, 1, heads * width)
    cos, sin = angles or (None, None)
    sizes = batch, heads, key_heads, width, room, before
    call("attend", qkv, cos, sin, held, y, *sizes, scale)
    return y
