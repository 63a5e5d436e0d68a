"""A run's checkpoint, or a LoRA adapter, as a plain model folder.

The model is built once more as the run built it, the checkpoint's parameters (put together from
their slices if fsdp cut them) are laid over it, and LoRA updates are folded into the weights by
peft: W + (alpha / rank) B A, in float32.

Source: E. J. Hu et al., "LoRA", 2021, section 4.1, https://arxiv.org/abs/2106.09685
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import model_folder, models
from bench.embedded import sha256_of
from bench.errors import UsageError
from bench.paths import replaced
from bench.terminal import err
from bench.terminal import out as terminal
from compress.dtypes import DTYPES
from compress.layers import cast_parameters
from finetune import pretrain, train
from finetune.options import build as build_settings
from finetune.options import setting
from finetune.train import grow
from finetune.training import checkpoints, lora, runs
from finetune.training.new_model import read_plain
from finetune.training.parallel import Place, wait

COMMANDS: dict[str, tuple[Any, Callable[[Any], tuple[Any, Any]]]] = {
    "pretrain": (pretrain.Settings, pretrain.build),
    "train": (train.Settings, train.build),
}


@dataclass(frozen=True)
class Settings:
    """What to merge."""

    source: Path = setting(
        Path("runs/new"), "Folder of a run, or of a LoRA adapter.", positional=True
    )
    base: str | None = setting(None, "Base model of an adapter that is not a run's.")
    out: Path | None = setting(None, "Where to write; default: model/ beside it.")


def run(settings: Settings) -> Path:
    """Write a plain model folder from a run's newest checkpoint or from a LoRA adapter.

    Works on stopped and on sharded (fsdp) runs too.
    """
    if (settings.source / runs.FILE).exists():
        folder = export(settings.source, settings.out)
    else:
        folder = fold(settings.source, settings.base, settings.out)
    terminal.print(str(folder), markup=False)
    return folder


def finish(run: Path, figures: dict[str, float], place: Place) -> Path:
    """The end of a run, in every process: RUN/model is written, and the last figures are said."""
    if place.leads:
        folder = export(run)
        summary = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        err.print(f"{summary}\n{folder}", markup=False)
    wait(place)
    return run / "model"


def export(run: Path, out: Path | None = None) -> Path:
    """The plain folder (default RUN/model) of a run's newest checkpoint; RUN/adapter under LoRA.

    Raises ValueError if the run has no checkpoint yet or it does not fit.
    """
    recipe = runs.read(run)
    settings_type, build = COMMANDS[recipe["command"]]
    settings = build_settings(settings_type, recipe["settings"] | {"out": str(run)}, str(run))
    checkpoint = checkpoints.newest(run)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint yet; run it longer")
    base = recipe["origin"].get("base")
    if base and models.resolve(base["name"]).revision != base["revision"]:
        raise ValueError(f"{base['name']} is no longer the model that {run} began with")
    model, tokenizer = build(settings)
    _lay_over(lora.inner(model), checkpoint)
    lineage = runs.lineage(run, checkpoint.step)
    if lora.is_adapted(model):
        _put(run / "adapter", lambda folder: lora.save(model, tokenizer, folder))
        model = lora.merged(model)
    model = cast_parameters(model, DTYPES[settings.dtype]).eval()
    target = out or run / "model"
    _put(target, lambda folder: model_folder.write(model, tokenizer, folder, lineage))
    return target


def fold(adapter: Path, base: str | None, out: Path | None) -> Path:
    """The plain folder of a peft adapter and its base."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise UsageError(f"{adapter} is neither a run's folder nor an adapter's: no {file}")
    if base is None:
        raise UsageError(f"{adapter} is an adapter: name its base model with --base")
    found = models.resolve(base)
    plain = read_plain(found.folder)
    own = (adapter / "tokenizer.json").exists()  # with the tokens that the task added
    tokenizer = models.tokenizer_in(adapter if own else found.folder)
    grow(plain, len(tokenizer))
    model = lora.merged(lora.read(plain, adapter))
    lineage = {
        "source": f"LoRA adapter {adapter.name}, merged into {found.alias}",
        "origin": {"base": {"alias": found.alias, "revision": found.revision}},
    }
    target = out or adapter.with_name(f"{adapter.name}-merged")
    _put(target, lambda folder: model_folder.write(model, tokenizer, folder, lineage))
    return target


def _lay_over(model: Any, checkpoint: checkpoints.Checkpoint) -> None:
    """Give `model` (transformers', LoRA layers in it) the checkpoint's parameters."""
    own = dict(model.named_parameters())
    found = checkpoint.parameters()
    lacking = [n for n, p in own.items() if p.requires_grad and f"model.{n}" not in found]
    if lacking:
        raise ValueError(f"{checkpoint.folder} lacks {lacking[0]}, which the run trains")
    for name, tensor in found.items():
        target = own.get(name.removeprefix("model."))
        if target is None or target.shape != tensor.shape:
            raise ValueError(f"{checkpoint.folder}: {name} does not fit the model of run.json")
        target.data.copy_(tensor)


def _put(folder: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill `folder`, whole or not at all; an older model or adapter is replaced.

    Evaluations that lay beside the same weights stay. Raises UsageError for any other folder.
    """
    folder = folder.resolve()
    known = any((folder / name).exists() for name in ("lineage.json", "adapter_config.json"))
    if folder.exists() and not known:
        raise UsageError(f"{folder} exists and holds no model made here; choose another --out")

    def write_and_keep(part: Path) -> None:
        write(part)
        old, new = folder / "model.safetensors", part / "model.safetensors"
        if old.exists() and new.exists() and sha256_of(old) == sha256_of(new):
            for evaluation in folder.glob("evaluation-*.json"):
                shutil.copy2(evaluation, part)

    replaced(folder, write_and_keep)
