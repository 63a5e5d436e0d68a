"""Checkpoints of a run: safetensors and JSON, whole or not there, readable by any world size.

`RUN/checkpoints/step-000500/` holds one file a process, `part-0-of-2.safetensors`, with its slice
of every trained parameter and of AdamW's two moments, and `state.json`, which says which tensors
are slices. Without fsdp there is one part. Slices are cut along the first dimension, in the order
of the ranks, so a whole tensor is their concatenation: that is how a run goes on with another
number of processes, and how a sharded checkpoint becomes a plain model.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.text.token_file import sync_folder
from finetune.training import parallel
from finetune.training.parallel import Place
from results.store import write_atomically

STEP = re.compile(r"step-(\d{6,})")
VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    run: Path, step: int, model: nn.Module, optimizer: Any, place: Place, keep: int = 2
) -> None:
    """Write the state after `step` steps, then delete all but the newest `keep` checkpoints.

    Every process calls this. The folder gets its name only when all parts are in it.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    part = folder.with_name(f".{folder.name}.part")
    if place.leads:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    parallel.wait(place)
    tensors = _tensors(model, optimizer)
    if place.strategy == "fsdp" or place.leads:
        world = place.world if place.strategy == "fsdp" else 1
        mine = {
            name: parallel.local(tensor).detach().cpu().contiguous()
            for name, tensor in tensors.items()
            if place.leads or parallel.is_cut(tensor)
        }
        _write(mine, part / f"part-{place.rank}-of-{world}.safetensors")
    parallel.wait(place)
    if place.leads:
        cut = {name: list(t.shape) for name, t in tensors.items() if parallel.is_cut(t)}
        parts = place.world if place.strategy == "fsdp" else 1
        state = {"version": VERSION, "step": step, "parts": parts, "cut": cut}
        write_atomically(part / "state.json", json.dumps(state, indent=1) + "\n")
        sync_folder(part)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(part, folder)
        sync_folder(folder.parent)
        for old in (*found(run)[:-keep], *folder.parent.glob(".step-*.part")):
            shutil.rmtree(old, ignore_errors=True)
    parallel.wait(place)


def found(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((f for f in folders if STEP.fullmatch(f.name)), key=lambda f: int(f.name[5:]))


def newest(run: Path) -> "Checkpoint | None":
    """The last finished checkpoint of a run, if there is one."""
    folders = found(run)
    return Checkpoint(folders[-1]) if folders else None


class Checkpoint:
    """A checkpoint that is read tensor by tensor. Raises ValueError naming the file."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self.step, self.parts, self.cut = int(state["step"]), int(state["parts"]), state["cut"]
            if state["version"] != VERSION or not isinstance(self.cut, dict):
                raise ValueError(f"version {state['version']!r}, not {VERSION}")
            names = [f"part-{rank}-of-{self.parts}.safetensors" for rank in range(self.parts)]
            self.files = [safe_open(folder / name, framework="pt") for name in names]
        except (OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
            cure = "delete this checkpoint; the run goes on from the one before"
            raise ValueError(f"{folder} is damaged ({error}); {cure}") from None

    def whole(self, name: str) -> Tensor:
        """The tensor `name`, put together from its slices."""
        try:
            if name not in self.cut:
                return self.files[0].get_tensor(name)
            tensor = torch.cat([file.get_tensor(name) for file in self.files])
        except SafetensorError as error:
            raise ValueError(f"{self.folder} lacks the tensor {name} ({error})") from None
        if list(tensor.shape) != self.cut[name]:
            raise ValueError(f"{self.folder}: the slices of {name} do not fit together")
        return tensor

    def parameters(self) -> dict[str, Tensor]:
        """Dotted name (of the LossModel) -> whole parameter, for every trained parameter."""
        names = [name.removeprefix("model:") for name in self.files[0].keys()]  # noqa: SIM118
        return {name: self.whole(f"model:{name}") for name in names if ":" not in name}

    def restore(self, model: nn.Module, optimizer: Any, place: Place) -> None:
        """Put parameters and optimizer state back. Raises ValueError if shapes differ."""
        for name, parameter in parallel.trainable(model).items():
            # A copy: what is read is mapped from a file that will be deleted.
            state = {"step": self.whole(f"step:{name}").to(parameter.device, copy=True)}
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter.data)
                self._fill(state[key], f"{key}:{name}", place)
            optimizer.state[parameter] = state
            self._fill(parameter.data, f"model:{name}", place)

    def _fill(self, target: Tensor, name: str, place: Place) -> None:
        whole = self.whole(name)
        if whole.shape != target.shape:
            raise ValueError(
                f"{self.folder}: {name} has shape {tuple(whole.shape)}, not {tuple(target.shape)}"
            )
        mine = parallel.slice_of(whole, place) if parallel.is_cut(target) else whole
        parallel.local(target).copy_(mine)


def _tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """What is saved: parameters, moments and step counts, under names with a prefix."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parallel.trainable(model).items():
        tensors[f"model:{name}"] = parameter
        state = optimizer.state.get(parameter)
        if not state:  # with fsdp: a gathered copy instead of the parameter itself
            raise ValueError(f"{name} has no optimizer state; it was never stepped")
        tensors |= {f"{key}:{name}": state[key] for key in MOMENTS}
        tensors[f"step:{name}"] = torch.as_tensor(state["step"], dtype=torch.float32)
    return tensors


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file)
    with file.open("rb+") as stream:  # the rename must not overtake the data
        os.fsync(stream.fileno())
