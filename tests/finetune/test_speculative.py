"""speculative: equal to greedy decoding, rounds as without caches, calls and rates by hand."""

import copy
import json
import math
import shutil

import pytest
import torch

import compress
from bench import models
from compress import checkpoint
from finetune import speculate as command
from finetune.decoding.speculative import (
    Reader,
    Result,
    acceptance,
    expected_speed_up,
    expected_tokens,
    next_lookahead,
    speculate,
)
from finetune.speculate import (
    Settings,
    load_draft,
    parting,
    run,
    summary_lines,
)

NEW = 17
IDS = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))


def double(folder):
    """In float64 no near tie can part what rounding in another order would."""
    return checkpoint.load(folder, torch.float32).double()


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return double(tiny_llama)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2):
    return double(tiny_gpt2)


def near(model, seed=0):
    """A draft that often agrees with `model`: the same weights with a little noise."""
    draft, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=random)
    return draft


@pytest.fixture(scope="module")
def near_llama(llama):
    return near(llama)


def greedy(model, ids=IDS, new=NEW):
    return compress.generate(compress.TorchRunner(model), ids, new)


@torch.inference_mode()
def without_cache(parent, draft, ids, new, lookahead):
    """Rounds and tokens of the same procedure, each logit worked out from the whole text."""
    tokens, rounds = ids[0].tolist(), []

    def best(model, text):
        return int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())

    end = len(tokens) + new
    while len(tokens) < end:
        count = min(lookahead, end - len(tokens) - 1)
        proposed = []
        for _ in range(count):
            proposed.append(best(draft, tokens + proposed))
        accepted = 0
        while accepted < count and best(parent, tokens + proposed[:accepted]) == proposed[accepted]:
            accepted += 1
        tokens += proposed[:accepted]
        tokens.append(best(parent, tokens))
        rounds.append((count, accepted))
    return tokens, tuple(rounds)


@pytest.mark.parametrize("lookahead", range(1, 6))
def test_other_architecture_as_draft_changes_nothing(llama, gpt2, lookahead):
    for parent, draft in ((llama, gpt2), (gpt2, llama)):
        result = speculate(parent, draft, IDS, NEW, lookahead)
        assert torch.equal(result.tokens, greedy(parent))
        assert result.accepted < result.proposed


@pytest.mark.parametrize("lookahead, calls", [(1, 9), (2, 6), (3, 5), (4, 4), (5, 3)])
def test_parent_as_its_own_draft_is_always_right(llama, lookahead, calls):
    result = speculate(llama, llama, IDS, NEW, lookahead)
    assert torch.equal(result.tokens, greedy(llama))
    assert result.accepted == result.proposed
    assert result.parent_calls == calls == math.ceil(NEW / (lookahead + 1))
    assert result.accepted + result.parent_calls == NEW  # a call adds one token of its own


@pytest.mark.parametrize("lookahead", range(1, 6))
def test_rounds_are_those_of_the_procedure_without_caches(llama, near_llama, lookahead):
    # A draft whose cache held rejected tokens would still give the right text, with other rounds.
    result = speculate(llama, near_llama, IDS, 40, lookahead)
    tokens, rounds = without_cache(llama, near_llama, IDS, 40, lookahead)
    assert result.tokens[0].tolist() == tokens and result.rounds == rounds
    assert 0 < result.accepted < result.proposed
    assert any(0 < accepted < proposed for proposed, accepted in rounds) or lookahead == 1


def test_gpt2_rounds_are_those_of_the_procedure_without_caches(gpt2):
    draft = near(gpt2, seed=3)
    result = speculate(gpt2, draft, IDS, 40, 4)
    tokens, rounds = without_cache(gpt2, draft, IDS, 40, 4)
    assert result.tokens[0].tolist() == tokens and result.rounds == rounds
    assert 0 < result.accepted < result.proposed


def test_agrees_with_assisted_generation_of_transformers(llama, near_llama):
    """Its tokens, and its number of calls of the parent."""
    draft = copy.deepcopy(near_llama)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    calls = []
    hook = llama.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        theirs = llama.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            assistant_model=draft,
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=256,  # what is not in the text: the draft would not look at it
        )
    finally:
        hook.remove()
    ours = speculate(llama, near_llama, IDS, 40, 4)
    assert torch.equal(theirs, ours.tokens)
    assert len(calls) == ours.parent_calls


def test_one_new_token_needs_no_draft(llama, gpt2):
    result = speculate(llama, gpt2, IDS, 1)
    assert torch.equal(result.tokens, greedy(llama, new=1)) and result.rounds == ((0, 0),)


def test_adaptive_lookahead_by_hand(llama, gpt2):
    assert [next_lookahead(4, 4, 4), next_lookahead(4, 4, 3)] == [6, 3]
    assert next_lookahead(1, 1, 0) == 1
    # 3 + 5 + 7 + 9 = 24 tokens, all of them accepted.
    rounds = speculate(llama, llama, IDS, 24, lookahead=2, adaptive=True).rounds
    assert rounds == ((2, 2), (4, 4), (6, 6), (8, 8))
    result = speculate(llama, gpt2, IDS, NEW, lookahead=3, adaptive=True)
    assert torch.equal(result.tokens, greedy(llama))


def test_what_was_taken_back_is_not_remembered(llama):
    with torch.inference_mode():
        reader, wrong = Reader(llama), IDS.flip(1)
        reader.read(IDS, 1)
        reader.read(torch.cat([IDS, wrong], dim=1), 3)
        reader.forget(IDS.shape[1])
        reader.forget(IDS.shape[1] + 5)  # nothing to forget
        again = reader.read(torch.cat([IDS, IDS], dim=1), 2)
        expected = llama(torch.cat([IDS, IDS], dim=1)).logits[0, -2:]
    torch.testing.assert_close(again, expected)


def test_acceptance_by_hand():
    # Place 0 is asked in all four rounds and right in three, place 1 in two and right in one.
    rate, by_place = acceptance([(2, 2), (2, 0), (2, 1), (1, 1)])
    assert by_place == [3 / 4, 1 / 2] and rate == 4 / 6
    assert acceptance([(3, 0)]) == (0.0, [0.0, None, None])
    assert acceptance([(0, 0)]) == (None, [])


def test_expectations_of_the_paper_by_hand():
    assert expected_tokens(0.5, 2) == 1.75  # 1 + 1/2 + 1/4
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.0, 4) == 1
    closed = (1 - 0.8**6) / (1 - 0.8)  # eq. 1
    assert expected_tokens(0.8, 5) == pytest.approx(closed)
    assert expected_speed_up(0.8, 5, draft=0.05) == pytest.approx(closed / (5 * 0.05 + 1))
    assert expected_speed_up(0.5, 2, draft=0.25, check=1.5) == 1.75 / 2


def test_parting_names_the_place_and_the_gap(llama):
    expected = greedy(llama)[0].tolist()
    start = IDS.shape[1]
    assert parting(llama, expected, expected, start)["parts_after"] is None
    other = list(expected)
    other[start + 3] = (other[start + 3] + 1) % 257
    found = parting(llama, expected, other, start)
    logits = llama(torch.tensor([expected[: start + 3]])).logits[0, -1]
    assert found["parts_after"] == 3
    assert found["logit_gap"] == pytest.approx(
        float(logits.max() - logits[other[start + 3]]), rel=1e-5
    )


def test_refuses_what_cannot_work(llama, gpt2):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match="257 tokens and the draft 300"):
        speculate(llama, AutoModelForCausalLM.from_config(config), IDS, NEW)
    with pytest.raises(ValueError, match="the draft's context of 1024"):
        speculate(llama, gpt2, IDS, 1013)
    with pytest.raises(ValueError, match="one prompt"):
        speculate(llama, gpt2, IDS.expand(2, -1), NEW)
    with pytest.raises(ValueError, match="lookahead must be at least 1"):
        speculate(llama, gpt2, IDS, NEW, lookahead=0)


def test_bench_keeps_all_samples_and_finds_the_texts_identical(tmp_path, capsys, own_cache):
    settings = Settings(
        model="tiny-llama",
        draft="rtn(bits=8)",
        prompt=("The mouse", "Once upon a time"),
        new_tokens=12,
        lookahead=3,
        repeats=2,
        out=tmp_path / "figures.json",
    )
    report = run(settings)
    assert json.loads(settings.out.read_text()) == json.loads(json.dumps(report))
    found = report["summary"]
    assert found["identical_runs"] == found["runs"] == len(report["samples"]) == 4
    assert all(sample["plain_ms"] > 0 < sample["speculative_ms"] for sample in report["samples"])
    assert [len(line["ids"]) for line in report["prompts"]] == [12, 12]
    assert 0.3 < found["acceptance"] <= 1 and 1 <= found["tokens_per_parent_call"] <= 4
    assert "identical to plain greedy in 4 of" in capsys.readouterr().out
    line = {"parts_after": 5, "logit_gap": 0.03125}
    said = summary_lines({"summary": found, "prompts": [line]})
    assert said[-1] == "prompt 1 parts after 5 tokens, where the two logits are 0.031 apart"


def test_bench_says_where_texts_part(monkeypatch, capsys, own_cache):
    def wrong(parent, draft, ids, *settings):
        result = speculate(parent, draft, ids, *settings)
        tokens = result.tokens.clone()
        tokens[0, -1] = (tokens[0, -1] + 1) % 257
        return Result(tokens, result.rounds)

    monkeypatch.setattr(command, "speculate", wrong)
    settings = Settings("tiny-llama", "rtn(bits=8)", prompt=("A",), new_tokens=6)
    report = run(settings)
    assert report["summary"]["identical_runs"] == 0 and report["summary"]["runs"] == 3
    assert report["prompts"][0]["parts_after"] == 5
    assert "prompt 1 parts after 5 tokens" in capsys.readouterr().out


def test_draft_may_be_a_folder_without_a_tokenizer_but_not_with_another(tiny_llama, tmp_path):
    parent = models.resolve("tiny-llama")
    tokenizer = models.tokenizer(parent)
    folder = tmp_path / "int8"
    compress.save(compress.apply("int8_sym", compress.load(tiny_llama)), folder)
    draft = load_draft(str(folder), parent, tokenizer, None)
    assert speculate(draft, draft, IDS, 3).parent_calls == 1

    other = shutil.copytree(tiny_llama, tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    text["model"]["vocab"] = {token: 255 - index for token, index in vocabulary.items()}
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="must share its parent's tokenizer"):
        load_draft(str(other), parent, tokenizer, None)
