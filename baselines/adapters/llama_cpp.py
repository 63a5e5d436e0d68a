"""`llama_cpp:f16`, `:q8_0`, `:q4_0`, `:q4_k_m`: llama.cpp's own formats, quantizer and kernels.

Counterparts of `cast`, `int8_sym` and `rtn`. Groups are the formats' (32 for q8_0 and q4_0, 256 in
q4_k_m, where rows that 256 does not divide fall back to larger types). The embedding and the head
stay in 16 bits unless `embeddings` is own, which is what llama.cpp does when it is not asked.
Files hold no tokenizer: the bench gives token ids.

Source: https://github.com/ggml-org/llama.cpp (llama_model_quantize);
https://github.com/abetlen/llama-cpp-python
"""

import ctypes
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from baselines.peer import Peer, WholeLogits
from compress.base import Progress, Runner, silent
from compress.export import gguf_header
from compress.export.gguf_header import NewTensor
from compress.export.gguf_model import interleaved, metadata_of, tensor_names, turning_heads
from compress.layers import is_tied
from compress.model_files import CONFIG, read_json, read_tensors
from compress.registry import register

MODEL = "model.gguf"
CONV1D = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # (in, out) in GPT-2's files
KINDS = ("f16", "q8_0", "q4_0", "q4_k_m")


@dataclass(frozen=True)
class LlamaCpp(Peer):
    """kind: f16, q8_0, q4_0 or q4_k_m. embeddings: f16, or own for llama.cpp's choice."""

    env: ClassVar[str | None] = "llama_cpp"
    libraries: ClassVar[tuple[str, ...]] = ("llama-cpp-python", "gguf")

    kind: str = "q4_0"
    embeddings: str = "f16"

    def __post_init__(self) -> None:
        """Raises ValueError for a kind that is not adapted."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.embeddings not in ("f16", "own"):
            raise ValueError(f"embeddings must be f16 or own, not {self.embeddings!r}")

    def read(self, folder: Path) -> Any:
        """A temporary folder with the model as GGUF in 16 bits."""
        made = tempfile.TemporaryDirectory(prefix="slimbench-gguf-")
        to_gguf(folder, Path(made.name) / "f16.gguf")
        return made

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Quantize the file. Raises RuntimeError with llama.cpp's code if it will not."""
        import llama_cpp as library

        library.llama_backend_init()
        plain, made = Path(model.name) / "f16.gguf", Path(model.name) / MODEL
        if self.kind == "f16":
            plain.rename(made)
            return model
        settings = library.llama_model_quantize_default_params()
        settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{self.kind.upper()}")
        settings.nthread = torch.get_num_threads()
        if self.embeddings == "f16":
            settings.output_tensor_type = library.GGML_TYPE_F16
            settings.token_embedding_type = library.GGML_TYPE_F16
        code = library.llama_model_quantize(
            str(plain).encode(), str(made).encode(), ctypes.byref(settings)
        )
        if code:
            raise RuntimeError(f"llama.cpp did not quantize the model: code {code}")
        return model

    def save(self, compressed: Any, folder: Path) -> None:
        """The GGUF file."""
        shutil.move(Path(compressed.name) / MODEL, folder / MODEL)
        compressed.cleanup()

    def load(self, folder: Path) -> Runner:
        """In llama.cpp, with torch's number of threads."""
        return GgufRunner(folder / MODEL, f"llama.cpp {self.kind}")


class GgufRunner(WholeLogits):
    """Runner over llama.cpp; one sequence at a time."""

    def __init__(self, file: Path, name: str):
        import llama_cpp

        self.file, self.name = file, name
        self.library = llama_cpp
        self.last_only = self._open(logits_all=False)
        self.every: Any = None  # opened when all logits are asked for: they take memory

    def logits(self, ids: Tensor) -> Tensor:
        """See Runner."""
        if self.every is None:
            self.every = self._open(logits_all=True)
        rows = []
        for row in ids.tolist():
            _read(self.every, row, fresh=True)
            rows.append(torch.from_numpy(self.every.scores[: len(row)].copy()))
        return torch.stack(rows)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """See Runner."""
        self._check(ids)
        return self._last(ids, fresh=True), None

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """See Runner. The cache is the library's."""
        self._check(ids)
        return self._last(ids, fresh=False)

    def _last(self, ids: Tensor, fresh: bool) -> Tensor:
        _read(self.last_only, ids[0].tolist(), fresh)
        logits = self.library.llama_get_logits_ith(self.last_only.ctx, -1)
        width = self.last_only.n_vocab()
        return torch.from_numpy(np.ctypeslib.as_array(logits, (width,)).copy())[None]

    def kernels(self, rows: int) -> list[str]:
        """See Runner."""
        return [self.name]

    def _check(self, ids: Tensor) -> None:
        if len(ids) != 1:
            raise ValueError("this adapter of llama.cpp decodes one sequence at a time")

    def _open(self, logits_all: bool) -> Any:
        threads = torch.get_num_threads()
        return self.library.Llama(
            str(self.file),
            n_ctx=0,  # the model's own
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=logits_all,
            verbose=False,
        )


def _read(model: Any, ids: list[int], fresh: bool) -> None:
    """Have llama.cpp read tokens, after those that it has read unless fresh."""
    if fresh:
        model.reset()
    read = model.eval  # a forward pass; nothing is interpreted
    read(ids)


def to_gguf(folder: Path, file: Path) -> None:
    """Write the Llama or GPT-2 in `folder` as GGUF: matrices in float16, vectors in float32.

    Raises ValueError for another model type.
    """
    config = read_json(folder / CONFIG)
    metadata = metadata_of(config) | {"tokenizer.ggml.model": "no_vocab"}
    kind = config["model_type"]
    tensors = read_tensors(folder, {"llama": "model", "gpt2": "transformer"}[kind])
    if is_tied(config):
        tensors.pop("lm_head.weight", None)
    names = tensor_names(kind, metadata[f"{kind}.block_count"], list(tensors))
    written = [_rounded(name, names[name], tensor, config) for name, tensor in tensors.items()]
    gguf_header.write(file, metadata, written)


def _rounded(name: str, new: str, tensor: Tensor, config: dict[str, Any]) -> NewTensor:
    """The tensor `name` of config.json's model, called `new` in the file."""
    kind, dtype = ("F16", torch.float16) if tensor.dim() > 1 else ("F32", torch.float32)
    if config["model_type"] == "gpt2" and name.endswith(CONV1D):
        tensor = tensor.T
    heads = turning_heads(config, name)

    def make() -> Tensor:
        rows = interleaved(tensor, heads) if heads else tensor.contiguous()
        return rows.to(dtype).view(torch.uint8)

    return NewTensor(new, kind, tuple(tensor.shape), make)


register("llama_cpp:f16", LlamaCpp(kind="f16"))
register("llama_cpp:q8_0", LlamaCpp(kind="q8_0"))
register("llama_cpp:q4_0", LlamaCpp(kind="q4_0"))
register("llama_cpp:q4_k_m", LlamaCpp(kind="q4_k_m"))
