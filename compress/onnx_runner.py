"""Run an ONNX graph of ours, in ONNX Runtime with IO binding."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.onnx_graph import GRAPH, KEEP

PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits")  # operators that multiply matrices


@dataclass
class Cache:
    """mask: (batch, read) int64, 0 where a token only fills up. past: OrtValues, as bound."""

    mask: Tensor
    past: list[Any]


class OnnxRunner:
    """Runner over the graph in `folder`, on the processor, with torch's number of threads.

    Keys and values stay where the runtime wrote them; token ids are read and logits written in
    torch's memory. Raises ValueError if onnxruntime is missing or cannot read the file.
    """

    def __init__(self, folder: Path):
        onnxruntime = library()
        self.value = onnxruntime.OrtValue
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # that an input has a default is not worth a warning
        try:
            self.session = onnxruntime.InferenceSession(folder / GRAPH, options)
        except Exception as error:  # its classes have no common parent but this
            raise ValueError(f"{folder / GRAPH}: {error}") from None
        inputs = {node.name: node for node in self.session.get_inputs()}
        self.before = [name for name in inputs if name.startswith("past_key_values")]
        outputs = self.session.get_outputs()
        self.after = [node.name for node in outputs[1:]]
        self.vocabulary = outputs[0].shape[-1]
        self.empty = [inputs[name] for name in self.before]
        self.products = products(folder)

    def start(self, mask: Tensor) -> Cache:
        """An empty cache. mask: (batch, 0) int64."""
        past = []
        for node in self.empty:
            half = node.type == "tensor(float16)"
            none = torch.empty(
                len(mask), node.shape[1], 0, node.shape[3], dtype=torch.half if half else None
            )
            past.append(self.value.ortvalue_from_numpy(none.numpy()))
        return Cache(mask, past)

    def run(self, ids: Tensor, cache: Cache, keep: int, mask: Tensor | None = None) -> Tensor:
        """(batch, seq) more token ids -> logits (batch, keep, vocab) of the last `keep`.

        mask: (batch, seq) int64, 0 where a token only fills up, left of the prompt; None: nowhere.
        """
        new = torch.ones_like(ids) if mask is None else mask
        cache.mask = torch.cat([cache.mask, new], dim=1)
        positions = (cache.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = torch.empty(len(ids), keep, self.vocabulary)
        binding = self.session.io_binding()
        fed = {
            "input_ids": ids.contiguous(),
            "attention_mask": cache.mask,
            "position_ids": positions.contiguous(),
            KEEP: torch.tensor(keep),
        }
        for name, tensor in fed.items():
            shape, place = list(tensor.shape), tensor.data_ptr()
            binding.bind_input(name, "cpu", 0, "int64", shape, place)
        for name, value in zip(self.before, cache.past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu", 0, "float32", list(logits.shape), logits.data_ptr())
        for name in self.after:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        cache.past = binding.get_outputs()[1:]
        return logits

    def logits(self, ids: Tensor) -> Tensor:
        """See Runner."""
        return self.run(ids, self.start(ids[:, :0]), ids.shape[1])

    def logit_chunks(self, ids: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """See Runner. One sequence after the other, a chunk at a time on top of the cache."""
        for number, row in enumerate(ids):
            cache = self.start(ids[:1, :0])
            for start in range(0, len(row), chunk_tokens):
                piece = row[None, start : start + chunk_tokens]
                first, count = number * len(row) + start, piece.shape[1]
                yield slice(first, first + count), self.run(piece, cache, count)[0]

    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """See Runner. mask: see `run`."""
        cache = self.start(ids[:, :0])
        return self.run(ids, cache, 1, mask)[:, 0], cache

    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """See Runner."""
        return self.run(ids, cache, 1)[:, 0]

    def kernels(self, rows: int) -> list[str]:
        """See Runner. The operators, whatever the rows."""
        return self.products


def library() -> Any:
    """onnxruntime. Raises ValueError, with the cure, if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("onnx needs onnxruntime: pip install 'slimbench[onnx]'") from None
    return onnxruntime


def products(folder: Path) -> list[str]:
    """Names of the operators that multiply matrices in the graph, for records."""
    import onnx

    names = set()
    for node in onnx.load(folder / GRAPH, load_external_data=False).graph.node:
        if node.op_type in PRODUCTS:
            levels = [each.i for each in node.attribute if each.name == "accuracy_level"]
            level = f" accuracy_level {levels[0]}" if levels else ""
            names.add(f"onnxruntime {node.op_type}{level}")
    return sorted(names)
