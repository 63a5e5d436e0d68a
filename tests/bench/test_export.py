"""`bench export`: what is checked, what a check that fails says, a second runtime, refusals."""

import hashlib
import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from bench import answers, cli, environments, models, run
from bench import export as bench_export
from bench.errors import UsageError
from bench.export import FAILED, Runtime, export, judged
from compress import apply, load
from compress.quant_linear import QuantLinear
from compress.registry import UnknownName

FAST = run.Request(
    model="tiny-llama", window=64, limit=1, threads=1, metrics="size", methods="rtn(group_size=32)"
)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of a Llama in 4-bit codes, whose artefact is in the cache."""
    tasks = run.plan(FAST)
    results = tmp_path_factory.mktemp("results")
    [_, (found, _)] = run.run(tasks, results, lambda title: lambda *state: None)
    assert found["status"] == "ok", found["error"]
    return found | {"results": results}


def ended(arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code or 0


def test_the_command_line(record, tmp_path, capsys):
    out = tmp_path / "small"
    arguments = ["export", record["key"][:5], "--format", "gguf", "--out", out]
    assert ended([*arguments, "--results", record["results"]]) == 0
    first, ours, other = capsys.readouterr().out.splitlines()
    assert first == f"{out}: rtn(group_size=32) of tiny-llama as gguf, 7.30 bits/weight, 0.2 MB"
    assert ours == (
        "slimbench: passed; 30 of 30 layers equal, 21 of them codes; logits 0 deviations apart "
        "(tolerance 0.0001); 64 greedy tokens equal"
    )
    assert other == (
        "llama_cpp: not set up; the environment of llama_cpp is missing; run: "
        "python -m baselines setup llama_cpp"
    )
    report = json.loads((out / "export.json").read_text())
    content = (out / "model.gguf").read_bytes()
    assert report["files"] == {
        "model.gguf": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    }
    # 43,008 weights a block, 20 bytes for 32 of them; two vocabularies in bfloat16; seven norms.
    tensor_bytes = 3 * 43_008 * 20 // 32 + 2 * (2 * 257 * 64) + 4 * (7 * 64)
    assert (report["tensor_bytes"], report["weights"]) == (tensor_bytes, 162_368)
    assert report["bits_per_weight"] == 8 * tensor_bytes / 162_368
    assert report["verified"] and report["key"] == record["key"]
    assert report["checks"][0]["packages"]["torch"] and report["text"]["tokens"] == 64


def test_weights_that_are_not_the_artefacts_fail(record, tmp_path, capsys, monkeypatch):
    format = importlib.import_module("compress.export.gguf")
    write = format.write

    def tampered(model, folder, tokenizer):
        layer = model.model.layers[2].mlp.up_proj
        layer.codes = layer.codes.clone()
        layer.codes[0, 0] ^= 1  # one code of 129,024, by one step
        write(model, folder, tokenizer)

    monkeypatch.setattr(format, "write", tampered)
    out = tmp_path / "wrong"
    arguments = ["export", record["key"], "--format", "gguf", "--out", out]
    assert ended([*arguments, "--results", record["results"]]) == 1
    printed = capsys.readouterr().out
    assert (
        "slimbench: differs; the weights of model.layers.2.mlp.up_proj differ; 29 of 30" in printed
    )
    report = json.loads((out / "export.json").read_text())
    assert report["verified"] is False and (out / "model.gguf").is_file()


@pytest.fixture(scope="module")
def theirs(record, tmp_path_factory):
    """(folder of GGUF, what the artefact answers) for 64 tokens."""
    folder = tmp_path_factory.mktemp("made") / "theirs"
    [artefact] = Path(environments.cache_dir()).glob(f"artefacts/*/{record['compress_key']}/model")
    model = load(artefact)
    compress.export(model, folder, format="gguf")
    return folder, answers.answers(compress.TorchRunner(model.float()), torch.arange(64)[None])


@pytest.fixture
def second(theirs, tmp_path, monkeypatch):
    """Asks a Python that stands for another runtime's."""

    def ask(python, timeout_s=60.0, **about):
        monkeypatch.setitem(bench_export.RUNTIMES, "gguf", Runtime("file", 1e-4, "nothing"))
        monkeypatch.setattr(environments, "python_of", lambda name: Path(python))
        task = {"packages": run.METHOD_PACKAGES, "threads": 1, "ids": list(range(64))}
        task |= {"folder": str(theirs[0])}
        return bench_export.second("gguf", task, theirs[1], tmp_path / "box", timeout_s, **about)

    return ask


def test_another_runtime_that_agrees(second):
    # The adapter `file` is our reader, which computes in float32 as the artefact does here.
    check = second(sys.executable)
    assert check["verdict"] == "passed" and check["logits"]["apart"] < 1e-4
    assert check["greedy"] == {"tokens": 64, "part_at": None} and check["allows"] == "nothing"
    assert check["packages"]["torch"]


def test_inputs_that_become_int8_may_tip_over(second):
    check = second(sys.executable, int8_inputs=True)
    assert check["logits"]["tolerance"] == 0.4 and "rounded to int8" in check["allows"]


FAKES = {
    "says no": (
        "open(box + '/error.json', 'w').write('\"NotImplementedError: 4 bits on a CPU\"')",
        ("not supported", "NotImplementedError: 4 bits on a CPU", True),
    ),
    "is broken": (
        "open(box + '/error.json', 'w').write('\"KeyError: weight\"')",
        ("failed", "KeyError: weight", False),
    ),
    "dies": ("sys.exit('out of luck')", ("failed", "out of luck", False)),
    "hangs": (
        "import time; time.sleep(60)",
        ("failed", "no answer after 2 s; see --timeout-s", False),
    ),
}


@pytest.mark.parametrize("case", FAKES)
def test_another_runtime_that(case, second, tmp_path):
    does, (verdict, reason, verified) = FAKES[case]
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport sys\nbox = sys.argv[-1]\n{does}\n")
    fake.chmod(0o755)
    check = second(fake, timeout_s=2.0)
    assert (check["verdict"], check["reason"]) == (verdict, reason)
    assert (check["verdict"] not in FAILED) is verified


def test_logits_are_judged_by_hand():
    original = {
        "logits": torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]),
        "tokens": torch.tensor([4, 5, 6]),
    }
    deviation = (4 / 3) ** 0.5
    found = {"logits": original["logits"] + 0.2, "tokens": torch.tensor([4, 7, 6])}
    verdict = judged(original, found, 0.2)
    assert verdict["verdict"] == "passed"
    assert verdict["logits"]["apart"] == pytest.approx(0.2 / deviation)
    assert verdict["greedy"] == {"tokens": 3, "part_at": 1}
    assert judged(original, found, 0.17)["verdict"] == "differs"
    for logits, reason in (
        (found["logits"] * float("nan"), "logits hold NaN or infinity"),
        (found["logits"][:1], "logits of shape (1, 2), not (2, 2)"),
    ):
        wrong = judged(original, found | {"logits": logits}, 0.2)
        assert wrong == {"verdict": "differs", "reason": reason}


def quant(codes, scale, zero=None, order=None, offset=None, bias=None, bits=4):
    parts = [None if part is None else torch.tensor(part) for part in (scale, zero, bias, order)]
    scale, zero, bias, order = parts
    offset = None if offset is None else torch.tensor(offset)
    codes = torch.tensor(codes, dtype=torch.uint8)
    zero = None if zero is None else zero.to(torch.uint8)
    return QuantLinear.from_codes(
        codes, scale, zero, bias, bits, 2, order, torch.float32, offset
    )  # fmt: skip


ONE = dict(codes=[[1, 2, 3, 4]], scale=[[1.0, 0.5]], zero=[[0, 4]])  # means 1 2 -0.5 0
SAME = {
    "itself": ONE,
    "8 bits": dict(codes=[[129, 130, 127, 128]], scale=[[1.0, 0.5]], bits=8),
    "in another order": dict(
        codes=[[3, 4, 1, 2]], scale=[[0.5, 1.0]], zero=[[4, 0]], order=[2, 3, 0, 1]
    ),
    "turned round, with offsets": dict(
        codes=[[14, 13, 3, 4]], scale=[[-1.0, 0.5]], offset=[[15.0, -2.0]]
    ),
}
OTHER = {
    "a step": dict(ONE, codes=[[1, 2, 3, 5]]),
    "a scale": dict(ONE, scale=[[1.0, 0.5001]]),
    "a zero": dict(ONE, zero=[[0, 5]]),
    "a bias": dict(ONE, bias=[0.0]),
    "codes of the same weight": dict(codes=[[2, 4, 3, 4]], scale=[[0.5, 0.5]], zero=[[0, 4]]),
}


@pytest.mark.parametrize("case", [*SAME, *OTHER])
def test_layers_are_compared_by_hand(case):
    a, b = (torch.nn.Sequential(quant(**parts)) for parts in (ONE, (SAME | OTHER)[case]))
    expected = {"count": 1, "of_codes": 1, "different": ["0"] if case in OTHER else []}
    assert answers.compared(a, b) == answers.compared(b, a) == expected


def test_a_layer_that_is_missing_or_of_another_kind_differs(tiny_llama):
    original, again = (load(tiny_llama) for _ in range(2))
    assert answers.compared(original, again) == {"count": 30, "of_codes": 0, "different": []}
    del again.model.layers[2]
    apply("rtn(bits=8,dtype=float32)", again)
    found = answers.compared(original, again)
    assert len(found["different"]) == 7 + 7 + 9  # linear layers of two blocks, the whole third
    assert found["different"][-1] == "model.layers.2.post_attention_layernorm"


def test_refusals(record, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(kind, changed=record, format="gguf", name=None):
        with pytest.raises(kind) as caught:
            export(changed, format, out, name, 60.0)
        assert not out.exists()
        return str(caught.value)

    job = record["job"]
    assert refused(UnknownName, format="ggfu") == "no format 'ggfu'; did you mean gguf?"
    peer = record | {"job": job | {"method": "torchao:int8", "settings": {}}}
    assert refused(UsageError, peer).startswith("torchao:int8 writes its own library's format")
    assert refused(ValueError, record | {"compress_key": "0" * 12}) == (
        f"the artefact of {record['key']} is not in the cache; make it again, and name the new "
        "record: python -m bench run --model tiny-llama --methods 'rtn(group_size=32)'"
    )
    assert "name it by --model" in refused(UsageError, record | {"job": job | {"model": "mine"}})
    assert refused(ValueError, name="tiny-gpt2").endswith("; give it with --model")
    old = record | {"job": job | {"data_sha": "0" * 12}}
    assert refused(ValueError, old).startswith("data 'sample' is not the text of the record")
    with pytest.raises(UsageError, match="is there already; choose a new folder"):
        export(record, "gguf", tmp_path, None, 60.0)


def test_a_method_that_the_format_cannot_hold_leaves_no_folder(record, tmp_path):
    tasks = run.plan(replace(FAST, methods="rtn(bits=8,group_size=32)"))
    found = list(run.run(tasks, record["results"], lambda title: lambda *state: None))
    with pytest.raises(ValueError, match=r"gguf cannot hold this model: .*8-bit codes with a zero"):
        export(found[1][0], "gguf", tmp_path / "out", None, 60.0)
    assert not (tmp_path / "out").exists()


def test_a_file_of_others_can_be_exported_again(theirs, tmp_path):
    tasks = run.plan(replace(FAST, methods=f"file:{theirs[0]}"))
    found = list(run.run(tasks, tmp_path / "results", lambda title: lambda *state: None))
    report = export(found[1][0], "gguf", tmp_path / "again", None, 60.0)
    assert report["method"] == f"file:{theirs[0]}" and report["verified"]
    assert report["checks"][0]["layers"] == {"count": 30, "of_codes": 21, "different": []}


def test_a_short_context_leaves_room_for_answers(tiny_llama, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(tiny_llama, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 100}
    (short / "config.json").write_text(json.dumps(config))
    job = run.plan(replace(FAST, model=str(short), metrics="size"))[0].job
    assert len(bench_export.first_tokens(vars(job), models.resolve(str(short)))) == 50
