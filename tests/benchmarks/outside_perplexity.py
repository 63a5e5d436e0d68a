"""Records' perplexity beside outside programs, each in its own environment.

    python tests/benchmarks/outside_perplexity.py RECORD.json ... [--windows 4] [--model PATH]

A record of `none` is compared with lm-eval's rolling log-likelihood of the model, each window a
document whose first token is its prefix; a peer's record with the artefact as its own library, or
transformers, loads it, and torch's cross entropy. Windows of tokens are the bench's, and so
is how many a script reads at a time (LLM.int8 makes exceptions of what is large anywhere in a
batch); loading and scoring are not. Prints both perplexities and their relative difference.

--windows: only the first so many, 0 for all. --model: the record's model, where its name is that of
a folder. Needs the records' artefacts in the cache and, for `none`, `python -m baselines setup
lm_eval`.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench import data, environments, models
from bench.machine import machine
from bench.metrics.perplexity import BATCH_TOKENS
from bench.paths import cache_dir

LM_EVAL = """
import json, sys
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
folder, windows, threads = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
import torch
torch.set_num_threads(threads)
lm = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
sums = []
for ids in windows:
    rolling = get_rolling_token_windows(
        token_list=ids[1:], prefix_token=ids[0], max_seq_len=len(ids) - 1, context_len=1)
    asked = [(("", ""), *make_disjoint_window(pair)) for pair in rolling]
    sums.append(-sum(score for score, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)))
print(json.dumps(sums))
"""
PLAIN = """
import json, sys, torch
folder, windows, threads = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
torch.set_num_threads(threads)
{load}
sums = []
with torch.no_grad():
    for ids in torch.tensor(windows).split({batch}):
        for row, logits in zip(ids, model(ids).logits):
            loss = torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:], reduction="sum")
            sums.append(loss.item())
print(json.dumps(sums))
"""
TRANSFORMERS = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder).eval()
"""
LOADS = {  # by library; the others' files are read by no plain script of a few lines
    **dict.fromkeys(("llmcompressor", "bitsandbytes", "hqq", "auto_round"), TRANSFORMERS),
    "gptqmodel": """
import os
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
from gptqmodel import GPTQModel
model = GPTQModel.load(folder, device="cpu").model.eval()
""",
    "quanto": """
from optimum.quanto import QuantizedModelForCausalLM
model = QuantizedModelForCausalLM.from_pretrained(folder)
for layer in model._wrapped.modules():
    if hasattr(getattr(layer, "weight", None), "_data"):
        layer.weight._data = layer.weight._data.clone()  # unaligned in the mapped file: a crash
""",
}


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--model")
    options = parser.parse_args()
    for file in options.records:
        record = json.loads(file.read_text(encoding="utf-8"))
        ours, theirs, by = compared(record, options.windows, options.model)
        print(
            f"{record['job']['model']} {record['job']['method']}: bench {ours:.6f}, "
            f"{by} {theirs:.6f}, relative difference {abs(theirs / ours - 1):.1e}",
            flush=True,
        )


def compared(record: dict[str, Any], count: int, name: str | None) -> tuple[float, float, str]:
    """Perplexity in the record, the outside one, and whose that is."""
    job, values = record["job"], record["values"]
    model = models.resolve(name or job["model"])
    if model.revision != job["revision"]:
        raise SystemExit(f"{model.folder} is not the model of the record; give it with --model")
    if data.fingerprint(job["data"]) != job["data_sha"]:
        raise SystemExit(f"data {job['data']!r} is not what the record was measured on")
    protocol = job["protocol"]
    blocks = data.evaluation_blocks(
        job["data"], models.tokenizer(model), protocol["window"], protocol["limit"]
    )
    windows = blocks.ids.tolist()[: count or None]
    scored = len(windows) * (protocol["window"] - 1)
    library = job["method"].partition(":")[0]
    if library == "none":
        environment, code, folder = "lm_eval", LM_EVAL, model.folder
    elif library in LOADS:
        environment, code = library, PLAIN.replace("{load}", LOADS[library])
        code = code.replace("{batch}", str(max(1, BATCH_TOKENS // protocol["window"])))
        artefacts = cache_dir() / "artefacts" / machine()["name"]
        folder = artefacts / record["compress_key"] / "model"
    else:
        raise SystemExit(f"{job['method']}: compare `none` or a method of {', '.join(LOADS)}")
    sums = outside(environment, code, folder, windows, job["threads"])
    ours = math.exp(math.fsum(values["block_nll_nats"][: len(windows)]) / scored)
    return ours, math.exp(math.fsum(sums) / scored), environment


def outside(
    environment: str, code: str, folder: Path, windows: list[list[int]], threads: int
) -> list[float]:
    """The -ln p of each window as `code` sums it, run in `environment`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(windows, file)
        file.flush()
        python = str(environments.python_of(environment))
        command = [python, "-c", code, str(folder), file.name, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or f"the script ended with {done.returncode}"
        raise SystemExit(f"in {environment}: {reason.splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
