"""Continue prompts with one model or several, side by side: greedy, by sampling, by beam search.

The decoding itself is transformers' `generate`. Prompts of different lengths share a batch: they
are padded on the left, where the mask hides the padding and positions start after it, so a prompt
gets the text that it would get alone, up to the rounding of sums. Sampled text depends on the
seed, the settings and the place in the batch, and on nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bench import terminal, text_files
from bench.errors import UsageError
from finetune.decoding.loading import DTYPE_NAMES, dtype_named, find, load_for_inference
from finetune.options import setting, to_json
from results.store import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = Path(__file__).parent / "assets" / "prompts.txt"


@dataclass(frozen=True)
class Settings:
    """What to continue, with which models, and how."""

    models: tuple[str, ...] = setting(
        ("smollm2-135m",), "Alias, hub id or folder; several are shown side by side."
    )
    prompt: tuple[str, ...] = setting((), "A prompt; may be repeated.")
    prompts: Path | None = setting(
        None, "File of prompts: one a line, or a .jsonl of {text}. Else ten that are shipped."
    )
    mode: str = setting("greedy", "How to choose tokens.", choices=("greedy", "sample", "beam"))
    temperature: float = setting(0.8, "Sampling: below 1 makes likely tokens likelier.", least=0)
    top_k: int = setting(50, "Sampling: only among the k likeliest; 0: all.", least=0)
    top_p: float = setting(1.0, "Sampling: only among the likeliest that hold this share.", least=0)
    beams: int = setting(4, "Beam search: texts that are kept.", least=1)
    new_tokens: int = setting(64, "Most tokens to add.", least=1)
    batch: int = setting(8, "Prompts computed together.", least=1)
    seed: int = setting(0, "Of the sampling.", least=0)
    dtype: str = setting("stored", "Type to compute in.", choices=DTYPE_NAMES)
    tokenizer: str | None = setting(None, "Model whose tokenizer is taken where one has none.")
    interactive: bool = setting(False, "Ask for questions or prompts until the input ends.")
    task: str = setting(
        "text", "With --interactive: what is asked.", choices=("text", "choice", "qa")
    )
    out: Path | None = setting(None, "JSON file for prompts and continuations.")

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError("temperature must be above 0; for the likeliest token: --mode greedy")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.prompt and self.prompts:
            raise UsageError("give --prompt or --prompts, not both")
        if self.task != "text" and not self.interactive:
            raise UsageError(f"--task {self.task} asks questions: add --interactive")
        if self.interactive and (self.prompt or self.prompts or self.out):
            raise UsageError("--interactive asks for its prompts: leave out --prompt(s) and --out")
        if not self.models:
            raise UsageError("name at least one model")


class Continuation(NamedTuple):
    """What a model added to a prompt. ids: up to the end-of-text token, which is left out."""

    ids: list[int]
    text: str
    ended: bool


def run(settings: Settings) -> dict[str, Any]:
    """Continue prompts with one model or several, side by side.

    Ten prompts are shipped; --prompt and --prompts give others. --interactive asks for prompts,
    or, with --task, for questions.
    """
    if settings.interactive:
        from finetune.decoding.chat import converse

        converse(settings)
        return {}
    prompts = read_prompts(settings.prompt, settings.prompts)
    revisions = [find(name).revision for name in settings.models]  # a bad name is refused early
    columns = [
        {"model": name, "revision": revision, "continuations": _column(name, prompts, settings)}
        for name, revision in zip(settings.models, revisions, strict=True)
    ]
    report = {"settings": to_json(settings), "prompts": prompts, "models": columns}
    show(report)
    if settings.out:
        write_atomically(settings.out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _column(name: str, prompts: list[str], settings: Settings) -> list[dict[str, Any]]:
    """One model's texts; it is gone from memory before the next one comes."""
    model, tokenizer = load_for_inference(name, dtype_named(settings.dtype), settings.tokenizer)
    found = continue_prompts(model, tokenizer, prompts, settings)
    return [{"text": t.text, "tokens": len(t.ids), "ended": t.ended} for t in found]


def read_prompts(given: tuple[str, ...] = (), file: Path | None = None) -> list[str]:
    """The prompts given, or those of the file, or the ten that are shipped."""
    if given:
        return list(given)
    if file is not None and not file.is_file():
        raise UsageError(f"--prompts {file}: there is no such file")
    content = text_files.read(file or PROMPTS)
    lines = content.splitlines() if isinstance(content, str) else content
    return [line.strip() for line in lines if line.strip()]


def continue_prompts(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: list[str], settings: Settings
) -> list[Continuation]:
    """The model's continuation of each prompt, in order.

    Raises ValueError if a prompt and its continuation do not fit the model's context.
    """
    found: list[Continuation] = []
    cuda = [model.device] if model.device.type == "cuda" else []
    for start in range(0, len(prompts), settings.batch):
        ids, mask = encode(tokenizer, prompts[start : start + settings.batch])
        check_fits(model, ids, settings.new_tokens)
        with torch.random.fork_rng(cuda):  # the caller's own random numbers stay as they were
            torch.manual_seed(settings.seed + start)
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=settings.new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=padding_id(tokenizer),
                **_choices(settings),
            )
        new = made[:, ids.shape[1] :].tolist()
        found += [continuation(row, tokenizer) for row in new]
    return found


def encode(tokenizer: "PreTrainedTokenizerBase", prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of the prompts, (prompts, longest) int64, padded on the left.

    An empty prompt becomes the token that texts begin with: the model writes freely.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else padding_id(tokenizer)
    rows = [tokenizer(prompt)["input_ids"] or [first] for prompt in prompts]
    return left_padded(rows, padding_id(tokenizer))


def left_padded(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as (ids, mask), (rows, longest) int64 each."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for row, line, seen in zip(rows, ids, mask, strict=True):
        line[longest - len(row) :] = torch.tensor(row)
        seen[longest - len(row) :] = 1
    return ids, mask


def check_fits(model: Any, ids: Tensor, new_tokens: int) -> None:
    """Raise ValueError unless the model knows all of `ids` and has room for `new_tokens` more."""
    largest, vocabulary = int(ids.max()), model.config.vocab_size
    if largest >= vocabulary:
        raise ValueError(
            f"token id {largest} is not among the model's {vocabulary}: "
            "the tokenizer is another model's; give the right one with --tokenizer"
        )
    context = model.config.max_position_embeddings
    if ids.shape[1] + new_tokens > context:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {new_tokens} new ones do not fit the model's "
            f"context of {context}; lower --new-tokens or shorten the prompt"
        )


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """An id to pad with; which one does not matter, since the mask hides it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def show(report: dict[str, Any]) -> None:
    """A table on a terminal, one column a model; plain text elsewhere."""
    columns = report["models"]
    texts = [[line["text"] for line in column["continuations"]] for column in columns]
    if terminal.out.is_terminal:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=True)
        for title in ("prompt", *(column["model"] for column in columns)):
            table.add_column(Text(title), overflow="fold", ratio=1)
        for prompt, *row in zip(report["prompts"], *texts, strict=True):
            table.add_row(*map(Text, (prompt, *row)))
        terminal.out.print(table, soft_wrap=False)
        return
    for number, (prompt, *row) in enumerate(zip(report["prompts"], *texts, strict=True), start=1):
        terminal.out.print(f"[{number}] {prompt}", markup=False)
        for column, text in zip(columns, row, strict=True):
            terminal.out.print(f"  {column['model']}: {text.strip()}", markup=False)


def _choices(settings: Settings) -> dict[str, Any]:
    """What transformers' `generate` wants to hear of the mode; nothing that the mode ignores."""
    if settings.mode == "sample":
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
        }
    return {"do_sample": False, "num_beams": settings.beams if settings.mode == "beam" else 1}


def continuation(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> Continuation:
    """What a row of new ids says, up to its end-of-text token."""
    ended = tokenizer.eos_token_id in ids
    if ended:  # what follows is padding up to the longest of the batch
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Continuation(ids, str(tokenizer.decode(ids, skip_special_tokens=True)), ended)
