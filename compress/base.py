"""The one contract between methods and the bench: compress, save, load, run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from compress import checkpoint, token_step
from compress.decoder import decoder_for
from compress.layers import model_dtype

Progress = Callable[[int, int], None]  # (decoder blocks done, decoder blocks in all)


def silent(done: int, total: int) -> None:
    """The default progress: says nothing."""


def part_of(progress: Progress, number: int, parts: int) -> Progress:
    """The progress of part `number` of `parts` of the same length, `progress` counting all."""
    return lambda done, total: progress(number * total + done, parts * total)


class Runner(Protocol):
    """A loaded model as the bench sees it: token ids in, numbers out."""

    def logits(self, ids: Tensor) -> Tensor:
        """(batch, seq) int64 token ids -> (batch, seq, vocab) float32."""
        ...

    def logit_chunks(self, ids: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (flat positions, logits) until all batch * seq positions are given.

        ids: (batch, seq) int64. Each piece is (slice over batch * seq, (n, vocab) tensor in the
        dtype that the model computes), n <= chunk_tokens: the full logits never exist at once.
        """
        ...

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Read the prompt (batch, seq): logits of its last token (batch, vocab), and a cache."""
        ...

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """One more token (batch, 1) on top of `cache`, which grows: logits (batch, vocab)."""
        ...

    def kernels(self, rows: int) -> list[str]:
        """Names of the arithmetic that the linear layers use for so many rows at once."""
        ...


def generate(runner: Runner, ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuation, the same loop for every method: (batch, seq) -> (batch, seq + new).

    Never stops early, so that equal arguments mean equal work.
    """
    logits, cache = runner.prefill(ids)
    tokens = [ids]
    for step in range(new_tokens):
        tokens.append(logits.argmax(-1, keepdim=True))
        if step + 1 < new_tokens:
            logits = runner.decode(tokens[-1], cache)
    return torch.cat(tokens, dim=1)


@dataclass(frozen=True)
class Compressor:
    """A method together with its settings: the dataclass fields are the config.

    Override `compress`. Override the others too when the result is not a PyTorch module (ONNX, a
    peer library's own format).
    """

    needs_calibration: ClassVar[bool] = False
    env: ClassVar[str | None] = None  # None: this interpreter; else baselines/envs/<env>.txt
    timed: ClassVar[bool] = True  # False: `load` rebuilds plain weights, whose speed says nothing
    foreign: ClassVar[bool] = False  # True: `save` leaves files that others define, not ours
    libraries: ClassVar[tuple[str, ...]] = ()  # whose versions belong into the record
    takes: ClassVar[tuple[str, ...]] = ("floats",)  # what it can be given: see pipeline.LEFT
    leaves: ClassVar[str] = "codes"  # what `compress` makes of matrices; "": what they were
    # Of `parent` and `work`, those that `compress` takes besides: a function that gives the model
    # that was there first, and a folder where it keeps what it needs to go on after a crash.
    extras: ClassVar[tuple[str, ...]] = ()

    def pinned(self) -> Self:
        """The method with its settings complete, once what they name has been looked at.

        Called before a job is planned. A method that reads a file of its own puts the file's
        checksum into a setting here. Raises ValueError if a setting names nothing usable.
        """
        return self

    def in_stages(self) -> tuple["Compressor", ...]:
        """The methods that it is made of, see pipeline.py: itself."""
        return (self,)

    def prefixes(self) -> Iterator[tuple[str, "Compressor"]]:
        """(name, method) of what each stage but the last has made, first to last: nothing."""
        return iter(())

    def orders(self) -> tuple[list[Any], list[str]]:
        """Pipelines of its stages in every order that fits, and why others do not: none."""
        return [], []

    def drawn(self, samples: int) -> int:
        """Calibration samples to draw where the user asked for so many."""
        return samples

    def read(self, folder: Path) -> Any:
        """A plain model folder as what `compress` takes; not part of what compression costs."""
        return checkpoint.load(folder)

    def compress(
        self, model: Any, calibration: Tensor | None = None, progress: Progress = silent
    ) -> Any:
        """Turn `model` into its compressed form; may reuse and modify `model`.

        model: what `read` gave. calibration: (samples, seq) int64 token ids, or None if not needed.
        """
        raise NotImplementedError

    def save(self, compressed: Any, folder: Path) -> None:
        """Write safetensors and JSON: an artefact never holds code."""
        checkpoint.save(compressed, folder, self)

    def load(self, folder: Path) -> Runner:
        """The saved artefact, ready to run."""
        return TorchRunner(checkpoint.load(folder))


class TorchRunner:
    """Runner over a Hugging Face causal language model (compressed or not).

    Models that decoder.py knows run by its forward pass, the others by their own. own: the layers
    are ours; those that read the same input are joined, and stay in `model` as views.
    """

    def __init__(self, model: Any, own: bool = True):
        self.model = model.eval()
        self.decoder = decoder_for(model, own)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """See Runner."""
        if self.decoder:
            return self.decoder.head(self.decoder.forward(ids)).float()
        return self.model(ids, use_cache=False).logits.float()

    @torch.inference_mode()
    def logit_chunks(self, ids: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """See Runner. GPT-2 and Llama project the last hidden state by one linear layer."""
        if self.decoder:
            hidden, head = self.decoder.forward(ids), self.decoder.head
        else:
            hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
            head = self.model.get_output_embeddings()
        hidden = hidden.flatten(0, 1)
        for start in range(0, len(hidden), chunk_tokens):
            piece = slice(start, min(start + chunk_tokens, len(hidden)))
            yield piece, head(hidden[piece])

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """See Runner."""
        if self.decoder:
            cache = self.decoder.cache(len(ids))
            return self.decode(ids, cache), cache
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """See Runner."""
        if self.decoder:
            return self.decoder.head(self.decoder.forward(ids, cache)[:, -1])
        return self.model(ids, past_key_values=cache, use_cache=True).logits[:, -1]

    def step_name(self, rows: int) -> list[str]:
        """What a single token goes through around the layers, if not torch."""
        compiled = rows == 1 and self.decoder and self.decoder.steps_compiled
        return [token_step.NAME] if compiled else []

    def kernels(self, rows: int) -> list[str]:
        """See Runner. Layers of ours name their kernel; plain ones are named by their type."""
        dtype = model_dtype(self.model)
        layers = self.decoder.linears() if self.decoder else self.model.modules()
        names = set(self.step_name(rows))
        for layer in layers:
            if hasattr(layer, "kernel"):
                names.add(layer.kernel(rows, dtype))
            elif isinstance(layer, nn.Linear):
                names.add(f"linear {str(dtype).removeprefix('torch.')}")
        return sorted(names)
