"""Speculative decoding: a cheap draft proposes tokens, its parent checks them in one call.

The draft continues the text by `lookahead` tokens, one by one; the parent reads them all at once,
which costs it little more than reading one. Proposals are kept up to the first that is not the
parent's own choice, and the parent's choice takes its place (or follows the last), so a call of
the parent gives 1 to lookahead + 1 tokens. This is the greedy case of the papers.

What is sure: every token has the highest of the parent's logits given the text before it, whatever
the draft says. What is not: the parent's logits for several tokens at once and for one at a time
are sums in different orders. Where its two best logits are nearer than that rounding, this and
plain greedy decoding may choose differently, and go on differently from there. In float32 that is
rare; in bfloat16, where logits of 16 and more lie 0.125 apart and are often equal, smollm2-135m did
it once in some 80 tokens. So a parent that must be followed exactly is run in float32; the draft's
type never matters. speculate.py counts what differs instead of assuming that nothing does.

Sources: Y. Leviathan, M. Kalman, Y. Matias, "Fast Inference from Transformers via Speculative
Decoding", 2023, https://arxiv.org/abs/2211.17192; C. Chen et al., "Accelerating Large Language
Model Decoding with Speculative Sampling", 2023, https://arxiv.org/abs/2302.01318
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Result:
    """tokens: (1, prompt + new) int64. rounds: (proposed, accepted) of each call of the parent."""

    tokens: Tensor
    rounds: tuple[tuple[int, int], ...]

    @property
    def proposed(self) -> int:
        """Tokens that the draft proposed."""
        return sum(proposed for proposed, _ in self.rounds)

    @property
    def accepted(self) -> int:
        """Those of them that the parent would have chosen too."""
        return sum(accepted for _, accepted in self.rounds)

    @property
    def parent_calls(self) -> int:
        """Forward calls of the parent, the one that reads the prompt included."""
        return len(self.rounds)


class Reader:
    """A model and its cache of what it has read, the end of which can be taken back."""

    def __init__(self, model: Any):
        self.model = model
        self.cache: Any = None
        self.length = 0  # tokens in the cache

    def read(self, tokens: Tensor, last: int) -> Tensor:
        """Logits (last, vocab) after each of the last tokens of `tokens` (1, all of the text).

        Computes only what was not read before, which must be at least `last` tokens.
        """
        out = self.model(
            tokens[:, self.length :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        )
        self.cache, self.length = out.past_key_values, tokens.shape[1]
        return out.logits[0]

    def forget(self, length: int) -> None:
        """Take back what was read after the first `length` tokens."""
        if self.length > length:
            self.cache.crop(length - self.length)  # negative: how many to remove
            self.length = length


@torch.inference_mode()
def speculate(
    parent: Any,
    draft: Any,
    ids: Tensor,
    new_tokens: int,
    lookahead: int = 4,
    adaptive: bool = False,
) -> Result:
    """Greedy continuation of ids (1, prompt) by the parent, with the draft's help.

    Never stops early, like compress.generate. adaptive: `lookahead` is only where it starts, see
    `next_lookahead`. Raises ValueError if the two cannot work together on this prompt.
    """
    check_pair(parent, draft, ids, new_tokens, lookahead)
    ahead, behind = Reader(draft), Reader(parent)
    tokens, end = ids, ids.shape[1] + new_tokens
    rounds: list[tuple[int, int]] = []
    while (length := tokens.shape[1]) < end:
        count = min(lookahead, end - length - 1)  # one token comes from the parent in any case
        proposed = tokens
        for _ in range(count):
            best = ahead.read(proposed, 1).argmax(-1, keepdim=True)
            proposed = torch.cat([proposed, best], dim=1)
        choices = behind.read(proposed, count + 1).argmax(-1)
        agrees = (choices[:-1] == proposed[0, length:]).long()
        accepted = int(agrees.cumprod(0).sum())
        kept = length + accepted
        tokens = torch.cat([proposed[:, :kept], choices[None, accepted : accepted + 1]], dim=1)
        behind.forget(kept)
        ahead.forget(kept)
        rounds.append((count, accepted))
        if adaptive:
            lookahead = next_lookahead(lookahead, count, accepted)
    return Result(tokens, tuple(rounds))


def check_pair(parent: Any, draft: Any, ids: Tensor, new_tokens: int, lookahead: int) -> None:
    """Raise ValueError unless the draft can help the parent to continue `ids`."""
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise ValueError(f"speculation takes one prompt of (1, tokens), not {tuple(ids.shape)}")
    if lookahead < 1:
        raise ValueError(f"lookahead must be at least 1, not {lookahead}")
    sizes = parent.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the parent has {sizes[0]} tokens and the draft {sizes[1]}: "
            "a draft must share its parent's vocabulary"
        )
    for role, model in (("parent", parent), ("draft", draft)):
        context = model.config.max_position_embeddings
        if ids.shape[1] + new_tokens > context:
            raise ValueError(
                f"{ids.shape[1]} tokens and {new_tokens} new ones do not fit the {role}'s context "
                f"of {context}; ask for fewer"
            )


def next_lookahead(lookahead: int, proposed: int, accepted: int) -> int:
    """Two more after a round in which all was accepted, else one less, and never below 1.

    Source: the schedule "heuristic" of transformers' assisted generation,
    https://huggingface.co/docs/transformers/generation_strategies
    """
    return lookahead + 2 if accepted == proposed else max(1, lookahead - 1)


def acceptance(rounds: list[tuple[int, int]]) -> tuple[float | None, list[float | None]]:
    """How often the parent agrees: over all proposals, and by their place in a round.

    A proposal counts only if those before it in its round were accepted: the others were never
    put to the question. None where nothing was.
    """
    longest = max((proposed for proposed, _ in rounds), default=0)
    asked, agreed = [0] * longest, [0] * longest
    for proposed, accepted in rounds:
        for place in range(min(accepted + 1, proposed)):
            asked[place] += 1
            agreed[place] += place < accepted
    by_place = [_share(*pair) for pair in zip(agreed, asked, strict=True)]
    return _share(sum(agreed), sum(asked)), by_place


def expected_tokens(rate: float, lookahead: int) -> float:
    """Tokens per call of the parent if each proposal is accepted with chance `rate`: eq. 1."""
    return sum(rate**power for power in range(lookahead + 1))


def expected_speed_up(rate: float, lookahead: int, draft: float, check: float = 1.0) -> float:
    """Times that speculation is faster than plain decoding: theorem 3.8 of Leviathan et al.

    draft, check: cost of one token of the draft, and of one checking call of the parent, both over
    that of one plain step of the parent. The theorem takes check as 1: reading a few tokens at once
    is as fast as reading one, which holds where memory is the limit.
    """
    return expected_tokens(rate, lookahead) / (lookahead * draft + check)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
