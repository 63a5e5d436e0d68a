"""`import compress` as strangers use it: their script, their model in training, their mistakes."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress

IDS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))

SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
import compress

theirs, ours, small = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(theirs).eval()  # transformers' own, Conv1D and all
ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected = model(ids).logits

assert "gptq" in compress.names()
model = compress.apply("gptq", model, ids, bits=8, group_size=32)
compress.save(model, small)
again = compress.load(small)
first, second = (compress.TorchRunner(m).logits(ids) for m in (model, again))
assert torch.equal(first, second)
print(f"{((first - expected).norm() / expected.norm()).item():.4f}")

plain = compress.apply("rtn(bits=3)", compress.load(ours), group_size=32)
assert compress.describe("rtn", {"bits": 3}) == "rtn(bits=3)"
for call in (
    lambda: compress.apply("gtpq", plain),
    lambda: compress.apply("gptq", plain, bts=4),
    lambda: compress.apply("gptq", plain),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_the_documented_calls_work_elsewhere(tiny_gpt2, tiny_llama, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", str(tiny_gpt2), str(tiny_llama), str(tmp_path / "small")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, no_method, no_setting, no_calibration = done.stdout.splitlines()
    assert float(error) < 0.05
    assert no_method == "no method 'gtpq'; did you mean gptq?"
    assert no_setting.startswith("method 'gptq' has no setting 'bts'; did you mean bits")
    assert no_calibration == "method 'gptq' needs calibration: (samples, tokens) int64 token ids"


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
def test_a_model_in_training_gives_what_the_same_model_in_evaluation_gives(name, tiny_gpt2):
    trained, evaluated = (AutoModelForCausalLM.from_pretrained(tiny_gpt2) for _ in range(2))
    trained.train().requires_grad_(True)  # with dropout, and gradients wherever they can be
    small = compress.apply(name, trained, IDS)
    reference = compress.apply(name, evaluated.eval().requires_grad_(False), IDS)

    logits = small(IDS).logits  # outside of no_grad
    assert torch.equal(logits, reference(IDS).logits)
    assert not logits.requires_grad and not small.training
    assert not any(parameter.requires_grad for parameter in small.parameters())
    one_token = small(IDS[:1, :1]).logits  # by other kernels
    assert one_token.isfinite().all() and not one_token.requires_grad


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("gptq(bits=3)", {"bits": 4}, r"'bits' is given twice, in 'gptq\(bits=3\)' and beside it"),
        ("rtn", {"skip": [1]}, r"rtn\.skip must be tuple, not \[1\]"),
        ("rtn(skip=[1])", {}, r"rtn\.skip must be tuple, not \[1\]"),
        ("rtn", {"bits": 5}, "bits must be one of"),
        ("rtn", {"bits": "4"}, "rtn.bits must be int, not '4'"),
        ("awq", {"grid": True}, "awq.grid must be int, not True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        compress.apply(name, None, IDS, **settings)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_samples_longer_than_the_context_are_refused(name, tiny_gpt2):
    ids = torch.zeros(1, 1025, dtype=torch.int64)
    with pytest.raises(ValueError, match="samples of 1025 tokens; the model reads 1024"):
        compress.apply(name, compress.load(tiny_gpt2), ids)
