"""Generated text against several references: BLEU, NIST, METEOR, ROUGE-L, CIDEr as in E2E.

The figures are those of the E2E challenge's own script: BLEU-4 and NIST-5 on words cut as
mteval-v13a cuts them, without regard to case; METEOR 1.5, ROUGE-L (beta 1.2) and CIDEr on words of
the Penn Treebank tokenizer, lowercased, without punctuation. BLEU is sacrebleu's; METEOR (a Java
program), ROUGE-L and CIDEr are pycocoevalcap's. NIST is worked out here: nltk's `corpus_nist`
matches an answer with the one best reference and takes that one's length, where mteval matches
with all of them at once and takes their mean length; with one reference the two agree.

Without Java there is no METEOR, and ROUGE-L and CIDEr use a regular expression in place of the
tokenizer: near, but not comparable with published figures. The protocol says which it was.

Source: K. Papineni et al., "BLEU", 2002, https://aclanthology.org/P02-1040/; G. Doddington,
"Automatic Evaluation ... Using N-gram Co-Occurrence Statistics", 2002 (NIST); O. Dusek et al.,
"Evaluating the State-of-the-Art of End-to-End NLG", 2020, https://arxiv.org/abs/1901.07931
"""

import math
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.judging.intervals import Floats, Measure, bootstrap, mean

ORDERS = 4  # n-grams of BLEU and CIDEr
NIST_ORDERS = 5
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2  # the penalty halves at 2/3 of the mean length
NO_JAVA = "skipped: no Java"
WORDS = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't\b)|\w+(?:[-.,/]\w+)*|[^\w\s]")
PTB = "edu.stanford.nlp.process.PTBTokenizer"


class NlgScores(NamedTuple):
    """measures: by metric; items: the figures of each answer, where a metric has them."""

    measures: dict[str, Measure]
    items: list[dict[str, float]]
    protocol: dict[str, Any]


def nlg_scores(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[str] | None = None,
    seed: int = 0,
    java: bool | None = None,
) -> NlgScores:
    """bleu, nist, meteor, rouge_l and cider of all answers; see the top of this file.

    java: whether to use it; None: if it is there. CIDEr weighs words by how many of the given
    items use them, so figures of a part of a test set are not comparable with those of the whole.
    """
    if not answers or len(answers) != len(references) or not all(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} lists of references")
    java = java_works() if java is None else java
    answers = [_one_line(answer) for answer in answers]
    references = [[_one_line(text) for text in texts] for texts in references]
    bleu, signature = bleu_measure(answers, references, groups, seed)
    nist = bootstrap(
        nist_counts(answers, references), nist_of, groups, seed, "weights of n-grams held fixed"
    )
    words, reference_words = _tokenised(answers, references, java)
    rouge, cider = rouge_l(words, reference_words), cider_scores(words, reference_words)
    items = [{"rouge_l": a, "cider": b} for a, b in zip(rouge, cider, strict=True)]
    meteor = Measure(None, method=NO_JAVA)
    if java:
        value, per_item = meteor_scores(words, reference_words)
        meteor = Measure(value, method="none: its sums stay in the Java program")
        for item, score in zip(items, per_item, strict=True):
            item["meteor"] = score
    measures = {
        "bleu": bleu,
        "nist": nist,
        "meteor": meteor,
        "rouge_l": mean(rouge, groups, seed),
        "cider": mean(cider, groups, seed),
    }
    tokenizer = "Penn Treebank (Stanford CoreNLP 3.4.1)" if java else "regular expression (no Java)"
    protocol = {
        "bleu": signature,
        "nist": "mteval-v13a: 5-grams, 13a tokens, lowercase, mean reference length",
        "meteor": "1.5, English, -norm" if java else NO_JAVA,
        "rouge_l_and_cider": f"pycocoevalcap; tokens: {tokenizer}",
    }
    return NlgScores(measures, items, protocol)


def check_installed() -> None:
    """Raise ValueError if one of the libraries is missing."""
    _library("sacrebleu")
    _library("pycocoevalcap.cider.cider")


def java_works() -> bool:
    """Whether a Java that runs is on the path."""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True).returncode == 0


def bleu_measure(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Measure, str]:
    """Corpus BLEU-4 (0 to 1) and sacrebleu's signature of how it was worked out."""
    bleu = _library("sacrebleu").BLEU
    # Each answer by itself, for its counts: effective_order only silences advice about the score.
    single = bleu(lowercase=True, tokenize="13a", effective_order=True)
    counts = []
    for answer, texts in zip(answers, references, strict=True):
        found = single.sentence_score(answer, list(texts))
        counts.append([found.sys_len, found.ref_len, *found.counts, *found.totals])

    def of_sums(sums: Floats) -> list[float]:
        scores = []
        for row in sums.astype(int).tolist():
            correct, total = row[2 : 2 + ORDERS], row[2 + ORDERS :]
            found = bleu.compute_bleu(correct, total, row[0], row[1], smooth_method="exp")
            scores.append(found.score / 100)
        return scores

    corpus = bleu(lowercase=True, tokenize="13a", force=True)
    most = max(map(len, references))
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    value = corpus.corpus_score(list(answers), columns).score / 100
    interval = bootstrap(counts, of_sums, groups, seed)
    measure = Measure(value, interval.low, interval.high, interval.method)
    return measure, str(corpus.get_signature())


def nist_counts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """(items, 11): information of the matched n-grams, answers' n-grams (5 each), mean length."""
    tokenizer = _library("sacrebleu").BLEU(tokenize="13a").tokenizer

    def cut(text: str) -> list[str]:
        return tokenizer(text.lower()).split()

    seen: Counter[tuple[str, ...]] = Counter()  # in all references; () counts every word
    split_references = [[cut(text) for text in texts] for texts in references]
    for texts in split_references:
        for words in texts:
            seen[()] += len(words)
            for order in range(1, NIST_ORDERS + 1):
                seen.update(_ngrams(words, order))
    rows = []
    for answer, texts in zip(answers, split_references, strict=True):
        words = cut(answer)
        information, totals = [], []
        for order in range(1, NIST_ORDERS + 1):
            own = Counter(_ngrams(words, order))
            most: Counter[tuple[str, ...]] = Counter()
            for text in texts:
                most |= Counter(_ngrams(text, order))  # the greatest count in any reference
            hits = own & most
            information.append(
                sum(n * math.log2(seen[gram[:-1]] / seen[gram]) for gram, n in hits.items())
            )
            totals.append(max(0, len(words) - order + 1))
        rows.append([*information, *totals, sum(map(len, texts)) / len(texts)])
    return np.array(rows)


def nist_of(sums: Floats) -> Floats:
    """(m, 11) summed counts -> (m,) NIST scores."""
    information, totals = sums[:, :NIST_ORDERS], sums[:, NIST_ORDERS:-1]
    precision = (information / totals.clip(min=1)).sum(1)
    length = (totals[:, 0] / sums[:, -1].clip(min=1e-9)).clip(min=1e-9, max=1)
    return precision * np.exp(-NIST_BETA * np.log(length) ** 2)


def _ngrams(words: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each tokenised answer: best precision and best recall over the references."""
    scorer = _library("pycocoevalcap.rouge.rouge").Rouge()
    _, scores = scorer.compute_score(*_by_number(answers, references))
    return [float(score) for score in scores]


def cider_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of each tokenised answer; CIDEr of the corpus is their mean."""
    scorer = _library("pycocoevalcap.cider.cider").Cider()
    _, scores = scorer.compute_score(*_by_number(answers, references))
    return [float(score) for score in scores]


def meteor_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """METEOR 1.5 of the corpus and of each tokenised answer. Starts Java; takes seconds.

    Raises ValueError if the Java program stops.
    """
    scorer = _library("pycocoevalcap.meteor.meteor").Meteor()
    process = scorer.meteor_p
    try:
        corpus, scores = scorer.compute_score(*_by_number(answers, references))
        return float(corpus), [float(score) for score in scores]
    except (OSError, ValueError) as error:
        scorer.lock = threading.Lock()  # the old one is held, and __del__ would wait for it
        raise ValueError(f"METEOR's Java program stopped ({error}); has it 2 GB?") from None
    finally:
        process.kill()  # it would wait for more lines
        for stream in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):  # what a dead program did not read
                stream.close()
        process.wait()


def _by_number(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Any, Any]:
    """(references, answers) as pycocoevalcap takes them."""
    return dict(enumerate(map(list, references))), {i: [text] for i, text in enumerate(answers)}


def _tokenised(
    answers: Sequence[str], references: Sequence[Sequence[str]], java: bool
) -> tuple[list[str], list[list[str]]]:
    """Answers and references as words parted by blanks, lowercase, without punctuation."""
    texts = [*answers, *(text for group in references for text in group)]
    marks = set(_library("pycocoevalcap.tokenizer.ptbtokenizer").PUNCTUATIONS)
    cut = ptb_words(texts) if java else [WORDS.findall(text.lower()) for text in texts]
    lines = iter([" ".join(word for word in words if word not in marks) for words in cut])
    return [next(lines) for _ in answers], [[next(lines) for _ in group] for group in references]


def ptb_words(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text (one line each), by the tokenizer that pycocoevalcap carries.

    Called here rather than through its class, which writes into the package's own folder.
    """
    home = Path(_library("pycocoevalcap.tokenizer.ptbtokenizer").__file__).parent
    [jar] = home.glob("stanford-corenlp-*.jar")
    command = ["java", "-cp", str(jar), PTB, "-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    filled = [text for text in texts if text]
    done = subprocess.run(command, input="\n".join(filled).encode(), capture_output=True)
    lines = done.stdout.decode().rstrip("\n").split("\n") if filled else []
    if done.returncode or len(lines) != len(filled):
        raise ValueError(f"the Penn Treebank tokenizer failed (java, exit {done.returncode})")
    rest = iter(lines)
    return [next(rest).split() if text else [] for text in texts]


def _one_line(text: str) -> str:
    """Blanks and line breaks of every kind as one space; "|||" parts METEOR's fields."""
    return " ".join(text.replace("|||", " ").split())


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(
            f"the package {package} is missing (pip install 'slimbench[finetune]')"
        ) from error
