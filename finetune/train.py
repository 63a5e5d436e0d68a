"""Fine-tune a model on a task, all of its weights or LoRA's, and write it as a plain folder."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench import models
from bench.errors import UsageError
from bench.terminal import err
from compress.dtypes import DTYPES
from finetune.judging.judge import judge
from finetune.options import setting
from finetune.tasks import Task, checksum, get
from finetune.training import lora, runs
from finetune.training.batches import Batch, Batches, Windows, evaluation_windows
from finetune.training.loop import LoopSettings, fit, prepare_process
from finetune.training.mean_loss import mean_loss
from finetune.training.new_model import read_plain
from finetune.training.parallel import Place, placed, wait


@dataclass(frozen=True)
class Settings(LoopSettings):
    """The model, the task and the method, besides the settings of the loop."""

    model: str = setting("smollm2-135m", "Base model: alias, hub id or folder.")
    task: str = setting("wikitext", "What to learn: wikitext, choice, qa, mrpc, e2e.")
    method: str = setting(
        "full", "Train all weights, or low-rank updates.", choices=("full", "lora")
    )
    rank: int = setting(8, "LoRA: rank of the updates.", least=1)
    alpha: int = setting(16, "LoRA: updates are scaled by alpha / rank.", least=1)
    lora_dropout: float = setting(0.0, "LoRA: dropout before the update.", least=0)
    targets: tuple[str, ...] = setting(
        (), "LoRA: layers, by the last part of their names; default: all in the blocks."
    )
    context: int = setting(
        1024, "Most tokens of an example or window, within what the model reads.", least=2
    )
    evaluation_examples: int = setting(200, "Validation examples per evaluation.", least=1)
    dtype: str = setting("float32", "Type of the finished weights.", choices=tuple(DTYPES))

    learning_rate: float = setting(
        5e-5, "Highest rate; LoRA wants about ten times as much.", least=0
    )
    batch: int = setting(32, "Examples (wikitext: windows) in a step.", least=1)
    micro_batch: int = setting(16, "Examples in one forward pass.", least=1)
    epochs: float = setting(3.0, "Passes over the data.", least=0)
    weight_decay: float = setting(0.01, "Of matrices; vectors have none.", least=0)
    warmup: float = setting(0.1, "Share of the steps in which the rate rises.", least=0)
    beta2: float = setting(0.999, "Memory of AdamW's squared gradients.", least=0)

    def __post_init__(self) -> None:
        if self.method == "lora" and (self.fake_weights or "").startswith("method:"):
            raise UsageError(
                "--fake-weights method:... trains weights to lie on a method's grid, and LoRA's "
                "update would take them off it again; use --method full"
            )


def run(settings: Settings) -> Any:
    """Fine-tune a model on a task; the same command again resumes a stopped run.

    OUT/model is the finished model, LoRA merged; OUT/adapter keeps the LoRA weights.
    """
    from finetune.merge import finish

    with placed(settings.strategy) as place:
        prepare_process(settings, place)
        figures = _learn(settings, place)
        return finish(settings.out, figures, place)


def _learn(settings: Settings, place: Place) -> dict[str, float]:
    """Train to the last step; the last evaluation and the speed."""
    runs.check(settings, "train")
    task = get(settings.task)
    base = models.resolve(settings.model)
    model, tokenizer = build(settings)
    context = min(settings.context, lora.inner(model).config.max_position_embeddings)
    training, validation, fingerprint = _data(settings, task, tokenizer, context, place)
    origin = {
        "base": {"name": settings.model, "alias": base.alias, "revision": base.revision},
        "data": {"train": training.fingerprint(), "validation": fingerprint},
    }
    runs.begin(settings, "train", origin, place)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if place.leads:
        err.print(
            f"{trained / 1e6:.2f}M parameters to train, {training.steps_per_epoch} steps an epoch",
            markup=False,
        )

    # Under fsdp the layers can only be called together: accuracy waits for `evaluate`.
    scored = task.kind == "choice" and place.strategy != "fsdp"
    held_out = task.examples("validation")[: settings.evaluation_examples] if scored else []

    def evaluate(runner: Any) -> dict[str, float]:
        figures = mean_loss(runner, validation, place)
        if held_out:
            judged = judge(lora.inner(model), tokenizer, task, held_out)
            accuracy = judged.measures["accuracy"].value
            assert accuracy is not None  # only a figure whose scorer is missing has none
            figures["accuracy"] = accuracy
        return figures

    return fit(lora.inner(model), training, evaluate, settings, place)


def build(settings: Settings) -> tuple[Any, Any]:
    """The model as it is before the first step (peft's under LoRA), and its tokenizer."""
    base = models.resolve(settings.model)
    model, tokenizer = read_plain(base.folder), models.tokenizer(base)
    torch.manual_seed(settings.seed)
    new_tokens = add_tokens(model, tokenizer, get(settings.task))
    if settings.method == "lora":
        model = lora.inject(
            model,
            settings.rank,
            settings.alpha,
            settings.lora_dropout,
            settings.targets,
            new_tokens,
        )
    return model, tokenizer


def add_tokens(model: Any, tokenizer: Any, task: Task) -> list[int]:
    """Give tokenizer and model the special tokens of `task` that they lack; the ids of those.

    A new token starts as the mean of all embeddings: near no word, and as long as any.
    """
    known = tokenizer.get_vocab()
    new = [token for token in task.special_tokens if token not in known]
    if task.padding_token:
        tokenizer.pad_token = task.padding_token
    if not new:
        return []
    tokenizer.add_tokens(new, special_tokens=True)
    grow(model, len(tokenizer))
    return tokenizer.convert_tokens_to_ids(new)


def grow(model: Any, rows: int) -> None:
    """Make embedding and head `rows` long if they are shorter."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0)  # one and the same where tied


def _data(
    settings: Settings, task: Task, tokenizer: Any, context: int, place: Place
) -> tuple[Batches, list[Batch], str]:
    """Training batches and validation batches of the task, and the fingerprint of the latter."""
    if task.kind == "language_model":
        return _windows(settings, task, tokenizer, context, place)
    from finetune.training.examples import ExampleBatches

    most = settings.evaluation_examples
    training = ExampleBatches(
        task.examples("train"),
        tokenizer,
        max_tokens=context,
        batch=settings.batch,
        micro_batch=settings.micro_batch,
        seed=settings.seed,
    )
    held_out = task.examples("validation")[:most]
    validation = ExampleBatches(
        held_out,
        tokenizer,
        max_tokens=context,
        batch=len(held_out),
        micro_batch=settings.micro_batch,
        seed=0,
    )
    return training, validation.micro_batches(0, 0, 1), validation.fingerprint()


def _windows(
    settings: Settings, task: Task, tokenizer: Any, context: int, place: Place
) -> tuple[Batches, list[Batch], str]:
    """Running text: tokens in files below OUT/data, cut into windows."""
    from finetune.text.token_file import TokenFile, TokenWriter, tokenizer_sha256

    paths = {split: settings.out / "data" / f"{split}.tokens" for split in ("train", "validation")}
    if place.leads:
        for split, path in paths.items():
            examples = task.examples(split)
            about = {"tokenizer_sha256": tokenizer_sha256(tokenizer)}
            sources = [{"name": f"{task.name} {split}", "sha256": checksum(examples)}]
            with TokenWriter(path, len(tokenizer), sources=sources, **about) as writer:
                for example in examples:
                    encoded = tokenizer(example.target, add_special_tokens=False, verbose=False)
                    writer.append(np.array(encoded["input_ids"]), documents=1)
                writer.finish()
    wait(place)
    files = {split: TokenFile(path) for split, path in paths.items()}
    training = Windows(files["train"], context, settings.batch, settings.micro_batch, settings.seed)
    most = math.ceil(settings.evaluation_examples / 10)
    held_out = evaluation_windows(files["validation"], context, most, settings.micro_batch)
    return training, held_out, f"{files['validation'].sha256()[:16]}-{context}x{most}"
