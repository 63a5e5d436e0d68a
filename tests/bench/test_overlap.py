"""overlap: a copy found by hand and against brute force, disguised copies, what is tolerated."""

import random
import time

import pytest

from bench.overlap import RUN, shared_passages


def prose(seed: int, words: int) -> str:
    """Random words of 3 to 8 letters in sentences of 12 words, a line each."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    out = ["".join(rng.choices(letters, k=rng.randint(3, 8))) for _ in range(words)]
    return "\n".join(" ".join(out[i : i + 12]) + "." for i in range(0, words, 12))


def shared_by_brute_force(text: str, other: str) -> float:
    letters = [char.lower() for char in text if char.isalnum()]
    others = "".join(char.lower() for char in other if char.isalnum())
    covered = [False] * len(letters)
    for start in range(len(letters) - RUN + 1):
        if "".join(letters[start : start + RUN]) in others:
            covered[start : start + RUN] = [True] * RUN
    return sum(covered) / len(covered)


def test_one_copied_passage_by_hand():
    copied = "x1" * 50  # 100 letters
    shared = shared_passages(prose(1, 40) + copied + "?" * 9, prose(2, 500) + copied + "!")
    letters = sum(char.isalnum() for char in prose(1, 40)) + 100
    assert shared.longest == copied and shared.longest_letters == 100
    assert shared.fraction == pytest.approx(100 / letters)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_brute_force(seed):
    rng = random.Random(seed)
    a, b = prose(10 + seed, 400), prose(20 + seed, 600)
    for _ in range(6):  # copies of 20 to 180 characters, some too short to count
        at, length = rng.randrange(len(a) - 200), rng.randint(20, 180)
        b += " " + a[at : at + length].upper()
    shared = shared_passages(a, b)
    assert 0 < shared.fraction < 1
    assert shared.fraction == pytest.approx(shared_by_brute_force(a, b))


def test_disguises_do_not_hide_a_copy():
    text = prose(3, 300)
    for disguised in (text.upper(), text.replace("\n", " "), text.replace(" ", "\n\n@-@ ")):
        assert shared_passages(text, prose(4, 300) + disguised).fraction == 1


def test_scripts_without_spaces_are_compared():
    rng = random.Random(0)
    chinese = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(3000))
    assert shared_passages(chinese[1000:2000], chinese).fraction == 1
    assert shared_passages(chinese[:1500], chinese[1500:]).fraction == 0


def test_what_counts_as_too_much():
    text, other = prose(5, 10_000), prose(6, 10_000)
    letters = [place for place, char in enumerate(text) if char.isalnum()]
    assert not shared_passages(text, other + text[: letters[511]]).too_much  # 511 letters
    assert shared_passages(text, other + text[: letters[512]]).too_much
    lines = text.splitlines()[::4]  # a quarter of the lines, none of them long
    numbered = "\n".join(f"{line} {number}" for number, line in enumerate(lines))
    scattered = shared_passages(text, other + numbered)
    assert scattered.longest_letters < 512 and scattered.too_much


def test_headings_and_short_texts_share_nothing():
    headings = "".join(f"\n = = Chapter {n} : a heading = = \n{prose(n, 50)}" for n in range(20))
    others = "".join(
        f"\n = = Chapter {n} : a heading = = \n{prose(100 + n, 50)}" for n in range(20)
    )
    assert shared_passages(headings, others).fraction == 0
    assert shared_passages("a short text", "a short text").fraction == 0
    assert shared_passages(prose(1, 100), "").fraction == 0


def test_two_texts_of_1_3_megabytes_take_seconds_at_most():
    text, other = prose(7, 200_000), prose(8, 200_000)
    assert len(text) > 1_290_590
    start = time.process_time()
    assert shared_passages(text, other).fraction == 0
    assert time.process_time() - start < 10  # pair by pair it would be hours
