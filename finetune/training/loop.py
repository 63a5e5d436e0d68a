"""The training loop: one for pretraining and fine-tuning, one process and many.

AdamW, a learning rate that rises linearly and falls as a cosine, clipped gradients, micro-batches
that add up to a step, bfloat16 arithmetic over float32 weights. The loss of a step is the mean over
all its targets, wherever they were worked out, so that neither the number of processes nor the
size of a micro-batch changes what is learned, up to the rounding of sums (and, with dropout,
another draw of the same kind). Everything random is seeded from the step number; so a run that was
killed goes on from its last checkpoint along the very same curve.

Source: I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019,
https://arxiv.org/abs/1711.05101; cosine: https://arxiv.org/abs/1608.03983
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.errors import UsageError
from bench.machine import cores
from bench.terminal import watching
from finetune.low_precision import fake_quantize_linears
from finetune.options import setting
from finetune.training import checkpoints, parallel
from finetune.training.attention import train_with_products
from finetune.training.batches import IGNORED, Batches
from finetune.training.journal import Journal, draw_curves
from finetune.training.language_model import LossModel
from finetune.training.parallel import Place

Evaluate = Callable[[Any], dict[str, float]]  # the spread LossModel -> named figures


@dataclass(frozen=True)
class LoopSettings:
    """How to train; what to train and on what is said by the commands' own settings."""

    out: Path = setting(Path("runs/new"), "Folder of the run; the same command resumes it.")
    epochs: float = setting(1.0, "Passes over the data.", least=0)
    steps: int | None = setting(None, "Steps, instead of --epochs.", least=1)
    batch: int = setting(32, "Sequences in a step, over all processes.", least=1)
    micro_batch: int = setting(8, "Sequences in one forward pass.", least=1)
    learning_rate: float = setting(6e-4, "Highest learning rate.", least=0)
    final_rate: float = setting(0.1, "Share of it that is left at the end.", least=0)
    warmup: float = setting(0.02, "Share of the steps in which the rate rises.", least=0)
    weight_decay: float = setting(0.1, "Of matrices; vectors have none.", least=0)
    beta2: float = setting(0.95, "Memory of AdamW's squared gradients.", least=0)
    clip: float = setting(1.0, "Longest gradient; 0: not clipped.", least=0)
    precision: str = setting("bf16", "Arithmetic; weights are float32.", choices=("bf16", "fp32"))
    checkpointing: bool = setting(False, "Recompute activations to save memory.")
    compile: bool = setting(False, "Run the model through torch.compile.")
    strategy: str = setting("auto", "Under torchrun.", choices=parallel.STRATEGIES)
    evaluate_every: int = setting(100, "Steps between evaluations.", least=1)
    save_every: int = setting(100, "Steps between checkpoints.", least=1)
    tensorboard: bool = setting(True, "Write TensorBoard events too.")
    threads: int | None = setting(None, "Threads to compute with; default: all cores.", least=1)
    seed: int = setting(0, "Of weights, order of data and dropout.", least=0)
    fake_weights: str | None = setting(
        None, "Round weights: FORMAT[:tensor|row|blockN][:pow2], or method:rtn(bits=4)."
    )
    fake_activations: str | None = setting(None, "Round the inputs of linear layers: FORMAT...")
    fake_gradients: str | None = setting(None, "Round the gradients of their outputs: FORMAT...")


# What may differ between a run and its continuation: the first line changes no bit of it, the
# second only rounding and draws of dropout, since what is learned is the same.
FREE = {"out", "evaluate_every", "save_every", "tensorboard", "checkpointing"}
FREE |= {"strategy", "threads", "compile", "micro_batch"}


def total_steps(settings: LoopSettings, data: Batches) -> int:
    """Steps of the whole run."""
    return settings.steps or max(1, math.ceil(settings.epochs * data.steps_per_epoch))


def rate_at(step: int, total: int, settings: LoopSettings) -> float:
    """The learning rate of step `step` (from 0) of `total`."""
    rising = math.ceil(settings.warmup * total)
    if step < rising:
        return settings.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)


def prepare_process(settings: LoopSettings, place: Place) -> None:
    """Threads, seed, and a refusal of batches that cannot be dealt out evenly."""
    if settings.batch % place.world:
        raise UsageError(f"--batch {settings.batch} cannot be shared by {place.world} processes")
    torch.set_num_threads(settings.threads or max(1, cores() // place.world))
    torch.manual_seed(settings.seed)


def fit(
    model: Any, data: Batches, evaluate: Evaluate, settings: LoopSettings, place: Place
) -> dict[str, float]:
    """Train `model` in place until the last step, from the last checkpoint if there is one.

    Returns the last evaluation and tokens_per_s (padding included), read_share (of training time
    spent on reading data). Raises KeyboardInterrupt after saving a checkpoint if SIGINT or SIGTERM
    came, FloatingPointError if loss or gradient is no longer finite.
    """
    if settings.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    train_with_products(model)
    rounded = (settings.fake_weights, settings.fake_activations, settings.fake_gradients)
    if any(rounded):
        fake_quantize_linears(model, *rounded)
    loss_model = LossModel(model).to(place.device)
    runner = parallel.spread(loss_model, place)
    if settings.compile:
        runner.compile()
    optimizer = _optimizer(loss_model, settings)
    total = total_steps(settings, data)
    start = 0
    if saved := checkpoints.newest(settings.out):
        saved.restore(loss_model, optimizer, place)
        start = saved.step
        del saved  # or its files stay open after they are deleted
    journal = Journal(settings.out, start, settings.tensorboard) if place.leads else None
    clock = _Clock()
    figures: dict[str, float] = {}

    def note(step: int, values: dict[str, float]) -> None:
        if journal:
            journal.write(step, values)

    def examine(step: int) -> None:
        figures.clear()
        runner.eval()
        with torch.no_grad(), _arithmetic(settings, place):
            figures.update(evaluate(runner))
        parallel.reshard(runner, place)
        runner.train()
        if not all(map(math.isfinite, figures.values())):
            raise FloatingPointError(f"step {step}: {figures}; lower --learning-rate")
        if step > start or start == 0:  # else the journal has it already
            note(step, {f"validation_{name}": value for name, value in figures.items()})
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        say(f"step {step} of {total}  {text}  {clock.text()}")

    try:
        with _watched(place) as (report, say), _stop_requests() as stopping:
            if start == 0 or start == total:
                examine(start)
            runner.train()
            for step in range(start, total):
                began = time.perf_counter()
                values = _step(runner, data, optimizer, step, total, settings, place, clock)
                clock.trained_s += time.perf_counter() - began
                note(step + 1, values)
                report("steps", step + 1, total)
                done = step + 1 == total
                if done or (step + 1) % settings.evaluate_every == 0:
                    examine(step + 1)
                stop = parallel.summed([float(bool(stopping))], place)[0] > 0
                if done or stop or (step + 1) % settings.save_every == 0:
                    if journal:
                        journal.keep()
                    checkpoints.save(settings.out, step + 1, loss_model, optimizer, place)
                if stop and not done:
                    raise KeyboardInterrupt(f"stopped after step {step + 1} of {total}")
    finally:
        if journal:
            journal.close()
    if place.leads:
        draw_curves(settings.out)
    return figures | clock.figures()


def _step(
    runner: Any,
    data: Batches,
    optimizer: Any,
    step: int,
    total: int,
    settings: LoopSettings,
    place: Place,
    clock: "_Clock",
) -> dict[str, float]:
    """One step of AdamW. Returns what the journal says of it."""
    torch.manual_seed((settings.seed * 1_000_003 + step) * 4099 + place.rank)  # dropout
    began = time.perf_counter()
    batches = data.micro_batches(step, place.rank, place.world)
    clock.read_s += time.perf_counter() - began
    learned = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    seen = sum(batch.ids.numel() for batch in batches)
    targets, tokens = parallel.summed([learned, seen], place)
    rate = rate_at(step, total, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    nll = 0.0
    for index, batch in enumerate(batches):
        parallel.accumulate(runner, place, index + 1 == len(batches))
        with _arithmetic(settings, place):
            sums = runner(batch.ids.to(place.device), batch.targets.to(place.device))
        # Strategies average gradients over processes; the mean wanted is over all targets.
        (sums.nll * (place.world / max(1.0, targets))).backward()
        nll += float(sums.nll.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
    length = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    loss = parallel.summed([nll], place)[0] / max(1.0, targets)
    if not math.isfinite(loss) or not math.isfinite(length):
        raise FloatingPointError(
            f"step {step + 1}: loss {loss}, gradient {length}; lower --learning-rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clock.tokens += tokens
    return {"loss": loss, "gradient": length, "rate": rate, "tokens": tokens}


def _optimizer(model: LossModel, settings: LoopSettings) -> Any:
    parameters = list(parallel.trainable(model).values())
    if not parameters:
        raise ValueError("nothing to train: every parameter is frozen")
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (0.9, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)


def _arithmetic(settings: LoopSettings, place: Place) -> Any:
    bf16 = settings.precision == "bf16"
    return torch.autocast(place.device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def _watched(place: Place) -> Iterator[tuple[Any, Any]]:
    """(report, say) of bench.terminal, silent in all processes but the first."""
    if not place.leads:
        yield (lambda unit, done, total: None), (lambda line: None)
        return
    with watching() as (watch, say):
        yield watch("training"), say


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGINT or SIGTERM came; a second one of a kind kills."""
    came: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)

    def remember(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {kind: signal.signal(kind, remember) for kind in kinds}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@dataclass
class _Clock:
    """Time spent and tokens seen since this process started."""

    trained_s: float = 0.0
    read_s: float = 0.0
    tokens: float = 0.0

    def figures(self) -> dict[str, float]:
        spent = self.trained_s or math.inf
        return {"tokens_per_s": self.tokens / spent, "read_share": self.read_s / spent}

    def text(self) -> str:
        return f"{self.tokens / self.trained_s:,.0f} tokens/s" if self.trained_s else ""
