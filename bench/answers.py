"""What a saved model answers, in a process of its own: the half of `bench export` that loads.

    python -m bench.answers BOX

runs in our environment or in that of another runtime, with the same code. BOX/task.json says what
to load. BOX/answers.safetensors gets logits and greedy tokens, BOX/answers.json what there is to
tell; BOX/error.json, in place of both, says why there are no answers.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.errors import one_line
from bench.machine import LIBRARIES, packages
from compress import registry
from compress.base import Runner, TorchRunner, generate
from compress.dynamic_linear import Int8DynamicLinear
from compress.quant_embedding import QuantEmbedding
from compress.quant_linear import QuantLinear


def main(box: Path) -> int:
    """Answer BOX/task.json; the exit code."""
    task = json.loads((box / "task.json").read_text(encoding="utf-8"))
    try:
        registry.discover(*task["packages"])
        torch.set_num_threads(task["threads"])
        told = by_adapter(box, task) if task["adapter"] else by_ours(box, task)
    except Exception as error:  # whatever its type, it is the runtime's reason
        traceback.print_exc()
        (box / "error.json").write_text(json.dumps(one_line(error)), encoding="utf-8")
        return 1
    (box / "answers.json").write_text(json.dumps(told), encoding="utf-8")
    return 0


def by_adapter(box: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Answers of another runtime, loaded as the bench loads what that library itself has saved."""
    adapter = registry.get(task["adapter"])
    ids = torch.tensor(task["ids"])[None]
    save_file(answers(adapter.load(Path(task["folder"])), ids), box / "answers.safetensors")
    return {"packages": packages((*LIBRARIES, *adapter.libraries))}


def by_ours(box: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Answers of the artefact and of what our reader makes of the export, both in float32.

    In float32 both compute the same sums, so that equal weights give equal logits whatever type
    either file computes in. Tells also how the weights compare, layer by layer, and whether
    layers round their inputs to int8.
    """
    from compress.export import read

    method = registry.get(task["method"], **task["settings"])
    runner: Any = method.load(Path(task["artefact"]))
    original, again = runner.model.float(), read(Path(task["folder"])).float()
    ids = torch.tensor(task["ids"])[None]
    expected, found = (answers(TorchRunner(model), ids) for model in (original, again))
    save_file(
        {f"original.{name}": tensor for name, tensor in expected.items()} | found,
        box / "answers.safetensors",
    )
    return {
        "packages": packages(),
        "layers": compared(original, again),
        "int8_inputs": any(isinstance(layer, Int8DynamicLinear) for layer in original.modules()),
    }


def answers(runner: Runner, ids: Tensor) -> dict[str, Tensor]:
    """Logits at each of (1, n) ids, (n, vocabulary) float32, and n greedy tokens after them."""
    logits = runner.logits(ids)[0].float().clone()
    tokens = generate(runner, ids, ids.shape[1])[0, ids.shape[1] :].clone()
    return {"logits": logits, "tokens": tokens}


def compared(original: nn.Module, again: nn.Module) -> dict[str, Any]:
    """How many layers there are, how many of codes, and the names of those that differ.

    A layer is equal if its rebuilt float32 weight and its bias are, bit for bit, and if its steps
    (code - zero) are, where both keep codes. The codes of a layer with an offset are not looked at:
    GGUF may turn a block of them round.
    """
    count = coded = 0
    different = []
    for name, layer in original.named_modules():
        inside = isinstance(
            submodule(original, name.rpartition(".")[0]), QuantEmbedding
        )  # its table, counted as it
        if inside or weight_of(layer) is None:
            continue
        count += 1
        other = submodule(again, name)
        parts = [(weight_of(layer), weight_of(other)), (bias_of(layer), bias_of(other))]
        mine, theirs = table_of(layer), table_of(other)
        if mine is not None and theirs is not None:
            coded += 1
            if mine.offset is None and theirs.offset is None:
                parts.append((steps(mine), steps(theirs)))
        if not all(same(*part) for part in parts):
            different.append(name)
    return {"count": count, "of_codes": coded, "different": different}


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are missing, or equal."""
    return torch.equal(a, b) if a is not None and b is not None else a is b


def table_of(layer: nn.Module | None) -> QuantLinear | None:
    """The codes of a layer, or None."""
    table = layer.table if isinstance(layer, QuantEmbedding) else layer
    return table if isinstance(table, QuantLinear) else None


def weight_of(layer: nn.Module | None) -> Tensor | None:
    """The weight that a layer means, in float32, or None."""
    if (table := table_of(layer)) is not None:
        return table.weight(torch.float32)
    weight = getattr(layer, "weight", None)
    return weight.detach().float() if isinstance(weight, Tensor) else None


def bias_of(layer: nn.Module | None) -> Tensor | None:
    """The bias of a layer in float32, or None."""
    bias = getattr(layer, "bias", None)
    return bias.detach().float() if isinstance(bias, Tensor) else None


def steps(layer: QuantLinear) -> Tensor:
    """code - zero of every weight, (out, in) int32, columns in the order of the inputs."""
    codes, zero = layer.codes_and_zero()
    zero = zero.repeat_interleave(layer.group_size, dim=1)[:, : layer.in_features]
    whole = codes.int() - zero.int()
    return whole if layer.order is None else whole[:, torch.argsort(layer.order)]


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The module `name`, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
