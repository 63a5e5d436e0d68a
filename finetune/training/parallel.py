"""One process or many: what the training loop asks of torch.distributed.

Started by `torchrun`, every process runs the same program and finds its place in the environment
(RANK, WORLD_SIZE, LOCAL_RANK). `ddp` keeps a whole copy of the model in each process and averages
gradients; `fsdp` (FSDP2, fully_shard) keeps a slice of each parameter, its gradient and its
optimizer state, and gathers one decoder block at a time. gloo serves CPUs, NCCL GPUs. Nothing of
this is hidden behind a trainer: accelerate, asked for FSDP on CPU, silently runs plain DDP.

Source: Y. Zhao et al., "PyTorch FSDP", 2023, https://arxiv.org/abs/2304.11277
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from bench.errors import UsageError
from compress.layers import decoder_blocks
from finetune.training.language_model import LossModel

STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class Place:
    """This process among those of the run. strategy: none, ddp or fsdp."""

    rank: int
    world: int
    device: torch.device
    strategy: str

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


@contextmanager
def placed(strategy: str) -> Iterator[Place]:
    """Join the run's other processes, and leave them at the end.

    strategy: auto (ddp where torchrun started several processes), ddp or fsdp. Raises UsageError
    for fsdp without torchrun.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    started = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    on_gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if not started:
        if strategy != "auto":
            raise UsageError(
                f"--strategy {strategy} needs several processes: start with "
                "torchrun --standalone --nproc_per_node N -m finetune ..."
            )
        yield Place(0, 1, device, "none")
        return
    if on_gpu:
        torch.cuda.set_device(device)
    # The others wait while the first one prepares raw text, and that may take hours.
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    try:
        chosen = "ddp" if strategy == "auto" else strategy
        yield Place(distributed.get_rank(), world, device, chosen)
    finally:
        distributed.destroy_process_group()


def spread(model: LossModel, place: Place) -> Any:
    """`model` as this strategy runs it. fsdp changes it in place, ddp wraps it.

    fsdp gathers float32 weights and leaves bfloat16 to autocast, like the other strategies: twice
    the traffic of gathering bfloat16, for the same arithmetic as one process.
    """
    if place.strategy == "none":
        return model
    if place.strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(place.device.type, (place.world,))
    for _, block in decoder_blocks(model.model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def reshard(spread_model: Any, place: Place) -> None:
    """After an evaluation: give back what fsdp gathered, as a backward pass would have done."""
    if place.strategy == "fsdp":
        spread_model.reshard()


def accumulate(spread_model: Any, place: Place, is_last: bool) -> None:
    """Exchange gradients only with the last micro-batch of a step."""
    if place.strategy == "ddp":
        spread_model.require_backward_grad_sync = is_last
    elif place.strategy == "fsdp":
        spread_model.set_requires_gradient_sync(is_last)


def summed(values: list[float], place: Place) -> list[float]:
    """Each of `values` summed over all processes."""
    if place.strategy == "none":
        return values
    both = torch.tensor(values, dtype=torch.float64, device=place.device)
    distributed.all_reduce(both)
    return both.tolist()


def wait(place: Place) -> None:
    """Until every process has come here."""
    if place.strategy != "none":
        distributed.barrier()


def local(tensor: Tensor) -> Tensor:
    """The slice of `tensor` that this process holds: all of it unless fsdp cut it."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_cut(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over processes along its first dimension."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def slice_of(whole: Tensor, place: Place) -> Tensor:
    """What process `place` holds of `whole`: fsdp cuts the first dimension as torch.chunk does."""
    parts = whole.chunk(place.world)
    return parts[place.rank] if place.rank < len(parts) else whole[:0]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Dotted name -> parameter, of those that are trained; a tied one counts once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
