"""Train a GPT-2 or Llama from scratch, from raw text or prepared tokens to a plain model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import models
from bench.errors import UsageError
from bench.terminal import err
from compress.dtypes import DTYPES
from finetune.options import setting
from finetune.text.token_file import TokenFile, tokenizer_sha256
from finetune.training import runs
from finetune.training.batches import Windows, evaluation_windows
from finetune.training.loop import LoopSettings, fit, prepare_process
from finetune.training.mean_loss import mean_loss
from finetune.training.new_model import Architecture, continue_from, make
from finetune.training.parallel import Place, placed, wait


@dataclass(frozen=True)
class Settings(Architecture, LoopSettings):
    """What to train on, besides the sizes of the model and the settings of the loop."""

    data: Path | None = setting(None, "Folder made by `prepare`.")
    text: tuple[str, ...] = setting((), "Raw files or folders instead: prepared in OUT/data.")
    vocabulary: int | None = setting(
        None, "With --text: train a byte-level BPE of this size.", least=257
    )
    tokenizer: str | None = setting(None, "With --text: a model whose tokenizer to use instead.")
    start: str | None = setting(
        None, "Model whose weights to begin with, where names and shapes fit."
    )
    evaluation_windows: int = setting(100, "Windows of held-out text per evaluation.", least=1)
    dtype: str = setting("float32", "Type of the finished weights.", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        """Raises UsageError if the source of tokens is not clear."""
        if bool(self.data) == bool(self.text):
            raise UsageError("give either --data (a prepared folder) or --text (raw files)")
        if self.text and bool(self.vocabulary) == bool(self.tokenizer):
            raise UsageError("with --text give either --vocabulary (to train one) or --tokenizer")


def run(settings: Settings) -> Path:
    """Train a GPT-2 or Llama from scratch; the same command again resumes a stopped run.

    OUT/model is the finished model, a plain folder that the bench takes as --model.
    """
    from finetune.merge import finish

    with placed(settings.strategy) as place:
        prepare_process(settings, place)
        figures = _learn(settings, place)
        return finish(settings.out, figures, place)


def _learn(settings: Settings, place: Place) -> dict[str, float]:
    """Train to the last step; the last evaluation and the speed."""
    runs.check(settings, "pretrain")
    data = _prepared(settings, place)
    training, held_out = token_files(data)
    windows = Windows(
        training, settings.context, settings.batch, settings.micro_batch, settings.seed
    )
    validation = evaluation_windows(
        held_out, settings.context, settings.evaluation_windows, settings.micro_batch
    )
    origin: dict[str, Any] = {
        "data": {"train": training.sha256(), "validation": held_out.sha256()},
        "sources": training.header.get("sources"),
        "tokenizer": training.header["tokenizer_sha256"],
    }
    if settings.start:
        base = models.resolve(settings.start)
        origin["base"] = {
            "name": settings.start,
            "alias": base.alias,
            "revision": base.revision,
        }
    runs.begin(settings, "pretrain", origin, place)
    model, _ = build(settings)
    positions = model.config.max_position_embeddings
    if settings.context > positions:
        raise UsageError(f"--context {settings.context}: this model has {positions} positions")
    if place.leads:
        count = sum(parameter.numel() for parameter in model.parameters())
        err.print(
            f"{count / 1e6:.2f}M parameters, {len(training.tokens):,} tokens of text, "
            f"{windows.steps_per_epoch} steps an epoch",
            markup=False,
        )
    return fit(model, windows, lambda runner: mean_loss(runner, validation, place), settings, place)


def build(settings: Settings) -> tuple[Any, Any]:
    """The model as it is before the first step, and its tokenizer."""
    import torch

    tokenizer = models.tokenizer_in(_data_folder(settings) / "tokenizer")
    torch.manual_seed(settings.seed)
    model = make(settings, len(tokenizer), tokenizer.eos_token_id)
    if settings.start:
        fresh = continue_from(model, models.resolve(settings.start).folder)
        if fresh:
            err.print(f"new weights, not in {settings.start}: {', '.join(fresh)}", markup=False)
    return model, tokenizer


def token_files(data: Path) -> tuple[TokenFile, TokenFile]:
    """Training and validation tokens of a prepared folder.

    Raises ValueError if one is missing, or the tokenizer beside them is not theirs.
    """
    paths = [data / f"{split}.tokens" for split in ("train", "validation")]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing; make it with: python -m finetune prepare")
    training, held_out = map(TokenFile, paths)
    meaning = tokenizer_sha256(models.tokenizer_in(data / "tokenizer"))
    for file in (training, held_out):
        if file.header["tokenizer_sha256"] != meaning:
            raise ValueError(f"{file.path} belongs to another tokenizer; run `prepare` again")
    return training, held_out


def _data_folder(settings: Settings) -> Path:
    return settings.data or settings.out / "data"


def _prepared(settings: Settings, place: Place) -> Path:
    """The folder of tokens; made from raw text first if that is what was given."""
    if settings.text and place.leads:
        from finetune import prepare

        prepare.run(
            prepare.Settings(
                inputs=settings.text,
                out=_data_folder(settings),
                tokenizer=settings.tokenizer,
                train_tokenizer=settings.vocabulary,
            )
        )
    wait(place)
    return _data_folder(settings)
