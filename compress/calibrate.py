"""Run calibration data through a model one decoder block at a time, and solve as it goes.

The inputs of block 0 are computed once. Then, for each half of each block, x + module(norm(x)),
every linear layer's input is seen exactly once: gather the statistics of norm(x), let the method
replace the layers that read it, run the module up to its last linear layer, keep what that one
reads, gather its statistics, let the method replace it, add its output to x. Only the block at
work and its inputs (in "drift" mode the float model's too) are needed at a time; inputs move to
disk when they outgrow a limit.

Forward passes run in bfloat16 where the processor multiplies it natively; the sums are float32.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.base import Progress
from compress.layer_inputs import Group, Statistics
from compress.layers import Family, Half, decoder_blocks, family
from compress.spill import Limit, Store

CHUNK_TOKENS = 4096  # tokens in one forward pass: enough to keep the matrix products efficient
SPILL_BYTES = 2 * 2**30  # inputs beyond this many bytes go to disk

Solve = Callable[[list[Group]], dict[str, nn.Module]]


def run(
    model: Any,
    calibration: Tensor | None,
    solve: Solve,
    mode: str,
    progress: Progress,
    spill_bytes: int = SPILL_BYTES,
) -> None:
    """Replace linear layers of `model`, block by block, by what `solve` makes of them.

    calibration: (samples, tokens) int64. solve: groups -> {name in the block: new layer}.
    mode: "sequential" solves group by group, each seeing its input as computed by the layers
    already replaced; "drift" does the same, and computes the float model's inputs beside, to say
    how far they are ahead; "block" shows all groups of a block the inputs that its float layers
    compute, then runs the new block for the next one's inputs (`solve` may change its other
    parameters as well). spill_bytes: inputs held in memory before they go to disk.

    Raises ValueError if calibration is missing, or not token ids of the model's vocabulary and
    context, or the model produces NaN on it.
    """
    calibration = checked_ids(calibration, model.config)
    model.eval()  # dropout would make the statistics random
    calibration = calibration.to(model.get_input_embeddings().weight.device)
    dtype = compute_dtype(calibration.device)
    blocks = decoder_blocks(model)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="slimbench-") as folder:
        states = Store(Path(folder), Limit(spill_bytes))
        context = first_inputs(model, calibration, dtype, states)
        floats = None
        if mode == "drift":
            floats = states.like()
            for x in states:
                floats.append(x.clone())
        for done, (name, block) in enumerate(blocks, start=1):
            progress(done - 1, len(blocks))
            work = BlockWork(
                family(model), block, dtype, states, floats, context, solve, mode != "block"
            )
            try:
                work.run(is_last=done == len(blocks))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        progress(len(blocks), len(blocks))


def checked_ids(ids: Tensor | None, config: Any) -> Tensor:
    """`ids`. Raises ValueError unless they are (samples, tokens) int64 that the model can read."""
    if ids is None:
        raise ValueError("this method needs calibration: (samples, tokens) int64 token ids")
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        raise ValueError("calibration must be (samples, tokens) int64 token ids, at least one")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"calibration holds token ids outside the vocabulary {config.vocab_size}")
    if ids.shape[1] > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"calibration samples of {ids.shape[1]} tokens; the model reads {most}")
    return ids


@dataclass
class BlockWork:
    """One block at work: gather, solve, and leave its outputs in `states`.

    floats: the block's inputs as the float model has them, if they are wanted; its outputs there
    afterwards.
    """

    family: Family
    block: nn.Module
    dtype: torch.dtype
    states: Store
    floats: Store | None
    context: dict[str, Any]  # what attention is called with besides the hidden states
    solve: Solve
    sequential: bool

    def run(self, is_last: bool) -> None:
        """Do it; the outputs of the last block are nobody's inputs and not computed."""
        # The float weights stay as they are for `solve`; a working copy runs in the fast type.
        working = copy.deepcopy(self.block).to(self.dtype)
        # Layers of the working copy are replaced, never changed: the float block shares them.
        shared = {id(each): each for each in working.parameters()}
        before = copy.deepcopy(working, shared) if self.floats else working
        source, outputs = self.states, self.states if self.sequential else self.states.like()
        pending: list[Group] = []
        for half in (self.family.attention, self.family.mlp):
            norm, module = working.get_submodule(half.norm), working.get_submodule(half.module)
            kwargs = self.context if half is self.family.attention else {}
            ends_block = half is self.family.mlp

            def settle(group: Group) -> None:
                if self.sequential:
                    self.install(self.solve([group]), working)
                else:
                    pending.append(group)

            seen, ahead = Statistics(), None
            for index, x in enumerate(source):
                normed = norm(x)
                if self.floats:
                    floats = _through(before, half, self.floats.tensors[index], kwargs)
                    self.floats.put(index, floats[1])
                    ahead = floats[0].float() - normed
                seen.add(normed, ahead)
            settle(seen.group(self.block, half, half.inputs))
            seen, last_inputs = Statistics(), self.states.like()
            last = working.get_submodule(half.output)
            for index, x in enumerate(source):
                last_input = _input_of_last(module, last, norm(x), kwargs)
                last_inputs.append(last_input)
                if self.floats:
                    ahead = self.floats.tensors[index].float() - (x + last(last_input))
                seen.add(last_input, ahead)
            settle(seen.group(self.block, half, (half.output,)))
            if ends_block and (is_last or not self.sequential):
                break
            last = working.get_submodule(half.output)
            for index, (x, last_input) in enumerate(zip(source, last_inputs, strict=True)):
                outputs.put(index, x + last(last_input))
            source = outputs
        if pending:
            self.install(self.solve(pending))
            if not is_last:
                self.forward(copy.deepcopy(self.block).to(self.dtype))

    def install(self, replaced: dict[str, nn.Module], *copies: nn.Module) -> None:
        """Put the new layers into the block and its copies."""
        for block in (self.block, *copies):
            for name, layer in replaced.items():
                block.set_submodule(name, layer)

    def forward(self, block: nn.Module) -> None:
        """states = block(states)."""
        for index, x in enumerate(self.states):
            self.states.put(index, through_block(self.family, block, x, self.context))


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native else torch.float32


def through_block(layout: Family, block: nn.Module, x: Tensor, context: dict[str, Any]) -> Tensor:
    """What the block makes of x, (samples, tokens, width) both. context: see first_inputs."""
    _, x = _through(block, layout.attention, x, context)
    _, x = _through(block, layout.mlp, x, {})
    return x


def _through(
    block: nn.Module, half: Half, x: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """norm(x), and x + module(norm(x))."""
    normed = block.get_submodule(half.norm)(x)
    out = block.get_submodule(half.module)(normed, **kwargs)
    return normed, x + (out[0] if isinstance(out, tuple) else out)


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


def first_inputs(
    model: nn.Module, calibration: Tensor, dtype: torch.dtype, states: Store | list[Tensor]
) -> dict[str, Any]:
    """Fill `states` with the inputs of block 0, some samples each; its attention's other arguments.

    calibration: (samples, tokens) int64. dtype: of the states and of the arguments.
    """
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
    if context.get("attention_mask") is not None:  # causal and equal for all: no padding here
        context["attention_mask"] = context["attention_mask"][:1]
    return {key: _cast(value, dtype) for key, value in context.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`, also inside tuples (rotary cos and sin)."""
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
