"""scoring: candidates against full logits, known answers, answers one by one, rules, refusals."""

import math

import pytest
import torch

import compress
from finetune.decoding.loading import load_for_inference
from finetune.judging import scoring
from finetune.judging.scoring import generate_answers, score_candidates
from finetune.tasks import Example
from finetune.training.examples import token_ids

EXAMPLES = [
    Example("The mouse", " ran", (" ran", " sat down", " r")),
    Example("Is a long prompt scored like a short one?", " yes", (" yes", " no")),
    Example("", "b", ("b", "abc")),
]
PROMPTS = ["The mouse", "Once upon a time there was", "A", "In the year"]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gpt2"])
def pair(request, own_cache):
    """Model and tokenizer (a token a byte). In float64 batches cannot differ by rounding."""
    model, tokenizer = load_for_inference(request.param)
    return model.double(), tokenizer


def plain_score(model, tokenizer, prompt, candidate):
    """ln p by one forward pass of the whole text, and a look at every token in turn."""
    before, after = token_ids(tokenizer, prompt, candidate)
    logs = model(torch.tensor([(before + after)[:-1]])).logits[0].log_softmax(-1)
    return sum(float(logs[len(before) - 1 + i, token]) for i, token in enumerate(after))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_scores_are_those_of_the_plain_forward_pass(pair, batch):
    found = score_candidates(*pair, EXAMPLES, batch)
    for example, scores in zip(EXAMPLES, found, strict=True):
        expected = [plain_score(*pair, example.prompt, text) for text in example.candidates]
        assert scores == pytest.approx(expected, rel=1e-5)  # float32 softmax


def test_a_model_that_knows_nothing_gives_every_token_the_same(pair):
    model, tokenizer = pair
    head = model.get_output_embeddings()
    weight, head.weight = head.weight, torch.nn.Parameter(torch.zeros_like(head.weight))
    try:
        found = score_candidates(model, tokenizer, EXAMPLES)
    finally:
        head.weight = weight
    tokens = [[len(text) for text in example.candidates] for example in EXAMPLES]  # one a byte
    assert found == [pytest.approx([-n * math.log(257) for n in row]) for row in tokens]


def test_candidates_share_rows(pair):
    model, tokenizer = pair
    answers = Example("Q:", "a", ("a", "b", "c"))
    assert len(scoring._rows(model, tokenizer, answers, 0)) == 1, "one token each: only the prompt"
    answers = Example("Q:", " bank", (" bank", " bank account", " lake", " "))
    assert len(scoring._rows(model, tokenizer, answers, 0)) == 2
    turns = []
    score_candidates(*pair, [answers] * 3, 4, lambda done, total: turns.append((done, total)))
    assert turns == [(4, 6), (6, 6)]


def test_a_long_prompt_keeps_its_end(pair):
    model, tokenizer = pair
    context = model.config.max_position_embeddings
    long = Example("x" * (context + 50) + "end", "ab", ("ab", "c"))
    [found] = score_candidates(model, tokenizer, [long])
    kept = "x" * (context - 1 - 3) + "end"  # one row holds it and the first token of "ab"
    assert found == pytest.approx([plain_score(*pair, kept, "ab"), plain_score(*pair, kept, "c")])


def test_compressed_and_plain_models_are_scored_alike(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, tokenizer = load_for_inference("tiny-llama")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    expected = score_candidates(ours, tokenizer, EXAMPLES)
    for found, wanted in zip(score_candidates(theirs, tokenizer, EXAMPLES), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    compress.save(compress.apply("int8_sym", ours), tmp_path / "small")
    small = compress.load(tmp_path / "small")
    for found, wanted in zip(score_candidates(small, tokenizer, EXAMPLES), expected, strict=True):
        assert found == pytest.approx(wanted, rel=0.1) and found != wanted
    assert len(generate_answers(small, tokenizer, PROMPTS, 3)) == 4


def test_refusals(pair):
    model, tokenizer = pair
    with pytest.raises(ValueError, match="new tokens do not fit the model's context"):
        generate_answers(model, tokenizer, PROMPTS, model.config.max_position_embeddings)
    norm = [p for p in model.parameters() if p.ndim == 1][-1]
    kept = norm.data.clone()
    norm.data[0] = math.nan
    try:
        with pytest.raises(FloatingPointError, match="NaN"):
            score_candidates(model, tokenizer, EXAMPLES)
    finally:
        norm.data = kept
    tokenizer = load_for_inference("tiny-gpt2")[1]
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="token id 257 is not among the model's 257"):
        score_candidates(model, tokenizer, [Example("<new>", "a", ("a",))])
    with pytest.raises(ValueError, match="token id 257 is not among the model's 257"):
        generate_answers(model, tokenizer, ["<new>"], 3)


@pytest.mark.parametrize("search", [{}, {"beams": 3, "length_penalty": 0.5}])
def test_a_batch_of_answers_is_one_by_one(pair, search):
    together = generate_answers(*pair, PROMPTS, 8, batch=3, **search)
    assert together == [generate_answers(*pair, [prompt], 8, **search)[0] for prompt in PROMPTS]
    assert any(together)


def test_a_greedy_answer_is_that_of_the_plain_loop(pair):
    model, tokenizer = pair
    for prompt, answer in zip(PROMPTS, generate_answers(*pair, PROMPTS, 8), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        loop = compress.generate(compress.TorchRunner(model), ids, 8)[0, ids.shape[1] :].tolist()
        assert answer == scoring._first_line(tokenizer, loop)


def test_where_an_answer_ends(pair):
    tokenizer = pair[1]
    two_lines = tokenizer(" red pie\nand more")["input_ids"]
    assert scoring._first_line(tokenizer, two_lines) == "red pie"
    ended = [*tokenizer("\n red")["input_ids"], 256, *tokenizer("pie")["input_ids"]]
    assert scoring._first_line(tokenizer, ended) == "red"  # a blank line before does not count
    assert scoring._first_line(tokenizer, [256]) == ""


def test_the_rule_against_repetition_does_not_see_the_prompt():
    rule = scoring._NoRepeatInAnswer(2, prompt_tokens=3)
    # The prompt holds (1, 9); the answer so far holds (1, 2) and stands at 1 again.
    scores = rule(torch.tensor([[0, 1, 9, 1, 2, 1]]), torch.zeros(1, 10))
    assert scores[0].isneginf().nonzero().flatten().tolist() == [2]
    assert rule(torch.tensor([[0, 1, 9]]), torch.zeros(1, 10)).isfinite().all()


def test_no_token_comes_twice_under_the_rule_of_one(pair):
    model, tokenizer = pair
    answers = []
    original = scoring._first_line
    try:
        scoring._first_line = lambda tokenizer, ids: answers.append(ids) or ""
        generate_answers(model, tokenizer, ["aaaa"], 40, no_repeat_ngram=1)
        generate_answers(model, tokenizer, ["aaaa"], 40)
    finally:
        scoring._first_line = original
    ruled, free = ([token for token in ids if token != 256] for ids in answers)
    assert len(set(ruled)) == len(ruled) > 1
    assert len(set(free)) < len(free), "a random model repeats itself when it may"
