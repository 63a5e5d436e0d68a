"""leaderboard: columns, groups, differences by hand, text that tries to break a table."""

import copy
import csv
import io
import json
import math

import pytest

from bench import leaderboard as board
from compress import registry

registry.discover("compress.methods")
COLUMNS = (
    "model,method,settings,data,protocol,status,perplexity,size_bytes,weights,bits_per_weight,"
    "prefill_ms,decode_tokens_per_s,load_s,compress_s,compress_cpu_s,compress_peak_rss_bytes,"
    "front,key,error"
)


def make(method="none", perplexity=20.0, started="2026-11-22T10:00:00+00:00", **changes):
    """An ok record with eight blocks of 25 scored tokens, whose nll gives `perplexity`."""
    nll = 200 * math.log(perplexity) if perplexity else 0.0
    job = {
        "model": "tiny-llama",
        "revision": "r0",
        "data": "sample",
        "data_sha": "d0",
        "calibration": None,
        "method": method,
        "settings": {},
        "protocol": {"window": 101, "limit": None},
        "metrics": ["size", "perplexity"],
        "seed": 0,
        "threads": 2,
        "device": "cpu",
        "environment": "torch-2.13.0",
        "code": {"compress": "c", "measure": "m"},
    }
    values = {
        "perplexity": perplexity,
        "block_nll_nats": [0.1 * nll, 0.15 * nll] * 4,
        "scored_tokens": 200,
        "size_bytes": 1_500_000,
        "weights": 2_666_666,
        "bits_per_weight": 4.5,
        "prefill_ms": 12.34,
        "decode_tokens_per_s": 56.78,
        "load_s": 0.123,
        "compress_s": 3.21,
        "compress_cpu_s": 6.54,
        "compress_peak_rss_bytes": 98_765_432,
    }
    record = {
        "key": f"{method}-{perplexity}-{started}",
        "status": "ok",
        "error": None,
        "started": started,
        "job": job,
        "values": values,
        "machine": {"name": "m", "cpu": "EPYC", "cores": 2, "ram_bytes": 2**34, "flags": ["amx"]},
        "packages": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "blocks": {
            "evaluation": {
                "split": "test",
                "tokens": 1234,
                "count": 2,
                "sha256": "0123456789abcdef0123",
            }
        },
        "dirty": False,
    }
    for name, value in changes.items():
        place = next((part for part in (job, values) if name in part), record)
        place[name] = value
    return record


def failed(method="awq", error="compress: broken", **changes):
    return make(method, None, status="failed", error=error, values={}, **changes)


def test_csv_has_exactly_these_columns_and_raw_units():
    first, second, *rest = csv.DictReader(io.StringIO(text := board.to_csv([make(), failed()])))
    assert text.splitlines()[0] == COLUMNS
    assert rest == []
    assert (first["method"], first["size_bytes"], first["perplexity"]) == (
        "none",
        "1500000",
        "20.0",
    )
    assert first["protocol"] == "device=cpu limit=all seed=0 threads=2 window=101"
    assert first["error"] == "" and first["compress_peak_rss_bytes"] == "98765432"
    assert (second["status"], second["perplexity"], second["size_bytes"]) == ("failed", "", "")
    assert second["error"] == "compress: broken"


def test_json_has_the_same_columns_and_null():
    rows = json.loads(board.to_json([make(), failed()]))
    assert [",".join(row) for row in rows] == [COLUMNS, COLUMNS]
    assert rows[0]["size_bytes"] == 1_500_000 and rows[0]["error"] is None
    assert rows[1]["perplexity"] is None


NASTY = 'a|b\nc\r\n"d", `e` <b>\\|'


def test_text_cannot_break_out_of_a_cell():
    records = [make(), failed(error=NASTY)]
    row = list(csv.DictReader(io.StringIO(board.to_csv(records), newline="")))[1]
    assert row["error"] == NASTY
    assert json.loads(board.to_json(records))[1]["error"] == NASTY
    lines = board.to_markdown(records).splitlines()
    (line,) = [line for line in lines if line.startswith("| awq")]
    assert line.endswith('failed: a\\|b c "d", \\`e\\` &lt;b>\\\\\\| |')
    header = next(line for line in lines if line.startswith("| method"))
    assert line.replace("\\\\", "").replace("\\|", "").count("|") == header.count("|")


def test_settings_show_what_differs_from_the_default():
    defaults = json.loads(json.dumps(vars(registry.get("rtn"))))
    assert board.settings_text(make("rtn", settings=defaults)["job"]) == ""
    assert board.settings_text(make("rtn", settings=defaults | {"bits": 3})["job"]) == "bits=3"
    drawn = {"data": "sample", "sha": "d0", "samples": 64, "length": 512, "seed": 0}
    job = make("rtn", settings=defaults | {"bits": 3})["job"]
    assert board.settings_text(job | {"calibration": drawn}) == "bits=3"
    other = drawn | {"data": "c4", "samples": 8}
    assert board.settings_text(job | {"calibration": other}) == "bits=3; calibration=c4:8x512"
    assert board.settings_text(make("peer:gone", settings={"a": 1})["job"]) == "a=1"


def test_only_the_plain_none_is_the_parent():
    settings = {"dtype": "float32"}
    parent = make(settings=settings)
    half = make(perplexity=19.0, settings={"dtype": "bfloat16"})
    assert not board.is_parent(half) and board.is_parent(parent)
    text = board.to_markdown([half, parent, make("gptq", 21.0)])
    assert "+5.00 %" in text and "-5.00 %" in text  # both against 20


def test_best_first_failures_last_with_their_reason():
    records = [failed(), make("rtn", 30.0), make("gptq", 21.0), make()]
    assert [row["method"] for row in board.rows(records)] == ["none", "gptq", "rtn", "awq"]
    assert "failed: compress: broken" in board.to_markdown(records).splitlines()[-1]


def test_change_against_the_parent_by_hand():
    text = board.change_text(make("gptq", 21.0), make())
    # Four blocks change by 0.8 and four by 1.2 times the mean, ln(21/20) a token. A resample of
    # eight has k of the second kind; the expanded tail of 0.57 % lies between P(k = 0) = 0.39 %
    # and P(k <= 1) = 3.5 %: the ends are k = 1 and k = 7, 0.85 and 1.15 times ln(21/20).
    assert text == "+5.00 % [+4.23, +5.77]"


def test_no_change_is_claimed_where_blocks_do_not_pair():
    parent = make()
    assert board.change_text(parent, parent) == ""
    assert board.change_text(make("gptq", 21.0), None) == ""
    assert board.change_text(make("gptq", 21.0, block_nll_nats=[1.0]), parent) == ""
    assert board.change_text(failed(), parent) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"model": "tiny-gpt2"},
        {"revision": "r1"},
        {"data": "wikitext2"},
        {"data_sha": "d1"},
        {"protocol": {"window": 64, "limit": None}},
        {"threads": 1},
        {"seed": 1},
        {"machine": make()["machine"] | {"name": "other"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_cannot_be_compared_is_in_another_table_without_a_change(change):
    text = board.to_markdown([make(), make("gptq", 21.0, **change)])
    assert text.count("| method |") == 2
    assert "%" not in "".join(line for line in text.splitlines() if line.startswith("| gptq"))


def test_calibration_does_not_part_a_table():
    drawn = {"data": "sample", "sha": "d0", "samples": 64, "length": 512, "seed": 0}
    text = board.to_markdown([make(), make("gptq", 21.0, calibration=drawn)])
    assert text.count("| method |") == 1 and "+5.00 %" in text


def test_only_the_newest_answer_to_a_question_is_shown():
    old = make("gptq", 25.0)
    new = make("gptq", 21.0, started="2026-11-23T10:00:00+00:00", code={"compress": "c2"})
    new["job"]["environment"] = "torch-2.14.1"
    assert [row["perplexity"] for row in board.rows([new, old])] == [21.0]
    again = copy.deepcopy(old)
    again["machine"] = old["machine"] | {"name": "other"}
    assert len(board.rows([new, old, again])) == 2


def test_markdown_header_says_how_where_and_when():
    text = board.to_markdown([make(), make("gptq", 21.0, started="2026-11-23T10:00:00+00:00")])
    for part in (
        "## tiny-llama on sample",
        "protocol: device=cpu limit=all seed=0 threads=2 window=101\n",
        "data: test, 1,234 tokens, 2 windows used, SHA-256 of the text 0123456789abcdef\n",
        "machine: EPYC, 2 cores, 16 GiB (amx); threads used: 2",
        "torch 2.13.0; commit 0123456789ab; newest record 2026-11-23",
        "weights: revision r0, from",
        "| gptq |  | 21.000 | +5.00 % [+4.23, +5.77] | 1.5 | 2.7 | 4.50 | 12.3 (1.00x) "
        "| 56.8 (1.00x) | 0.12 | 3.2 | 6.5 | 99 |  | gptq-21.0",
    ):
        assert part in text
    assert "- data: checksum d0\n" in board.to_markdown([failed(blocks={})])
    assert "0123456789ab changed" in board.to_markdown([make(dirty=True)])


def test_each_environment_says_what_ran_in_it():
    late = "2026-11-24T10:00:00+00:00"
    peer = make("lib:gptq", 21.0, started=late, environment="lib-0a1b2c")
    peer["packages"] = {"torch": "2.6.0", "lib": "1.2"}
    gone = make("lib:awq", 22.0, started=late, environment="lib-wanted-0a1b2c")
    gone["packages"] = {}
    failed = make("lib:rtn", 23.0, started=late, environment="lib-0a1b2c")
    failed["packages"] = {"torch": "2.6.0"}  # a failed job knows only what all have
    lines = board.to_markdown([make(), peer, gone, failed]).splitlines()
    assert "- lib: torch 2.6.0 lib 1.2" in lines
    [software] = [line for line in lines if line.startswith("- software")]
    assert "torch 2.13.0;" in software and not any(line.startswith("- lib-") for line in lines)


def test_the_front_by_hand():
    points = {  # perplexity, bytes, tokens a second
        "none": (20.0, 400, 10.0),
        "a": (21.0, 100, 30.0),
        "b": (21.0, 100, 20.0),  # as good and as small as a, slower
        "c": (25.0, 120, 40.0),  # worse and larger than a, faster
        "d": (30.0, 50, None),  # the smallest; not timed
        "e": (31.0, 50, 5.0),  # as small as d, and worse
    }
    records = [
        make(name, perplexity, size_bytes=size, decode_tokens_per_s=speed)
        for name, (perplexity, size, speed) in points.items()
    ]
    records.append(failed(method="f"))
    found = {row["method"]: row["front"] for row in board.rows(records)}
    assert found == {
        **{"none": "size decode", "a": "size decode", "b": "size", "c": "decode"},
        **{"d": "size", "e": None, "f": None},
    }
    text = board.to_markdown(records)
    assert "| size, decode | a-21.0" in text and "40.0 (4.00x)" in text and "5.0 (0.50x)" in text


def test_records_of_another_kind_are_passed_over():
    foreign = make("train")
    del foreign["job"]["protocol"]
    wrong = make("rtn", size_bytes="many")
    assert [row["method"] for row in board.rows([foreign, wrong, make()])] == ["none"]
    assert "No records yet" in board.to_markdown([])
    assert board.to_csv([]) == COLUMNS + "\n"
