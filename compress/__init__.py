"""Compression methods for GPT-2 and Llama style language models, usable without the bench.

    import compress

    model = compress.load("path/to/model")                       # a Hugging Face folder
    small = compress.apply("gptq", model, calibration, bits=4)   # (samples, tokens) int64 ids
    compress.save(small, "path/to/small")
    again = compress.load("path/to/small")                       # same logits, bit for bit
    compress.export(small, "path/to/gguf", format="gguf")        # for another runtime
    compress.apply("onnx", small).save("path/to/onnx")           # a graph; uses `small` up

`names()` lists the methods, `get(name, **settings)` gives one as a value, `describe` its text.
`compress.export.read`, imported as `from compress.export import read`, reads such files again.
"""

from typing import Any

from torch import Tensor, nn

from compress import registry
from compress.base import Compressor, Progress, Runner, TorchRunner, generate, silent
from compress.checkpoint import load, save

# The function takes the name of its package here: `compress.export(...)` is the call that people
# write, and `from compress.export import ...` finds the package all the same, in sys.modules.
from compress.export import export
from compress.layers import conv1d_to_linear
from compress.registry import UnknownName, describe, get, parse, parse_list

__all__ = [
    "Compressor",
    "Runner",
    "TorchRunner",
    "UnknownName",
    "apply",
    "describe",
    "export",
    "generate",
    "get",
    "load",
    "names",
    "parse",
    "parse_list",
    "save",
]

registry.discover("compress.methods")


def names() -> list[str]:
    """The methods that make a model that `save` writes, sorted; `apply` takes "onnx" besides."""
    return [name for name in registry.names() if not registry.get(name).foreign]


def apply(
    name: str,
    model: nn.Module,
    calibration: Tensor | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Any:
    """Compress `model` by the method `name`; may reuse and modify it.

    name: one of names(), or the longer form "gptq(bits=3)". calibration: (samples, tokens) int64
    token ids, for the methods that need it. Transformers' own GPT-2 models are accepted as they
    are (their Conv1D layers are replaced by equal Linear ones first). The result is in evaluation
    mode and asks for no gradients.

    Raises UnknownName for a method or setting that does not exist, ValueError for a value that
    makes no sense, a missing calibration, or weights that are not finite.
    """
    plain, written = parse(name)
    if twice := written.keys() & settings.keys():
        raise ValueError(f"setting {min(twice)!r} is given twice, in {name!r} and beside it")
    method = get(plain, **written, **settings)
    if method.foreign and method.leaves != "graph":
        raise ValueError(f"method {plain!r} does not compress a model; known: {', '.join(names())}")
    if method.needs_calibration and calibration is None:
        raise ValueError(f"method {plain!r} needs calibration: (samples, tokens) int64 token ids")
    # Compression is the end of training: no dropout, no gradients.
    network = conv1d_to_linear(model).eval().requires_grad_(False)
    return method.compress(network, calibration, progress)
