"""Fine-tuning end to end on an invented data-to-text set, all weights and LoRA."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from bench import models
from finetune import merge, train
from finetune.tasks import get
from finetune.training.journal import entries

FOODS = ("Thai", "French", "Indian")


@pytest.fixture
def restaurants(tmp_path, monkeypatch):
    """A tiny e2e data set: 30 meanings, two sentences each."""
    folder = tmp_path / "data" / "e2e-nlg"
    folder.mkdir(parents=True)
    lines = ["mr,ref"]
    for number in range(30):
        food = FOODS[number % 3]
        meaning = f'"name[Inn {number}], food[{food}]"'
        lines += [
            f"{meaning},Inn {number} serves {food} food.",
            f"{meaning},{food} food at Inn {number}.",
        ]
    for name in ("devset.csv", "testset_w_refs.csv"):
        (folder / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path / "data"))


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """A tiny CommonsenseQA: 40 questions of three choices."""
    folder = tmp_path / "data" / "commonsense_qa"
    folder.mkdir(parents=True)
    lines = []
    for number in range(40):
        texts = ("a barn", "a lamp", f"box {number}")
        choices = [{"label": label, "text": text} for label, text in zip("ABC", texts, strict=True)]
        question = {"stem": f"Where is thing {number}?", "choices": choices}
        lines.append(json.dumps({"id": f"q{number}", "answerKey": "C", "question": question}))
    with gzip.open(folder / "train_rand_split.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path / "data"))


def run(tmp_path, tiny, **changed):
    values = {"model": str(tiny), "task": "e2e", "out": tmp_path / "run", "steps": 25}
    values |= {"batch": 8, "micro_batch": 4, "learning_rate": 3e-3, "tensorboard": False}
    values |= {"threads": 1, "context": 128, "precision": "fp32"}
    return train.run(train.Settings(**(values | changed)))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_a_task_is_learned_and_the_folder_is_plain(method, fixture, restaurants, tmp_path, request):
    tiny = request.getfixturevalue(fixture)
    folder = run(tmp_path, tiny, method=method)
    log = [entry for entry in entries(tmp_path / "run") if "validation_loss" in entry]
    assert log[-1]["validation_loss"] < 0.8 * log[0]["validation_loss"]
    assert (tmp_path / "run" / "adapter").exists() == (method == "lora")
    found = models.resolve(str(folder))
    assert models.lineage(found)["origin"]["base"]["revision"] == models.resolve(str(tiny)).revision
    compress.load(found.folder)
    old, new = (
        AutoModelForCausalLM.from_pretrained(place).get_input_embeddings().weight
        for place in (tiny, found.folder)
    )
    assert torch.equal(old, new) == (method == "lora")  # which leaves the embeddings alone


def test_merge_makes_the_same_folder_again(restaurants, tmp_path, tiny_llama):
    folder = run(tmp_path, tiny_llama, method="lora", steps=3)
    again = merge.export(tmp_path / "run", tmp_path / "again")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()


def test_new_tokens_start_as_the_mean(tiny_gpt2):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    tokenizer = models.tokenizer(models.resolve(str(tiny_gpt2)))
    mean = model.get_input_embeddings().weight.detach().mean(0)
    task = get("choice")
    ids = train.add_tokens(model, tokenizer, task)
    assert len(ids) == len(task.special_tokens) >= 2
    weight = model.get_input_embeddings().weight
    assert len(weight) == len(tokenizer) == 257 + len(ids)
    for row in ids:
        torch.testing.assert_close(weight[row], mean)
    assert train.add_tokens(model, tokenizer, task) == []
    assert tokenizer.encode(task.special_tokens[0]) == [ids[0]]


def test_running_text_is_cut_into_windows(tmp_path, tiny_llama, monkeypatch):
    folder = tmp_path / "data" / "wikitext-2-raw"
    folder.mkdir(parents=True)
    articles = [f" = Title {n} = \n \n The cat sat on mat {n} . \n \n" for n in range(80)]
    (folder / "wiki.valid.raw").write_text("".join(articles))
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path / "data"))
    run(tmp_path, tiny_llama, task="wikitext", context=64, steps=4)
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recipe["origin"]["data"]["train"].endswith("-64x8-0")
    assert entries(tmp_path / "run")[1]["tokens"] == 8 * 64


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_lora_learns_the_rows_of_new_tokens(fixture, questions, tmp_path, request):
    """RUN/model, and the adapter folded into its base by hand, are one model."""
    tiny = request.getfixturevalue(fixture)
    run(tmp_path, tiny, task="choice", method="lora", steps=3, evaluation_examples=2)
    own = load_file(tmp_path / "run" / "model" / "model.safetensors")
    merge.fold(tmp_path / "run" / "adapter", str(tiny), tmp_path / "folded")
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    assert own.keys() == folded.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, folded[name], rtol=0, atol=1e-6, msg=name)
    embedding = compress.load(tmp_path / "run" / "model").get_input_embeddings().weight
    old = AutoModelForCausalLM.from_pretrained(tiny).get_input_embeddings().weight.detach()
    assert len(embedding) == 257 + len(get("choice").special_tokens)
    assert torch.equal(embedding[:257], old)
    assert float((embedding[257:] - old.mean(0)).abs().max()) > 1e-4  # learned
    figures = entries(tmp_path / "run")[-1]
    assert figures["validation_accuracy"] in (0.0, 0.5, 1.0)
