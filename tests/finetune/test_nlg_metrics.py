"""nlg_metrics: every figure by hand or against another implementation; with and without Java."""

import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from finetune.judging import nlg_metrics
from finetune.judging.nlg_metrics import (
    WORDS,
    bleu_measure,
    cider_scores,
    java_works,
    meteor_scores,
    nist_counts,
    nist_of,
    nlg_scores,
    ptb_words,
    rouge_l,
)

needs_java = pytest.mark.skipif(not java_works(), reason="no Java here")


def nist(answers, references):
    return float(nist_of(nist_counts(answers, references).sum(0, keepdims=True))[0])


def bleu(answers, references):
    return bleu_measure(answers, references)[0].value


def sentences(count, seed):
    generator = random.Random(seed)
    words = ["the", "a", "red", "old", "pub", "near", "river", "serves", "food", "it", "is", "with"]
    return [" ".join(generator.choices(words, k=generator.randint(6, 14))) for _ in range(count)]


def test_bleu_of_two_sentences_by_hand():
    answers = ["The cat sat on the mat", "a dog ran home fast"]
    references = [["the cat sat on the Mat"], ["a dog ran back home"]]
    # matched / made: words 6 + 4 of 11, pairs 5 + 2 of 9, triples 4 + 1 of 7, fours 3 + 0 of 5
    assert bleu(answers, references) == pytest.approx((10 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** 0.25)


def test_bleu_takes_the_closest_length_and_clips_by_the_best_reference():
    answers = ["the cat sat on the mat", "a dog ran"]
    references = [
        ["the cat sat on the mat"],
        ["a dog ran far away from home", "a dog ran back home"],
    ]
    # everything matches; 9 words against 6 + 5
    assert bleu(answers, references) == pytest.approx(math.exp(1 - 11 / 9))
    clipped = bleu(["the the the the the"], [["the cat and the dog", "the hat"]])
    # 2 of 5 words, then nothing: 1/2 of a hit of 4, 1/4 of 3, 1/8 of 2 (mteval's smoothing)
    assert clipped == pytest.approx((2 / 5 * 0.5 / 4 * 0.25 / 3 * 0.125 / 2) ** 0.25)


def test_bleu_words_are_those_of_mteval():
    same = bleu(["It costs £20-25, nice!"] * 2, [["it costs £20-25 , nice !"]] * 2)
    assert same == pytest.approx(1)


def test_bleu_interval_comes_from_summed_counts():
    from sacrebleu.metrics import BLEU

    answers, references = sentences(30, 1), [[text] for text in sentences(30, 2)]
    found, signature = bleu_measure(answers, references)
    assert "case:lc" in signature and "tok:13a" in signature and "smooth:exp" in signature
    assert found.low < found.value < found.high
    draws = np.random.default_rng(0).integers(30, size=(300, 30))
    scores = [
        BLEU(lowercase=True, force=True)
        .corpus_score([answers[i] for i in draw], [[references[i][0] for i in draw]])
        .score
        / 100
        for draw in draws
    ]
    low, high = np.quantile(scores, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_nist_by_hand():
    references = [["a b", "a c"]]
    # Of 4 words a is 2, b 1: information 1 and 2; (a, b) is 1 of the 2 that begin with a: 1.
    assert nist(["a b"], references) == pytest.approx((1 + 2) / 2 + 1 / 1)
    assert nist(["A B"], references) == nist(["a b"], references), "case does not count"
    # b from one reference and c from the other: information 2 each, and no pair
    assert nist(["b c"], references) == pytest.approx((2 + 2) / 2)


def test_nist_penalty_by_hand():
    # 2 of 3 words: log2(3) each, the pair tells nothing; the penalty at 2/3 is one half
    assert nist(["a b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2)
    # 2 words against a mean of (1 + 5) / 2 = 3: the same penalty
    told = sum(math.log2(6 / n) for n in (2, 1)) / 2 + math.log2(2 / 1)
    assert nist(["a b"], [["a", "a b c d e"]]) == pytest.approx(told / 2)
    assert nist(["a b", ""], [["a b"], ["c d"]]) > 0 and nist([""], [["a b"]]) == 0


def test_nist_is_nltks_with_one_reference_and_not_with_two():
    from nltk.translate.nist_score import corpus_nist

    answers, first, second = (sentences(20, seed) for seed in (3, 4, 5))

    def theirs(*columns):
        references = [[text.split() for text in texts] for texts in zip(*columns, strict=True)]
        return corpus_nist(references, [text.split() for text in answers])

    assert nist(answers, [[text] for text in first]) == pytest.approx(theirs(first))
    both = [list(texts) for texts in zip(first, second, strict=True)]
    assert nist(answers, both) > 1.02 * theirs(first, second), "see the top of nlg_metrics.py"


def test_rouge_l_by_hand():
    # a c d is common: precision 3/4, recall 3/5, beta 1.2
    one = 2.44 * (3 / 4) * (3 / 5) / (3 / 5 + 1.44 * (3 / 4))
    assert rouge_l(["a b c d"], [["a c d e f"]]) == [pytest.approx(one)]
    # the second reference gives recall 1: the best of each is taken
    two = 2.44 * (3 / 4) / (1 + 1.44 * (3 / 4))
    assert rouge_l(["a b c d"], [["a c d e f", "a b"]]) == [pytest.approx(two)]
    assert rouge_l(["x", ""], [["y"], ["y"]]) == [0, 0]


def own_cider(answers, references):
    """CIDEr-D as its paper defines it: clipped tf-idf cosine, Gaussian in length, times 10."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = [0.0] * len(answers)
    for n in (1, 2, 3, 4):
        seen = Counter(
            g for texts in references for g in set().union(*(grams(t, n) for t in texts))
        )

        def weighted(text, n=n, seen=seen):
            idf = {g: math.log(len(references) / max(1, seen[g])) for g in grams(text, n)}
            return {g: count * idf[g] for g, count in grams(text, n).items()}

        for index, (answer, texts) in enumerate(zip(answers, references, strict=True)):
            own = weighted(answer)
            for text in texts:
                other = weighted(text)
                dot = sum(min(own[g], other[g]) * other[g] for g in own.keys() & other.keys())
                norm = math.hypot(*own.values()) * math.hypot(*other.values())
                apart = len(answer.split()) - len(text.split())
                likeness = dot / norm * math.exp(-(apart**2) / 72) if norm else 0
                scores[index] += 10 * likeness / len(texts) / 4
    return scores


def test_cider_against_an_independent_implementation():
    answers = sentences(12, 6)
    references = [list(texts) for texts in zip(sentences(12, 7), sentences(12, 8), strict=True)]
    references[0] = [answers[0]]
    assert cider_scores(answers, references) == pytest.approx(own_cider(answers, references))


def test_cider_by_hand():
    # No n-gram in common between the two items: every weight is log 2, every cosine 1, times 10.
    answers = ["a b c d e", "v w x y z"]
    assert cider_scores(answers, [[text] for text in answers]) == pytest.approx([10, 10])
    # a against a b: words 1 / sqrt 2, no pairs; one word apart: exp(-1 / 72)... in pairs
    [found, _] = cider_scores(["a b c d e f", "v"], [["a b c d e"], ["v w"]])
    means = [5 / math.sqrt(6 * 5), 4 / math.sqrt(5 * 4), 3 / math.sqrt(4 * 3), 2 / math.sqrt(3 * 2)]
    assert found == pytest.approx(10 * sum(means) / 4 * math.exp(-1 / 72))


def test_words_without_java_by_hand():
    text = "It isn't £20-25, it's the family-friendly pub; 3.5 stars (can't say)."
    cut = "it is n't £ 20-25 , it 's the family-friendly pub ; 3.5 stars ( ca n't say ) ."
    assert WORDS.findall(text.lower()) == cut.split()


def test_everything_without_java(monkeypatch):
    monkeypatch.setattr(nlg_metrics, "java_works", lambda: False)
    answers = ["Blue Pan is a pub.", "The Sign serves food by the river."] * 5
    references = [[text, "Something else entirely."] for text in answers]
    measures, items, protocol = nlg_scores(answers, references)
    assert list(measures) == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert measures["bleu"].value == pytest.approx(1)
    assert measures["rouge_l"].value == 1
    assert measures["meteor"].value is None and measures["meteor"].method == "skipped: no Java"
    assert "weights of n-grams held fixed" in measures["nist"].method
    assert measures["nist"].low <= measures["nist"].value <= measures["nist"].high
    assert "regular expression (no Java)" in protocol["rouge_l_and_cider"]
    assert len(items) == 10 and items[0].keys() == {"rouge_l", "cider"}
    assert measures["cider"].value == pytest.approx(np.mean([item["cider"] for item in items]))
    with pytest.raises(ValueError, match="1 answers for 2 lists"):
        nlg_scores(["a"], [["a"], ["b"]])


def test_no_java_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not java_works()
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert not java_works()


def test_a_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"package sacrebleu is missing \(pip install"):
        nlg_metrics.check_installed()


@needs_java
def test_words_are_those_of_pycocoevalcaps_tokenizer():
    from pycocoevalcap.tokenizer import ptbtokenizer

    texts = ["It isn't £20-25 at the café, (yes)!", "", "Two. Sentences? here", "  x\u2028y  "]
    texts = [nlg_metrics._one_line(text) for text in texts]
    found = ptb_words(texts)
    assert found[1] == [] and found[2] == ["two", ".", "sentences", "?", "here"]
    assert found[3] == ["x", "y"] and "café" in found[0] and "n't" in found[0]
    if not os.access(Path(ptbtokenizer.__file__).parent, os.W_OK):
        pytest.skip("pycocoevalcap writes into its own folder, which is read-only here")
    captions = {i: [{"caption": text}] for i, text in enumerate(texts) if text}
    theirs = ptbtokenizer.PTBTokenizer().tokenize(captions)
    kept, _ = nlg_metrics._tokenised(texts, [[text] for text in texts], java=True)
    assert [text for text in kept if text] == [line for [line] in theirs.values()]


@needs_java
def test_everything_with_java_and_meteor_by_hand():
    answers = ["Dogs bark.", "Blue pan, near the river!", "qwx", ""]
    references = [["dogs bark loudly"], ["blue pan near the river", "x"], ["dogs"], ["dogs"]]
    measures, items, protocol = nlg_scores(answers, references)
    # precision 1, recall 2/3, alpha 0.85; one chunk of two words, beta 0.2, gamma 0.6
    mean = 1 * (2 / 3) / (0.85 * 1 + 0.15 * (2 / 3))
    assert items[0]["meteor"] == pytest.approx(mean * (1 - 0.6 * (1 / 2) ** 0.2))
    assert [item["meteor"] for item in items[1:]] == [1, 0, 0]
    assert 0 < measures["meteor"].value < 1
    assert measures["meteor"].low is None and "Java" in measures["meteor"].method
    assert [item["rouge_l"] for item in items[1:]] == [1, 0, 0], "punctuation does not count"
    assert "Stanford" in protocol["rouge_l_and_cider"] and protocol["meteor"].startswith("1.5")


@needs_java
def test_a_meteor_that_stops_is_an_error_and_not_a_wait(monkeypatch, tmp_path):
    stops = tmp_path / "java"
    stops.write_text("#!/bin/sh\nexit 1\n")
    stops.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="METEOR's Java program stopped"):
        meteor_scores(["a"], [["a"]])
