"""`bench compress`: one method's artefact as a folder that stands alone; refusals."""

import json
from dataclasses import replace

import pytest
import torch

from bench import cli, models
from bench.compress_folder import compress_folder
from bench.errors import UsageError
from bench.run import Request
from compress import TorchRunner, checkpoint

SMALL = Request(model="tiny-llama", samples=4, length=32, threads=1)


def quiet(unit, done, total):
    pass


def test_a_plain_result_is_a_model_that_other_programs_read(tmp_path):

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "made" / "rotated"
    written = compress_folder(replace(SMALL, methods="rotate(seed=3)"), folder, quiet)
    assert written == sum(file.stat().st_size for file in folder.iterdir())
    ids = AutoTokenizer.from_pretrained(folder)("some text", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = TorchRunner(checkpoint.load(folder)).logits(ids)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, ours, atol=1e-4)
    base = models.resolve("tiny-llama")
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["source"] == "rotate(seed=3) of tiny-llama"
    assert lineage["origin"]["base"]["revision"] == base.revision
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"], "for transformers 4"
    again = models.resolve(str(folder))
    assert again.alias == "rotated" and again.revision != base.revision


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["compress", "rtn(bits=3,group_size=32)", "small", "--model", "tiny-llama"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code and capsys.readouterr().out.startswith("small: 0.")
    assert checkpoint.layer_specs(tmp_path / "small")
    assert "architectures" not in json.loads((tmp_path / "small" / "config.json").read_text())
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2 and "small is there already" in capsys.readouterr().err


def test_it_is_the_artefact_of_a_run_and_comes_from_the_cache(tmp_path, planted):
    text = tmp_path / "short.txt"  # too short, and too much alike, to be measured on as well
    text.write_text("The same line again and again.\n" * 40)
    request = replace(SMALL, methods=planted(), data=str(text))
    compress_folder(request, tmp_path / "a", quiet)
    compress_folder(request, tmp_path / "b", quiet)
    assert len(planted.calls()) == 1, "compressed once, and never loaded to be measured"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    [made] = (tmp_path / "cache" / "artefacts").rglob("model.safetensors")
    assert weights[0] == weights[1] == made.read_bytes()


def test_an_evaluation_of_it_knows_its_parent(tmp_path):
    from finetune.decoding.loading import find
    from finetune.evaluate import Settings, _about

    compress_folder(replace(SMALL, methods="rtn(group_size=32)"), tmp_path / "small", quiet)
    about = _about(Settings(model=str(tmp_path / "small")), find(str(tmp_path / "small")))
    assert about["parent"] == models.resolve("tiny-llama").revision
    assert about["compression"]["method"] == "Rtn"


def test_refusals(tmp_path, planted):
    for methods in ("rtn,cast", "none,cast", "rtn,none", "ours"):
        with pytest.raises(UsageError, match="one folder holds what one method makes"):
            compress_folder(replace(SMALL, methods=methods), tmp_path / "no", quiet)
    with pytest.raises(ValueError, match=r"(?s)compress: planted fault.*its log:.*Traceback"):
        compress_folder(replace(SMALL, methods=planted(fault="raise")), tmp_path / "no", quiet)
    assert not (tmp_path / "no").exists()


def test_a_compressed_model_is_refused_where_a_peer_would_fill_it_with_random_numbers(tmp_path):
    from bench import run

    compress_folder(replace(SMALL, methods="rtn(group_size=32)"), tmp_path / "small", quiet)
    request = replace(SMALL, model=str(tmp_path / "small"), methods="torchao:int8")
    with pytest.raises(UsageError, match="small is compressed already"):
        run.plan(request)
