"""generate: batches equal single prompts, beams against all pairs, seeds, limits, refusals."""

import json
import math
import re

import pytest
import torch

import compress
from bench.errors import UsageError
from finetune.decoding.chat import converse, probabilities
from finetune.decoding.loading import load_for_inference
from finetune.generate import (
    PROMPTS,
    Settings,
    continue_prompts,
    encode,
    read_prompts,
    run,
)

TEXTS = ["The mouse", "Once upon a time there was a castle", "A", "In the year"]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gpt2"])
def pair(request, own_cache):
    """Model and tokenizer. In float64 rounding cannot make a batch differ from one prompt."""
    model, tokenizer = load_for_inference(request.param)
    return model.double(), tokenizer


def texts(pair, prompts=TEXTS, **settings):
    return continue_prompts(*pair, prompts, Settings(new_tokens=8, **settings))


def test_greedy_batch_is_one_by_one_and_is_the_plain_loop(pair):
    model, tokenizer = pair
    together = texts(pair, batch=3)
    assert together == [texts(pair, [prompt])[0] for prompt in TEXTS]
    for prompt, found in zip(TEXTS, together, strict=True):
        ids = encode(tokenizer, [prompt])[0]
        loop = compress.generate(compress.TorchRunner(model), ids, 8)[0, ids.shape[1] :].tolist()
        assert found.ids == loop[: len(found.ids)] and (found.ended or len(found.ids) == 8)
        assert found.text == tokenizer.decode(found.ids)


def test_left_padding_by_hand(pair):
    tokenizer = pair[1]
    ids, mask = encode(tokenizer, ["abc", "a"])
    a, b, c = (tokenizer(letter)["input_ids"][0] for letter in "abc")
    assert ids.tolist() == [[a, b, c], [256, 256, a]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert encode(tokenizer, [""])[0].tolist() == [[256]]  # texts begin with it


def test_as_many_beams_as_tokens_find_the_best_of_all_pairs(pair):
    model, tokenizer = pair
    ids = encode(tokenizer, ["Once"])[0]
    with torch.inference_mode():
        first = model(ids).logits[0, -1].log_softmax(-1)
        every = torch.cat([ids.expand(257, -1), torch.arange(257)[:, None]], dim=1)
        both = first[:, None] + model(every).logits[:, -1].log_softmax(-1)  # (first, second)
    settings = Settings(new_tokens=2, mode="beam", beams=257)
    found = continue_prompts(model, tokenizer, ["Once"], settings)[0].ids
    greedy = continue_prompts(model, tokenizer, ["Once"], Settings(new_tokens=2))[0].ids
    assert 256 not in found + greedy  # an end would make the text shorter than two tokens
    assert found == list(divmod(int(both.argmax()), 257))
    assert both[tuple(found)] >= both[tuple(greedy)]


def test_one_beam_is_greedy(pair):
    assert texts(pair, mode="beam", beams=1) == texts(pair)


def test_few_beams_are_likelier_than_greedy(pair):
    model, tokenizer = pair

    def likelihood(found):
        """Mean log-probability of a token, ends included."""
        total = count = 0
        for prompt, line in zip(TEXTS, found, strict=True):
            start = encode(tokenizer, [prompt])[0][0].tolist()
            new = line.ids + [256] * line.ended
            logs = model(torch.tensor([start + new])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            total += float(logs[range(len(new)), new].sum())
            count += len(new)
        return total / count

    with torch.inference_mode():
        assert likelihood(texts(pair, mode="beam", beams=4)) > likelihood(texts(pair))


def test_seed_decides_the_sample_and_nothing_else_moves(pair):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = texts(pair, mode="sample", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert texts(pair, mode="sample", seed=1) == one
    assert texts(pair, mode="sample", seed=2) != one


def test_narrowest_sampling_is_greedy(pair):
    greedy = texts(pair)
    assert texts(pair, mode="sample", top_k=1) == greedy
    assert texts(pair, mode="sample", top_k=0, top_p=1e-6) == greedy
    assert texts(pair, mode="sample", top_k=0, temperature=1e-4) == greedy


def test_text_ends_before_the_end_of_text_token(own_cache):
    model, tokenizer = load_for_inference("tiny-llama")
    free = continue_prompts(model, tokenizer, TEXTS, Settings(new_tokens=8))
    third = free[0].ids[2]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    found = continue_prompts(model, tokenizer, TEXTS, Settings(new_tokens=8))
    for line, without in zip(found, free, strict=True):
        assert line.ended == (third in without.ids)
        assert line.ids == without.ids[: without.ids.index(third) if line.ended else None]


def test_ten_prompts_are_shipped(tmp_path):
    shipped = read_prompts()
    assert len(set(shipped)) == 10 and all(8 <= len(line.split()) <= 25 for line in shipped)
    assert shipped == PROMPTS.read_text(encoding="utf-8").splitlines()
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "Two lines\\nin one"}\n')
    assert read_prompts(file=file) == ["Two lines\nin one"]
    assert read_prompts(("a", "b")) == ["a", "b"]


def test_two_models_side_by_side(tmp_path, capsys, own_cache):
    out = tmp_path / "deep" / "texts.json"
    settings = Settings(("tiny-llama", "tiny-gpt2"), new_tokens=4, prompt=("One", "Two"), out=out)
    report = run(settings)
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert [column["model"] for column in report["models"]] == ["tiny-llama", "tiny-gpt2"]
    assert [len(column["continuations"]) for column in report["models"]] == [2, 2]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("[")] == ["[1] One", "[2] Two"]
    assert sum("tiny-gpt2:" in line for line in printed) == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"prompt": ("a",), "prompts": PROMPTS}, "not both"),
        ({"task": "qa"}, "add --interactive"),
        ({"interactive": True, "prompt": ("a",)}, "leave out --prompt"),
        ({"models": ()}, "at least one model"),
    ],
)
def test_refuses_settings_that_make_no_sense(settings, message):
    with pytest.raises(UsageError, match=message):
        Settings(**settings)


def test_refuses_what_does_not_fit_the_model(tmp_path, own_cache):
    model, tokenizer = load_for_inference("tiny-gpt2")
    with pytest.raises(ValueError, match="context of 1024; lower --new-tokens"):
        continue_prompts(model, tokenizer, ["one"], Settings(new_tokens=1022))
    with pytest.raises(UsageError, match="there is no such file"):
        read_prompts(file=tmp_path / "none.txt")
    tokenizer.add_tokens(["<far>"])
    with pytest.raises(ValueError, match="id 257 is not among the model's 257"):
        continue_prompts(model, tokenizer, ["<far>"], Settings())


def test_probabilities_of_choices_by_hand(pair):
    model, tokenizer = pair
    shares = probabilities(model, tokenizer, "Is it?", [" yes", " no", " maybe"])
    logs = []
    for text in (" yes", " no", " maybe"):
        before, after = (tokenizer(part)["input_ids"] for part in ("Is it?", text))
        every = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        logs.append(sum(float(every[len(before) - 1 + i, t]) for i, t in enumerate(after)))
    total = sum(math.exp(log) for log in logs)
    assert shares == pytest.approx([math.exp(log) / total for log in logs], rel=1e-4)


def keyboard(*lines):
    """Types the lines, then ends the input."""
    left = iter(lines)

    def ask(title):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


def test_questions_with_choices_are_answered_until_the_input_ends(capsys, own_cache):
    settings = Settings(("tiny-llama", "tiny-gpt2"), interactive=True, task="choice")
    converse(settings, keyboard("Where?", "here", "there", "", "Alone?", "one", "", "Last?"))
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:2]] == ["tiny-llama", "tiny-gpt2"]
    assert said[2:] == ["a question needs two choices or more"] * 2
    for line in said[:2]:
        shares = [float(share) for share in re.findall(r"\(([\d.]+)%\)", line)]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize("task", ["text", "qa"])
def test_prompts_and_questions_by_keyboard(capsys, own_cache, task):
    settings = Settings(("tiny-llama",), interactive=True, task=task, new_tokens=5)
    converse(settings, keyboard("What is rain?"))
    assert capsys.readouterr().out.startswith("tiny-llama: ")
