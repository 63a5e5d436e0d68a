"""Measure speculative decoding: acceptance, speed-up against plain greedy decoding, equality.

Plain and speculative decoding of the same prompt follow each other, in turns which comes first, so
that each ratio pairs two neighbours in time; the speed-up is the median of the ratios, and all
samples are kept. Both end after the same number of tokens. Beside it stands what the paper's
formula makes of the measured acceptance and of the measured costs of a draft's and a checking call.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

import compress
from bench import machine, models
from bench.errors import UsageError
from bench.terminal import out
from compress import checkpoint
from finetune.decoding.loading import DTYPE_NAMES, dtype_named, find, has_tokenizer, tokenizer_of
from finetune.decoding.speculative import Reader, Result, acceptance, expected_speed_up, speculate
from finetune.generate import encode, read_prompts
from finetune.options import setting, to_json
from results.store import write_atomically

T = TypeVar("T")
COST_REPEATS = 30


@dataclass(frozen=True)
class Settings:
    """Which parent, which draft, on what."""

    model: str = setting("smollm2-135m", "The parent: alias, hub id or folder.")
    draft: str = setting(
        "rtn(bits=4)",
        "The draft: a model of the same tokenizer, a compressed folder, or a method that needs no "
        "calibration and is applied to the parent.",
    )
    lookahead: int = setting(4, "Tokens that the draft proposes at a time.", least=1)
    adaptive: bool = setting(False, "Let the lookahead follow what is accepted.")
    prompt: tuple[str, ...] = setting((), "A prompt; may be repeated.")
    prompts: Path | None = setting(None, "File of prompts. Else ten that are shipped.")
    new_tokens: int = setting(64, "Tokens to add to each prompt.", least=1)
    repeats: int = setting(3, "Times that each prompt is decoded in both ways.", least=1)
    dtype: str = setting(
        "float32", "Type of the parent: float32 to follow it exactly.", choices=DTYPE_NAMES
    )
    draft_dtype: str = setting(
        "bfloat16", "Type of the draft: bfloat16 for the 4-bit kernel.", choices=DTYPE_NAMES
    )
    tokenizer: str | None = setting(None, "Model whose tokenizer is taken if the parent has none.")
    out: Path | None = setting(None, "JSON file for the figures and all samples.")

    def __post_init__(self) -> None:
        if self.prompt and self.prompts:
            raise UsageError("give --prompt or --prompts, not both")


def run(settings: Settings) -> dict[str, Any]:
    """Measure speculative decoding of a model with a draft against plain greedy decoding."""
    prompts = read_prompts(settings.prompt, settings.prompts)
    found = find(settings.model)
    tokenizer = tokenizer_of(found, settings.tokenizer)
    parent = checkpoint.load(found.folder, dtype_named(settings.dtype))
    draft = load_draft(settings.draft, found, tokenizer, dtype_named(settings.draft_dtype))
    texts = [encode(tokenizer, [prompt])[0] for prompt in prompts]
    report = {
        "settings": to_json(settings),
        "parent_revision": found.revision,
        "machine": machine.machine() | {"threads": torch.get_num_threads()},
        "packages": machine.packages(),
    } | compare(parent, draft, texts, settings)
    for line, prompt in zip(report["prompts"], prompts, strict=True):
        line["prompt"] = prompt
        line["text"] = tokenizer.decode(line["ids"], skip_special_tokens=True)
    for text in summary_lines(report):
        out.print(text, markup=False)
    if settings.out:
        write_atomically(settings.out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def load_draft(name: str, parent: models.Model, tokenizer: Any, dtype: torch.dtype | None) -> Any:
    """The draft: the parent compressed by a method called `name`, or the model of that name.

    Raises ValueError if it has a tokenizer of its own that is not the parent's.
    """
    if name.partition("(")[0].strip() in compress.names():
        made = compress.apply(name, checkpoint.load(parent.folder))
        return made.to(dtype) if dtype else made
    found = find(name)
    if has_tokenizer(found) and models.tokenizer(found).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{name} numbers its tokens otherwise than {parent.alias}: "
            "a draft must share its parent's tokenizer"
        )
    return checkpoint.load(found.folder, dtype)


def compare(parent: Any, draft: Any, texts: list[Tensor], settings: Settings) -> dict[str, Any]:
    """Decode each of the texts (1, tokens) in both ways, `repeats` times: samples and summary."""
    runner, new = compress.TorchRunner(parent), settings.new_tokens
    texts = [ids.to(parent.device) for ids in texts]
    lines: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []

    def both(ids: Tensor, plain_first: bool) -> tuple[list[int], Result, float, float]:
        def plain() -> list[int]:
            return compress.generate(runner, ids, new)[0].tolist()

        def speculative() -> Result:
            return speculate(parent, draft, ids, new, settings.lookahead, settings.adaptive)

        if plain_first:
            plain_ms, expected = _timed(plain)
            speculative_ms, result = _timed(speculative)
        else:
            speculative_ms, result = _timed(speculative)
            plain_ms, expected = _timed(plain)
        return expected, result, plain_ms, speculative_ms

    was_collecting = gc.isenabled()
    gc.disable()
    try:
        both(texts[0], plain_first=False)  # warm-up: packs weights, fills caches
        for repeat in range(settings.repeats):
            for index, ids in enumerate(texts):
                expected, result, *times = both(ids, plain_first=(repeat + index) % 2 == 0)
                found = result.tokens[0].tolist()
                samples.append(
                    {"prompt": index, "repeat": repeat, "identical": found == expected}
                    | dict(zip(("plain_ms", "speculative_ms"), times, strict=True))
                )
                if repeat == 0:
                    lines.append({"ids": expected[ids.shape[1] :], "rounds": result.rounds})
                    lines[-1] |= parting(parent, expected, found, ids.shape[1])
        costs = _costs(parent, draft, texts[0], settings.lookahead)
    finally:
        if was_collecting:
            gc.enable()
    return {
        "summary": summary(lines, samples, costs, settings),
        "costs": costs,
        "prompts": lines,
        "samples": samples,
    }


@torch.inference_mode()
def parting(parent: Any, expected: list[int], found: list[int], start: int) -> dict[str, Any]:
    """After how many new tokens two continuations part, and the parent's logits there.

    logit_gap: of the expected token over the other; near 0 it was rounding, else a mistake. Both
    values are None for equal continuations. start: tokens of the prompt.
    """
    if expected == found:
        return {"parts_after": None, "logit_gap": None}
    place = next(i for i in range(start, len(expected)) if expected[i] != found[i])
    text = torch.tensor([expected[:place]], device=parent.device)
    logits = Reader(parent).read(text, 1)[0].float()
    gap = float(logits[expected[place]] - logits[found[place]])
    return {"parts_after": place - start, "logit_gap": gap}


def summary(
    lines: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    costs: dict[str, float],
    settings: Settings,
) -> dict[str, Any]:
    """The figures that samples and costs give."""
    rounds = [pair for line in lines for pair in line["rounds"]]
    rate, by_place = acceptance(rounds)
    ratios = [sample["plain_ms"] / sample["speculative_ms"] for sample in samples]
    low, middle, high = map(float, numpy.percentile(ratios, [25, 50, 75]))
    step = costs["parent_step_ms"]
    draft, check = costs["draft_step_ms"] / step, costs["parent_check_ms"] / step
    by_theorem = by_costs = None
    if rate is not None and not settings.adaptive:  # the formula is about one lookahead
        by_theorem = expected_speed_up(rate, settings.lookahead, draft)
        by_costs = expected_speed_up(rate, settings.lookahead, draft, check)
    return {
        "acceptance": rate,
        "acceptance_by_place": by_place,
        "tokens_per_parent_call": settings.new_tokens * len(lines) / len(rounds),
        "speed_up": middle,
        "speed_up_quartiles": [low, high],
        "draft_cost": draft,
        "check_cost": check,
        "speed_up_by_theorem": by_theorem,
        "speed_up_by_costs": by_costs,
        "identical_runs": sum(sample["identical"] for sample in samples),
        "runs": len(samples),
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """What a person reads of a report."""
    found = report["summary"]
    if found["acceptance"] is None:
        return ["nothing was proposed: ask for more than one new token"]
    places = " ".join("-" if p is None else f"{p:.2f}" for p in found["acceptance_by_place"])
    low, high = found["speed_up_quartiles"]
    lines = [
        f"accepted {found['acceptance']:.3f} of the proposals put to the parent ({places} by "
        f"place), {found['tokens_per_parent_call']:.2f} tokens a call of the parent",
        f"speed-up {found['speed_up']:.2f} (quartiles {low:.2f} to {high:.2f}) "
        f"over plain greedy decoding, {found['runs']} pairs",
        f"a draft's step costs {found['draft_cost']:.2f} and a check {found['check_cost']:.2f} "
        "of a plain step",
    ]
    if found["speed_up_by_costs"] is not None:
        lines[-1] += (
            f": expected {found['speed_up_by_costs']:.2f}, "
            f"or {found['speed_up_by_theorem']:.2f} if a check cost one step"
        )
    lines.append(f"output identical to plain greedy in {found['identical_runs']} of the pairs")
    lines += [
        f"prompt {number} parts after {line['parts_after']} tokens, "
        f"where the two logits are {line['logit_gap']:.2g} apart"
        for number, line in enumerate(report["prompts"], start=1)
        if line["parts_after"] is not None
    ]
    return lines


def _costs(parent: Any, draft: Any, ids: Tensor, lookahead: int) -> dict[str, float]:
    """Median ms of a plain step of each model, and of the parent's check, after the text `ids`."""
    context = min(model.config.max_position_embeddings for model in (parent, draft))
    ids = ids[:, : context - lookahead - 1]
    rows = {"parent_step_ms": 1, "parent_check_ms": lookahead + 1, "draft_step_ms": 1}
    readers = {name: Reader(draft if name.startswith("draft") else parent) for name in rows}
    samples: dict[str, list[float]] = {name: [] for name in rows}
    with torch.inference_mode():
        for reader in readers.values():
            reader.read(ids, 1)
        for _ in range(COST_REPEATS):
            for name, reader in readers.items():
                samples[name].append(_timed(partial(_step, reader, ids, rows[name]))[0])
                reader.forget(ids.shape[1])
    return {name: float(numpy.median(times)) for name, times in samples.items()}


def _step(reader: Reader, ids: Tensor, rows: int) -> list[int]:
    """Read `rows` tokens on top of `ids`; what comes back makes sure that they were computed."""
    text = torch.cat([ids, ids[:, -1:].expand(1, rows)], dim=1)
    return reader.read(text, rows).argmax(-1).tolist()


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    value = call()
    return 1000 * (time.perf_counter() - start), value
