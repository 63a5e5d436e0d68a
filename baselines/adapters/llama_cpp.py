"""`llama_cpp:f16`, `:q8_0`, `:q4_0`, `:q4_k_m`: llama.cpp's own formats, quantizer and kernels.

Counterparts of `cast`, `int8_sym` and `rtn`. Groups are the formats' (32 for q8_0 and q4_0, 256 in
q4_k_m, where rows that 256 does not divide fall back to larger types). The embedding and the head
stay in 16 bits unless `embeddings` is own, which is what llama.cpp does when it is not asked.
Files hold no tokenizer: the bench gives token ids.

Source: https://github.com/ggml-org/llama.cpp (llama_model_quantize);
https://github.com/abetlen/llama-cpp-python
"""

import ctypes
import json
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
from compress.layers import is_tied
from compress.model_files import IGNORED
from compress.registry import register

MODEL = "model.gguf"
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
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    architectures = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}
    if kind not in architectures:
        raise ValueError(f"{folder}: no conversion of {kind!r} to GGUF here")
    writer = gguf.GGUFWriter(file, kind)
    heads = _describe(writer, config)
    blocks = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(architectures[kind], blocks)
    for source in sorted(folder.glob("*.safetensors")):
        with safe_open(source, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                tied = is_tied(config) and name == "lm_head.weight"
                if tied or name.endswith(IGNORED):
                    continue
                tensor = tensors.get_tensor(name).float()
                if kind == "gpt2" and name.endswith(
                    ("c_attn.weight", "c_fc.weight", "c_proj.weight")
                ):
                    tensor = tensor.T.contiguous()
                for part, count in zip(("q_proj", "k_proj"), heads, strict=False):
                    if f".{part}." in name:
                        tensor = interleaved(tensor, count)
                full = name if kind == "llama" or "." not in name else _prefixed(name)
                new = names.get_name(full, try_suffixes=(".weight", ".bias"))
                if new is None:
                    raise ValueError(f"{source}: no place in GGUF for {name}")
                data = tensor.half() if tensor.dim() > 1 else tensor
                writer.add_tensor(new, data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> tuple[int, ...]:
    """Write the sizes; (query heads, key-value heads) where rotary halves have to be turned."""
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gpt2":
        writer.add_block_count(config["n_layer"])
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return ()
    heads = config["num_attention_heads"]
    shared = config.get("num_key_value_heads") or heads
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rotary.get("rope_type", "default") != "default":
        raise ValueError(f"no conversion of rope_type {rotary['rope_type']!r} to GGUF here")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(rotary.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    return heads, shared


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """A query or key projection in llama.cpp's order of rows: rotary pairs side by side.

    weight: (heads * width, ...), in transformers' order, where channel c turns with c + width / 2.
    """
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return rows.transpose(1, 2).reshape(weight.shape).contiguous()


def _prefixed(name: str) -> str:
    """GPT-2's hub files leave "transformer." out."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


register("llama_cpp:f16", LlamaCpp(kind="f16"))
register("llama_cpp:q8_0", LlamaCpp(kind="q8_0"))
register("llama_cpp:q4_0", LlamaCpp(kind="q4_0"))
register("llama_cpp:q4_k_m", LlamaCpp(kind="q4_k_m"))
