"""Ask models by keyboard: a prompt to continue, a question, or a question with choices.

Every model named answers each question. The probability of a choice is its share among the choices
given; that of an answer is what the model gives to exactly these words after the question.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bench.terminal import out
from finetune.decoding.loading import dtype_named, load_for_inference
from finetune.generate import Settings, continue_prompts
from finetune.judging.scoring import score_candidates
from finetune.tasks import Example, choice, qa

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ask = Callable[[str], str]  # shows its argument, gives what was typed; EOFError at the end


def converse(settings: Settings, ask: Ask = input) -> None:
    """Ask for questions and print every model's answer, until a line is empty or the input ends."""
    dtype = dtype_named(settings.dtype)
    loaded = [
        (name, *load_for_inference(name, dtype, settings.tokenizer)) for name in settings.models
    ]
    answer = {"text": _continue, "choice": _choose, "qa": _answer}[settings.task]
    title = f"{'prompt' if settings.task == 'text' else 'question'} (empty: stop)> "
    choices: list[str] = []
    while question := _line(ask, title):
        if settings.task == "choice":
            choices = _choices(ask)
            if len(choices) < 2:
                out.print("a question needs two choices or more", markup=False)
                continue
        for name, model, tokenizer in loaded:
            said = answer(model, tokenizer, question, choices, settings)
            out.print(f"{name}: {said}", markup=False)


def probabilities(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompt: str, candidates: Sequence[str]
) -> list[float]:
    """Share of each candidate continuation of the prompt among all of them; they add up to 1."""
    logs = _log_probabilities(model, tokenizer, prompt, candidates)
    return torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()


def _log_probabilities(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompt: str, candidates: Sequence[str]
) -> list[float]:
    example = Example(prompt, candidates[0], tuple(candidates))
    return score_candidates(model, tokenizer, [example])[0]


def _continue(
    model: Any, tokenizer: Any, question: str, choices: list[str], settings: Settings
) -> str:
    return continue_prompts(model, tokenizer, [question], settings)[0].text


def _choose(
    model: Any, tokenizer: Any, question: str, choices: list[str], settings: Settings
) -> str:
    prompt, candidates = choice.ask(question, choices)
    shares = probabilities(model, tokenizer, prompt, candidates)
    ranked = sorted(zip(shares, choices, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{text} ({share:.1%})" for share, text in ranked)


def _answer(
    model: Any, tokenizer: Any, question: str, choices: list[str], settings: Settings
) -> str:
    prompt = qa.ask(question)
    text = continue_prompts(model, tokenizer, [prompt], settings)[0].text
    first = text.strip().partition("\n")[0]  # a model that was not tuned goes on with a new line
    if not first:
        return "(no answer)"
    chance = math.exp(_log_probabilities(model, tokenizer, prompt, [f" {first}"])[0])
    return f"{first} ({chance:.1%})"


def _choices(ask: Ask) -> list[str]:
    """Lines up to an empty one."""
    choices: list[str] = []
    while line := _line(ask, f"choice {len(choices) + 1} (empty: that is all)> "):
        choices.append(line)
    return choices


def _line(ask: Ask, title: str) -> str:
    """What is typed, without space around it; empty at the end of the input."""
    try:
        return ask(title).strip()
    except EOFError:
        return ""
