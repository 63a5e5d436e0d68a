"""evaluate: the bench's perplexity, models that know the answers, what the file holds, refusals."""

import json
import math
import shutil

import pytest
import torch

import compress
from bench.data import Blocks
from bench.errors import UsageError
from bench.metrics.perplexity import perplexity
from bench.metrics.subject import Subject
from finetune.decoding.loading import load_for_inference
from finetune.evaluate import Settings, run
from finetune.judging import judge as judging
from finetune.judging import nlg_metrics
from finetune.options import build
from finetune.tasks import TASKS, Decoding, Example, Task, checksum

TEXT = "The old cat sat near the green door and waited for the quiet morning. " * 40
COLOURS = (" red", " blue", " green")


class Story(Task):
    """One long text."""

    name, kind, metric = "story", "language_model", "perplexity"

    def read(self, split):
        return [Example("", TEXT, group=split)]


class Colours(Task):
    """Twelve things, red and blue in turn."""

    name, kind, metric = "colours", "choice", "accuracy_f1"

    def read(self, split):
        return [
            Example(f"thing {n} is", COLOURS[n % 2], COLOURS, group=f"thing-{n}") for n in range(12)
        ]


class Questions(Task):
    """Nine questions with two right answers each."""

    name, kind, metric = "questions", "generation", "answers"
    decoding = Decoding(max_new_tokens=5)

    def read(self, split):
        return [
            Example(f"Q{n}:", " red", references=("red", "a red one"), group=f"q{n}")
            for n in range(9)
        ]


class Sentences(Questions):
    """The same, judged as sentences."""

    name, metric = "sentences", "nlg"


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    for task in (Story(), Colours(), Questions(), Sentences()):
        monkeypatch.setitem(TASKS, task.name, task)
    monkeypatch.setattr(nlg_metrics, "java_works", lambda: False)
    monkeypatch.chdir(tmp_path)


def judged(task, model="tiny-llama", **settings):
    """The outcome for a model that is loaded."""
    task = TASKS[task]
    loaded, tokenizer = load_for_inference(model)
    return judging.judge(
        loaded, tokenizer, task, task.examples("test"), Settings(**settings).judging(task)
    )


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
def test_perplexity_is_the_benchs(model, tmp_path):
    outcome = judged("story", model, window=128)
    loaded, tokenizer = load_for_inference(model)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    blocks = Blocks(windows, "story", "test", "", len(ids))
    subject = Subject(compress.TorchRunner(loaded), tmp_path, blocks, 1, 1)
    theirs = perplexity(subject, lambda done, total: None)
    assert outcome.measures["perplexity"].value == pytest.approx(theirs["perplexity"], rel=1e-9)
    assert [item["nll_nats"] for item in outcome.items] == theirs["block_nll_nats"]
    assert outcome.protocol == {"window": 128, "windows": len(windows), "tokens": len(ids)}
    with torch.inference_mode():
        guesses = loaded(windows).logits.argmax(-1)[:, :-1]
    correct = int((guesses == windows[:, 1:]).sum())
    assert sum(item["correct"] for item in outcome.items) == correct
    accuracy = outcome.measures["next_token_accuracy"]
    assert accuracy.value == pytest.approx(correct / (len(windows) * 127))
    assert accuracy.low <= accuracy.value <= accuracy.high


def test_limit_counts_windows_of_a_text():
    assert len(judged("story", window=128, limit=3).items) == 3
    # 2,800 tokens; a window is never longer than the model's context of 2,048
    assert judged("story", window=3000).protocol == {"window": 2048, "windows": 1, "tokens": 2800}
    loaded, tokenizer = load_for_inference("tiny-llama")
    with pytest.raises(UsageError, match="9 tokens are less than a window of 1024; lower --window"):
        judging.judge(loaded, tokenizer, TASKS["story"], [Example("", "too short")])


def oracle(monkeypatch, right):
    """Scores and answers that are right for the items that right(number) names."""

    def scores(model, tokenizer, examples, batch, report):
        return [
            [-1.0 if (text == e.target) == right(n) else -9.0 for text in e.candidates]
            for n, e in enumerate(examples)
        ]

    def answers(model, tokenizer, prompts, **settings):
        return ["A red one!" if right(n) else "no" for n in range(len(prompts))]

    monkeypatch.setattr(judging, "score_candidates", scores)
    monkeypatch.setattr(judging, "generate_answers", answers)


def test_a_model_that_knows_every_answer(monkeypatch):
    oracle(monkeypatch, lambda n: True)
    choice = judged("colours")
    assert choice.measures["accuracy"].value == choice.measures["f1"].value == 1
    assert choice.measures["accuracy"].low == pytest.approx(0.7575, abs=1e-4)  # Wilson, 12 of 12
    assert choice.protocol["always_the_same_choice"] == 0.5
    answers = judged("questions")
    assert answers.measures["exact_match"].value == answers.measures["f1"].value == 1
    assert judged("sentences").measures["rouge_l"].value > 0.9


def test_a_model_that_knows_some_answers(monkeypatch):
    oracle(monkeypatch, lambda n: n >= 3)
    choice = judged("colours")
    assert choice.measures["accuracy"].value == 0.75
    # things 0 and 2 are red and called blue, thing 1 is blue and called red: 4 hits, 1 + 2 wrong
    assert choice.measures["f1"].value == pytest.approx(8 / 11)
    assert [item["chosen"] for item in choice.items[:4]] == [1, 0, 1, 1]
    assert judged("questions").measures["exact_match"].value == pytest.approx(6 / 9)


def test_normalising_by_bytes_can_change_the_choice(monkeypatch):
    def scores(model, tokenizer, examples, batch, report):
        return [[-3.1, -4.0, -6.0] for _ in examples]  # 3, 4 and 5 bytes: -1.03, -1.0, -1.2

    monkeypatch.setattr(judging, "score_candidates", scores)
    item = judged("colours").items[0]
    assert (item["chosen"], item["chosen_per_byte"]) == (0, 1)


@pytest.mark.parametrize("task", ["story", "colours", "questions", "sentences"])
def test_the_file_holds_what_was_found(task, tmp_path, capsys):
    file = tmp_path / "found.json"
    settings = build(
        Settings, {"model": "tiny-llama", "task": task, "window": 64, "out": str(file)}
    )
    record = run(settings)
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert record["data_sha256"] == checksum(TASKS[task].examples("test"))
    assert record["model"]["alias"] == "tiny-llama" and len(record["model"]["revision"]) == 16
    assert record["protocol"]["dtype"] == "torch.float32"
    assert {"torch", "transformers", "scipy"} <= record["packages"].keys()
    text = file.read_text()
    assert TEXT[:40] not in text and "thing 1 is" not in text and str(tmp_path) not in text
    assert len(record["items"]) > 8
    for measure in record["measures"].values():
        assert measure["method"], "an interval says how it was found, or why there is none"
        if measure["low"] is not None:
            assert measure["low"] <= measure["value"] <= measure["high"]
            assert math.isfinite(measure["high"])
    shown = capsys.readouterr().out
    assert f"tiny-llama on {task}, test" in shown and str(file) in shown


def test_the_file_lies_in_the_models_folder(tiny_llama, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(tiny_llama, folder)
    first = run(Settings(model=str(folder), task="colours", limit=2, split="validation"))
    assert json.loads((folder / "evaluation-colours-validation.json").read_text()) == first
    assert first["examples"] == 2 and str(tmp_path) not in json.dumps(first)
    run(Settings(model="tiny-llama", task="colours", limit=2))
    assert (tmp_path / "evaluation-tiny-llama-colours-test.json").is_file()


def test_a_compressed_folder_is_judged_with_its_parents_tokenizer(tmp_path):
    model, _ = load_for_inference("tiny-llama")
    compress.save(compress.apply("int8_sym", model), tmp_path / "small")
    settings = Settings(model=str(tmp_path / "small"), task="colours")
    with pytest.raises(UsageError, match="--tokenizer"):
        run(settings)
    record = run(Settings(model=str(tmp_path / "small"), task="colours", tokenizer="tiny-llama"))
    plain = run(Settings(model="tiny-llama", task="colours"))
    scores, other = (r["items"][0]["log_probabilities"] for r in (record, plain))
    assert scores == pytest.approx(other, rel=0.1) and scores != other
    assert record["model"]["parent"] == plain["model"]["revision"]
    assert "compression" in record["model"] and "compression" not in plain["model"]


def test_the_folder_of_a_run_stands_for_what_was_compressed(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "run" / "model")
    model, _ = load_for_inference("tiny-llama")
    compress.save(compress.apply("int8_sym", model), tmp_path / "small")
    settings = Settings(
        str(tmp_path / "small"), "colours", limit=2, tokenizer=str(tmp_path / "run")
    )
    base = run(Settings(str(tmp_path / "run"), "colours", limit=2))["model"]["revision"]
    assert run(settings)["model"]["parent"] == base


def test_the_file_says_what_the_model_was_trained_from(tiny_llama, tmp_path):
    folder = tmp_path / "run" / "model"
    shutil.copytree(tiny_llama, folder)
    lineage = {"source": "train", "origin": {"base": {"revision": "abc"}}}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    model = run(Settings(model=str(tmp_path / "run"), task="colours", limit=2))["model"]
    assert (model["alias"], model["parent"], model["lineage"]) == ("run", "abc", lineage)
    named = run(Settings(model=str(tmp_path / "run"), task="colours", limit=2, name="mine"))
    assert named["model"]["alias"] == "mine"


def test_decoding_is_the_tasks_unless_it_is_set():
    assert Settings().judging(TASKS["questions"]).decoding == Decoding(max_new_tokens=5)
    changed = Settings(beams=4, no_repeat_ngram=0, length_penalty=0.5).judging(TASKS["e2e"])
    assert changed.decoding == Decoding(
        max_new_tokens=80, beams=4, length_penalty=0.5, no_repeat_ngram=0
    )


def test_refusals(monkeypatch):
    with pytest.raises(UsageError, match="no task 'colour'; did you mean colours"):
        run(Settings(model="tiny-llama", task="colour"))
    with pytest.raises(UsageError, match="split must be one of train, validation, test"):
        build(Settings, {"split": "dev"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no GPU"):
        run(Settings(model="tiny-llama", task="colours", device="cuda"))
