"""From raw text to a model folder in one command; killed, resumed, and told apart."""

import json
import signal
import subprocess
import sys
import time

import pytest

import compress
from bench import models
from finetune.training.journal import entries
from finetune.training.loop import LoopSettings

SMALL = ["--layers", "2", "--width", "32", "--heads", "4", "--context", "32", "--threads", "1"]
SMALL += ["--batch", "8", "--micro-batch", "8", "--learning-rate", "1e-2", "--no-tensorboard"]


def test_raw_text_becomes_a_model_that_the_bench_takes(story, tmp_path, finetune):
    run = tmp_path / "run"
    call = ["pretrain", "--text", story, "--vocabulary", "300", *SMALL, "--steps", "40"]
    done = finetune(*call, "--dtype", "bfloat16", "--out", run)
    assert "parameters" in done.stderr and "step 40 of 40" in done.stdout
    log = entries(run)
    assert log[0]["validation_loss"] > 5 and log[-1]["validation_loss"] < 3.5
    found = models.resolve(str(run / "model"))
    text = models.tokenizer(found).encode("The old cat sat near the green door")
    network = compress.load(found.folder)
    assert str(network.dtype) == "torch.bfloat16" and len(text) > 3
    lineage = models.lineage(found)
    assert lineage["source"] == "pretrain, 40 steps"
    assert lineage["recipe"]["learning_rate"] == 1e-2 and lineage["origin"]["data"]["train"]
    again = finetune(*call, "--dtype", "bfloat16", "--out", run)  # nothing left to do
    assert "step 40 of 40" in again.stdout and entries(run) == log


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_along_the_same_curve(kind, story, tmp_path, finetune):
    call = ["pretrain", "--text", story, "--vocabulary", "300", *SMALL, "--steps", "60"]
    call += ["--save-every", "5", "--evaluate-every", "20", "--dropout", "0.1"]
    finetune(*call, "--out", tmp_path / "whole")
    command = [sys.executable, "-m", "finetune", *map(str, call), "--out", tmp_path / "cut"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "cut" / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(kind)
    code = process.wait()
    assert code == (130 if kind is signal.SIGTERM else -signal.SIGKILL)
    assert len([e for e in entries(tmp_path / "cut") if "loss" in e]) < 60
    finetune(*call, "--out", tmp_path / "cut")
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_run_in_the_same_folder_is_refused(story, tmp_path, finetune):
    call = ["pretrain", "--text", story, "--vocabulary", "300", *SMALL, "--out", tmp_path / "run"]
    finetune(*call, "--steps", "2")
    done = finetune(*call, "--steps", "2", "--seed", "4", check=False)
    assert done.returncode == 2
    assert "holds another run: seed was 0, now 4" in done.stderr


def test_settings_come_from_a_file_too(story, tmp_path, finetune):
    config = tmp_path / "small.json"
    values = {"layers": 1, "width": 16, "heads": 2, "context": 16, "steps": 2, "tensorboard": False}
    config.write_text(json.dumps(values | {"text": [str(story)], "vocabulary": 300}))
    finetune("pretrain", "--config", config, "--out", tmp_path / "run", "--width", "32")
    found = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (found["n_layer"], found["n_embd"], found["n_positions"]) == (1, 32, 16)


def test_sources_must_be_clear(finetune, tmp_path):
    done = finetune("pretrain", "--out", tmp_path, check=False)
    assert done.returncode == 2 and "either --data" in done.stderr
    assert LoopSettings().precision == "bf16"
