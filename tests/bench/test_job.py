"""Job: its keys are stable, and change with what they must change with and nothing else."""

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from bench.job import Job, question

JOB = Job(
    model="tiny-llama",
    revision="0123456789abcdef",
    data="sample",
    data_sha="aaaabbbbcccc",
    calibration={"data": "sample", "sha": "d", "samples": 64, "length": 512, "seed": 0},
    method="gptq",
    settings={"bits": 4, "skip": ("lm_head",)},
    protocol={"window": 1024, "limit": None},
    metrics=("size", "perplexity"),
    seed=0,
    threads=2,
    device="cpu",
    environment="torch-2.13.0",
    code={"compress": "c0", "measure": "m0"},
)
OTHER = {
    "model": "tiny-gpt2",
    "revision": "fedcba9876543210",
    "data": "wikitext2",
    "data_sha": "ddddeeeeffff",
    "calibration": None,
    "method": "awq",
    "settings": {"bits": 3, "skip": ("lm_head",)},
    "protocol": {"window": 512, "limit": None},
    "metrics": ("size",),
    "seed": 1,
    "threads": 1,
    "device": "cuda",
    "environment": "torch-2.14.1",
    "code": {"compress": "c1", "measure": "m0"},
}
NOT_IN_THE_ARTEFACT = {"data", "data_sha", "protocol", "metrics"}


def test_every_field_is_covered():
    assert OTHER.keys() == asdict(JOB).keys()


def test_keys_are_the_same_on_every_machine():
    assert (JOB.key(), JOB.compress_key()) == ("52c945588963", "8ccd78110d6a")


def test_key_is_the_start_of_a_plain_sha256():
    text = json.dumps(asdict(JOB), sort_keys=True)
    assert JOB.key() == hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize("field", OTHER)
def test_key_changes_with_each_field(field):
    assert replace(JOB, **{field: OTHER[field]}).key() != JOB.key()


@pytest.mark.parametrize("field", OTHER)
def test_artefact_key_changes_only_with_what_changes_the_artefact(field):
    same = replace(JOB, **{field: OTHER[field]}).compress_key() == JOB.compress_key()
    assert same == (field in NOT_IN_THE_ARTEFACT)


def test_new_metrics_code_measures_again_but_does_not_compress_again():
    newer = replace(JOB, code={"compress": "c0", "measure": "m1"})
    assert newer.key() != JOB.key()
    assert newer.compress_key() == JOB.compress_key()


def test_key_survives_json_and_the_order_of_settings():
    back = Job(**json.loads(json.dumps(asdict(JOB))))
    turned = replace(JOB, settings=dict(reversed(JOB.settings.items())))
    assert back.key() == turned.key() == JOB.key()
    assert back.compress_key() == turned.compress_key() == JOB.compress_key()


def test_a_question_outlives_versions_of_the_software():
    newer = replace(JOB, code={"compress": "c9", "measure": "m9"}, environment="torch-3")
    assert question(asdict(newer)) == question(asdict(JOB))
    assert question(asdict(replace(JOB, threads=1))) != question(asdict(JOB))
