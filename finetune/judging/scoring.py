"""What a model makes of examples: log-probabilities of candidates, and generated answers.

A candidate's score is the summed log-probability of its tokens after the prompt, without the
end-of-text token. That is what harnesses report, and it lets a model be scored before it has
learned that an answer ends; its price is that a candidate which is the beginning of another one
can never score less than it.

Both work on any GPT-2 or Llama of transformers and on what compress.load gives.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from finetune.generate import check_fits, continuation, left_padded, padding_id
from finetune.tasks import Example
from finetune.training.examples import keep_end, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Report = Callable[[int, int], None]  # (done, in all)
HEAD_ROWS = 256  # positions whose logits exist at once: 50 MB in float32 for 49k words


def silent(done: int, total: int) -> None:
    """The default progress: says nothing."""


class _Wanted(NamedTuple):
    """The tokens of one candidate, to be read off a row from position `start` on."""

    example: int
    candidate: int
    start: int
    tokens: list[int]


class _Row(NamedTuple):
    ids: list[int]
    wanted: list[_Wanted]


@torch.inference_mode()
def score_candidates(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    batch: int = 16,
    report: Report = silent,
) -> list[list[float]]:
    """For each example, the summed log-probability (nats) of each of its candidates.

    batch: rows in a forward pass. A candidate that another one's row already holds, such as one of
    a single token, costs no row. Prompts that do not fit the context lose their beginning. Raises
    FloatingPointError if the model gives NaN or infinity.
    """
    rows: list[_Row] = []
    for number, example in enumerate(examples):
        rows += _rows(model, tokenizer, example, number)
    rows.sort(key=lambda row: -len(row.ids))  # what does not fit memory fails first
    scores = [[0.0] * len(example.candidates) for example in examples]
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        hidden = _last_hidden(model, [row.ids for row in part], padding_id(tokenizer))
        places, owners, tokens = [], [], []
        for index, row in enumerate(part):
            for want in row.wanted:
                for offset, token in enumerate(want.tokens):
                    places.append((index, want.start + offset))
                    owners.append((want.example, want.candidate))
                    tokens.append(token)
        found = _log_probabilities(model, hidden, torch.tensor(places), torch.tensor(tokens))
        for (owner, candidate), value in zip(owners, found, strict=True):
            scores[owner][candidate] += value
        report(min(start + batch, len(rows)), len(rows))
    return scores


def _rows(
    model: Any, tokenizer: "PreTrainedTokenizerBase", example: Example, number: int
) -> list[_Row]:
    """The fewest rows that hold every candidate of an example."""
    context = model.config.max_position_embeddings
    parts = [token_ids(tokenizer, example.prompt, text) for text in example.candidates]
    longest = max(len(target) for _, target in parts)
    order = sorted(range(len(parts)), key=lambda index: -len(parts[index][1]))
    rows: list[_Row] = []
    for candidate in order:
        prompt, target = parts[candidate]
        prompt = keep_end(tokenizer, prompt, max(1, context + 1 - longest))  # the same for all
        ids = prompt + target[:-1]  # causal: what comes later cannot change a score
        row = next((row for row in rows if row.ids[: len(ids)] == ids), None)
        if row is None:
            row = _Row(ids, [])
            rows.append(row)
        row.wanted.append(_Wanted(number, candidate, len(prompt) - 1, target))
    return rows


def _last_hidden(model: Any, rows: list[list[int]], padding: int) -> Tensor:
    """(rows, longest, width): the last hidden states; padding on the right needs no mask."""
    ids = torch.full((len(rows), max(map(len, rows))), padding)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    check_fits(model, ids, 0)
    return model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state


def _log_probabilities(model: Any, hidden: Tensor, places: Tensor, tokens: Tensor) -> list[float]:
    """ln p of each token. places: (n, 2) row and position; tokens: (n,) what follows there."""
    head, found = model.get_output_embeddings(), []
    for where, wanted in zip(places.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True):
        where, wanted = where.to(hidden.device), wanted.to(hidden.device)
        logits = head(hidden[where[:, 0], where[:, 1]]).float()
        values = torch.log_softmax(logits, -1).gather(1, wanted[:, None])[:, 0]
        if not bool(values.isfinite().all()):
            raise FloatingPointError("the model's logits hold NaN or infinity")
        found += values.tolist()
    return found


class _NoRepeatInAnswer:
    """transformers' rule against repeated n-grams, for what comes after the prompt.

    As it stands the rule counts the prompt's n-grams as well, and would forbid an answer to name
    what it was asked about.
    """

    def __init__(self, ngram: int, prompt_tokens: int):
        from transformers import NoRepeatNGramLogitsProcessor

        self._rule, self._start = NoRepeatNGramLogitsProcessor(ngram), prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._rule(input_ids[:, self._start :], scores)


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    batch: int = 16,
    report: Report = silent,
) -> list[str]:
    """The model's answer to each prompt: the likeliest token each time, or by beam search.

    An answer has at least one token (chat models end at once after a bare question) and ends at
    the end-of-text token or the first line break. Prompts of like length share a batch, padded on
    the left. Raises ValueError if the context has no room for an answer.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    if room < 1:
        raise ValueError(
            f"{max_new_tokens} new tokens do not fit the model's context of "
            f"{model.config.max_position_embeddings}; lower --max-new-tokens"
        )
    rows = [keep_end(tokenizer, token_ids(tokenizer, text, "")[0], room) for text in prompts]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    answers = [""] * len(rows)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids, mask = left_padded([rows[index] for index in part], padding_id(tokenizer))
        check_fits(model, ids, max_new_tokens)
        search: dict[str, Any] = {"num_beams": beams, "do_sample": False}
        if beams > 1:
            search["length_penalty"] = length_penalty
        if no_repeat_ngram:
            search["logits_processor"] = [_NoRepeatInAnswer(no_repeat_ngram, ids.shape[1])]
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            min_new_tokens=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=padding_id(tokenizer),
            **search,
        )
        for index, new in zip(part, made[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = _first_line(tokenizer, new)
        report(min(start + batch, len(order)), len(order))
    return answers


def _first_line(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return continuation(ids, tokenizer).text.strip().split("\n", 1)[0].strip()
