"""Two processes against one: the same losses, and one plain model in the end."""

import itertools
import json
import shutil

import pytest
from safetensors.torch import load_file

from finetune.training.journal import entries

MODEL = ["--layers", "2", "--width", "32", "--heads", "4", "--context", "32"]
LOOP = ["--steps", "6", "--batch", "8", "--micro-batch", "2", "--precision", "fp32"]
LOOP += ["--learning-rate", "3e-3", "--evaluate-every", "2", "--save-every", "4", "--threads", "1"]
LOOP += ["--no-tensorboard"]


@pytest.fixture(scope="module")
def prepared(story, tmp_path_factory, own_cache):
    """A folder of tokens with its tokenizer."""
    from finetune import prepare

    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare.run(prepare.Settings(inputs=(str(story),), out=out, train_tokenizer=300))
    return out


def losses(run):
    return {
        (entry["step"], name): entry[name]
        for entry in entries(run)
        for name in ("loss", "validation_loss", "gradient")
        if name in entry
    }


def same(tmp_path, names, rel):
    runs = [losses(tmp_path / name) for name in names]
    assert len(runs[0]) >= 14
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=rel)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in names]
    for one, two in itertools.pairwise(weights):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert float((tensor - two[name]).abs().max()) < max(2e-4, 10 * rel), name


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 2e-5), ("bf16", 2e-3)])
def test_pretraining_on_two_processes(precision, rel, prepared, tmp_path, finetune):
    call = ["pretrain", "--data", prepared, *MODEL, *LOOP, "--precision", precision]
    finetune(*call, "--out", tmp_path / "one")
    finetune(*call, "--out", tmp_path / "ddp", processes=2)
    finetune(*call, "--out", tmp_path / "fsdp", "--strategy", "fsdp", processes=2)
    same(tmp_path, ("one", "ddp", "fsdp"), rel=rel)


def test_unequal_numbers_of_targets_count_alike(tmp_path, finetune, tiny_llama, monkeypatch):
    """Sentences of 1 to 20 words: a mean over processes of means would be another loss."""
    folder = tmp_path / "e2e-nlg"
    folder.mkdir()
    lines = [f'"name[N{n}], food[F]",{" ".join(["word"] * (1 + n % 20))}.' for n in range(120)]
    for file in ("devset.csv", "testset_w_refs.csv"):
        (folder / file).write_text("\n".join(["mr,ref", *lines, ""]))
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    call = ["train", "--model", tiny_llama, "--task", "e2e", *LOOP]
    finetune(*call, "--out", tmp_path / "one")
    finetune(*call, "--out", tmp_path / "ddp", processes=2)
    same(tmp_path, ("one", "ddp"), rel=2e-5)


def test_lora_on_two_processes(prepared, tmp_path, finetune, tiny_gpt2, monkeypatch):
    still = tmp_path / "still"  # dropout differs from process to process, as it should
    shutil.copytree(tiny_gpt2, still)
    config = json.loads((still / "config.json").read_text())
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (still / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("SLIMBENCH_DATA", str(tmp_path))
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()
    for split in ("valid", "test"):
        text = "".join(
            f" = Title {n} = \n \n The {n} cat sat on {n} mats . \n \n" for n in range(90)
        )
        (folder / f"wiki.{split}.raw").write_text(text)
    call = ["train", "--model", still, "--task", "wikitext", "--method", "lora", *LOOP]
    call += ["--context", "32", "--evaluation-examples", "80"]
    finetune(*call, "--out", tmp_path / "one")
    finetune(*call, "--out", tmp_path / "ddp", processes=2)
    finetune(*call, "--out", tmp_path / "fsdp", "--strategy", "fsdp", processes=2)
    same(tmp_path, ("one", "ddp", "fsdp"), rel=2e-5)


def test_a_sharded_run_goes_on_in_one_process(prepared, tmp_path, finetune):
    call = ["pretrain", "--data", prepared, *MODEL, *LOOP]
    finetune(*call, "--out", tmp_path / "whole")
    finetune(*call, "--out", tmp_path / "two", "--strategy", "fsdp", processes=2)
    last = tmp_path / "two" / "checkpoints" / "step-000006"
    assert sorted(f.name for f in last.iterdir()) == [
        "part-0-of-2.safetensors",
        "part-1-of-2.safetensors",
        "state.json",
    ]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    finetune(*call, "--out", tmp_path / "two")  # from step 4, alone
    same(tmp_path, ("whole", "two"), rel=2e-5)


def test_fsdp_without_torchrun_is_refused(prepared, tmp_path, finetune):
    done = finetune(
        "pretrain", "--data", prepared, *MODEL, "--strategy", "fsdp", "--out", tmp_path, check=False
    )
    assert done.returncode == 2 and "torchrun --standalone" in done.stderr
