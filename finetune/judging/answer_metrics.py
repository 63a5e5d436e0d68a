"""Judging answers: exact match and token F1 of texts, accuracy and F1 of choices.

An answer in words is compared with every reference and gets the best of the comparisons, after
both were lowercased and freed of punctuation, articles and extra blanks.

Source: P. Rajpurkar et al., "SQuAD", 2016, https://arxiv.org/abs/1606.05250 (exact match and F1, as
in the official script)
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from finetune.judging.intervals import Floats, Measure, bootstrap, mean, share

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Lowercase, without punctuation, articles and blanks that are not needed."""
    bare = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer equals one of the references once both are normalised."""
    return normalised(answer) in map(normalised, references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of the words of the answer against those of a reference; words count."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:  # "the" is no word: equal only if both are empty
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def answer_measures(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Measure], list[dict[str, float]]]:
    """exact_match and f1 over all answers, and both for each of them."""
    items = [
        {"exact_match": float(exact_match(answer, right)), "f1": token_f1(answer, right)}
        for answer, right in zip(answers, references, strict=True)
    ]
    measures = {
        "exact_match": share(sum(item["exact_match"] == 1 for item in items), len(items)),
        "f1": mean([item["f1"] for item in items], groups, seed),
    }
    return measures, items


def accuracy(chosen: Sequence[str], right: Sequence[str]) -> Measure:
    """The share of choices that are right."""
    return share(sum(a == b for a, b in zip(chosen, right, strict=True)), len(right))


def binary_f1(chosen: Sequence[str], right: Sequence[str], positive: str, seed: int = 0) -> Measure:
    """F1 of the class `positive`: 2 TP / (2 TP + FP + FN); 0 if it is neither chosen nor right."""
    counts = [
        (a == b == positive, a == positive != b, b == positive != a)
        for a, b in zip(chosen, right, strict=True)
    ]
    return bootstrap(counts, _f1_of_counts, seed=seed)


def _f1_of_counts(sums: Floats) -> Floats:
    hits, surplus, missed = sums.T
    total = 2 * hits + surplus + missed
    return 2 * hits / total.clip(min=1)
