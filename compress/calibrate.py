"""Run calibration data through a model one decoder block at a time, and solve as it goes.

The inputs of block 0 are computed once. Then, for each half of each block, x + module(norm(x)),
every linear layer's input is seen exactly once: gather the statistics of norm(x), let the method
replace the layers that read it, run the module up to its last linear layer, keep what that one
reads, gather its statistics, let the method replace it, add its output to x. Only the block at
work and its inputs are needed at a time; inputs move to disk when they outgrow a limit.

Forward passes run in bfloat16 where the processor multiplies it natively; the sums are float32.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.base import Progress
from compress.layers import Half, decoder_blocks, family

CHUNK_TOKENS = 4096  # tokens in one forward pass: enough to keep the matrix products efficient
SPILL_BYTES = 2 * 2**30  # inputs beyond this many bytes go to disk


@dataclass
class Group:
    """Linear layers of one block that read the same input, and what calibration saw of it.

    names: relative to the block. gram: (in, in) float32, mean of x x^T over the tokens.
    magnitude: (in,) float32, mean of |x|. tokens: how many.
    """

    block: nn.Module
    half: Half
    names: tuple[str, ...]
    gram: Tensor
    magnitude: Tensor
    tokens: int

    @property
    def layers(self) -> list[nn.Linear]:
        """The layers themselves."""
        return [self.block.get_submodule(name) for name in self.names]  # type: ignore[misc]


Solve = Callable[[list[Group]], dict[str, nn.Module]]


def run(
    model: Any,
    calibration: Tensor,
    solve: Solve,
    mode: str,
    progress: Progress,
    spill_bytes: int = SPILL_BYTES,
) -> None:
    """Replace linear layers of `model`, block by block, by what `solve` makes of them.

    calibration: (samples, tokens) int64. solve: groups -> {name in the block: new layer}; except
    in "sequential" mode it may change the block's other parameters as well.
    mode: "sequential" solves group by group, each seeing its input as computed by the layers
    already replaced; "block" shows all groups of a block the inputs of the float block, then runs
    the new block for the next one's inputs; "float" lets every block see the float model's inputs.

    Raises ValueError if calibration is not token ids of the model's vocabulary, or the model
    produces NaN on it.
    """
    if calibration.dim() != 2 or calibration.dtype != torch.int64 or calibration.numel() == 0:
        raise ValueError("calibration must be (samples, tokens) int64 token ids, at least one")
    vocabulary = model.config.vocab_size
    if calibration.min() < 0 or calibration.max() >= vocabulary:
        raise ValueError(f"calibration holds token ids outside the vocabulary of {vocabulary}")
    dtype = compute_dtype()
    blocks = decoder_blocks(model)
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="slimbench-") as folder:
        states = Store(Path(folder), spill_bytes)
        context = _first_inputs(model, calibration, dtype, states)
        for done, (name, block) in enumerate(blocks, start=1):
            progress(done - 1, len(blocks))
            try:
                _run_block(model, block, dtype, states, context, solve, mode)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        progress(len(blocks), len(blocks))


def _run_block(
    model: nn.Module,
    block: nn.Module,
    dtype: torch.dtype,
    states: "Store",
    context: dict[str, Any],
    solve: Solve,
    mode: str,
) -> None:
    """One block: gather, solve, and leave its outputs in `states`."""
    # The float weights stay as they are for `solve`; a working copy runs in the fast type.
    working = copy.deepcopy(block).to(dtype)
    outputs = states.like() if mode == "block" else states
    source = states
    pending: list[Group] = []

    def settle(group: Group) -> None:
        if mode == "sequential":
            _install(solve([group]), block, working)
        else:
            pending.append(group)

    for half in (family(model).attention, family(model).mlp):
        norm, module = working.get_submodule(half.norm), working.get_submodule(half.module)
        kwargs = context if half is family(model).attention else {}
        seen = Statistics()
        for x in source:
            seen.add(norm(x))
        settle(seen.group(block, half, half.inputs))
        seen, last_inputs = Statistics(), states.like()
        for x in source:
            last_input = _input_of_last(module, working.get_submodule(half.output), norm(x), kwargs)
            seen.add(last_input)
            last_inputs.append(last_input)
        settle(seen.group(block, half, (half.output,)))
        last = working.get_submodule(half.output)
        for index, (x, last_input) in enumerate(zip(source, last_inputs, strict=True)):
            outputs.put(index, x + last(last_input))
        source = outputs
    if pending:
        _install(solve(pending), block)
    if mode == "block":
        working = copy.deepcopy(block).to(dtype)  # solve may have changed more than the linears
        for index, x in enumerate(states):
            states.put(index, _forward(model, working, x, context))


def _forward(model: nn.Module, block: nn.Module, x: Tensor, context: dict[str, Any]) -> Tensor:
    for half in (family(model).attention, family(model).mlp):
        kwargs = context if half is family(model).attention else {}
        out = block.get_submodule(half.module)(block.get_submodule(half.norm)(x), **kwargs)
        x = x + (out[0] if isinstance(out, tuple) else out)
    return x


def _install(replaced: dict[str, nn.Module], *blocks: nn.Module) -> None:
    for block in blocks:
        for name, layer in replaced.items():
            block.set_submodule(name, layer)


class Statistics:
    """Running sums over the rows of one linear layer's input."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x: (..., in), any float type."""
        rows = x.flatten(0, -2)
        columns = rows.T.contiguous().float()  # (in, tokens)
        if self.gram is None or self.magnitude is None:
            self.gram = columns.new_zeros(len(columns), len(columns))
            self.magnitude = columns.new_zeros(len(columns))
        self.magnitude += torch.linalg.vector_norm(columns, ord=1, dim=1)
        self.tokens += len(rows)
        step = max(128, len(columns) // 4)  # the lower triangle is the upper one, mirrored
        for start in range(0, len(columns), step):
            stop = start + step
            self.gram[start:stop, start:] += matmul_nt(columns[start:stop], columns[start:])

    def group(self, block: nn.Module, half: Half, names: tuple[str, ...]) -> Group:
        """The finished sums as a Group. Raises ValueError if they are not finite."""
        assert self.gram is not None and self.magnitude is not None
        gram = (self.gram.triu() + self.gram.triu(1).T) / self.tokens
        if not gram.isfinite().all():
            raise ValueError(f"the input of {names[0]} holds NaN or infinity")
        return Group(block, half, names, gram, self.magnitude / self.tokens, self.tokens)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for float32 (m, k) and (n, k), by oneDNN on CPU.

    torch's default float32 product on CPU is MKL's, which leaves half of AVX-512 unused on
    processors that are not Intel's: measured 2.2x slower there, and no faster elsewhere.
    """
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def compute_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


class Store:
    """A list of tensors that keeps at most `limit` bytes in memory and the rest on disk."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self.held = folder, limit, 0
        self.tensors: list[Tensor] = []

    def like(self) -> "Store":
        """An empty store with the same folder and limit."""
        return Store(self.folder, self.limit)

    def append(self, tensor: Tensor) -> None:
        """Keep a tensor; a copy on disk, memory-mapped, once the limit is reached."""
        size = tensor.numel() * tensor.element_size()
        if self.held + size <= self.limit:
            self.held += size
            self.tensors.append(tensor)
            return
        handle, path = tempfile.mkstemp(dir=self.folder)
        os.close(handle)
        mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        os.unlink(path)  # the mapping keeps the bytes until the tensor is dropped
        self.tensors.append(mapped.view(tensor.shape).copy_(tensor))

    def put(self, index: int, tensor: Tensor) -> None:
        """Replace tensor `index`, where it lies; or append it as the next one."""
        if index == len(self.tensors):
            self.append(tensor)
        else:
            self.tensors[index].copy_(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _Stop(Exception):
    """Ends a forward pass as soon as the wanted input is seen."""


def _input_of_last(module: nn.Module, last: nn.Module, x: Tensor, kwargs: dict) -> Tensor:
    """What `last` reads when `module` runs on x; `last` itself is not run."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise _Stop

    handle = last.register_forward_pre_hook(stop)
    try:
        module(x, **kwargs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def _first_inputs(
    model: nn.Module, calibration: Tensor, dtype: torch.dtype, states: Store
) -> dict[str, Any]:
    """Fill `states` with the inputs of block 0; return the other arguments of its attention."""
    first = decoder_blocks(model)[0][1]
    attention = first.get_submodule(family(model).attention.module)
    context: dict[str, Any] = {}

    def keep_input(_: nn.Module, args: tuple) -> None:
        states.append(args[0].to(dtype))

    def keep_context(_: nn.Module, args: tuple, kwargs: dict) -> None:
        context.update(kwargs)
        raise _Stop

    handles = [
        first.register_forward_pre_hook(keep_input),
        attention.register_forward_pre_hook(keep_context, with_kwargs=True),
    ]
    samples = max(1, CHUNK_TOKENS // calibration.shape[1])
    try:
        for chunk in calibration.split(samples):
            try:
                model(chunk, use_cache=False)
            except _Stop:
                continue
    finally:
        for handle in handles:
            handle.remove()
    context.pop("hidden_states", None)
    return {key: _cast(value, dtype) for key, value in context.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`, also inside tuples (rotary cos and sin)."""
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
