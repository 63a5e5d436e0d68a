"""table: what it says of evaluations, differences by hand, what is no evaluation."""

import json

import pytest

from bench.errors import UsageError
from finetune import table


def record(name, chosen, parent=None, lineage=None, data="d1"):
    items = [{"group": f"q{n}", "right": 0, "chosen": c} for n, c in enumerate(chosen)]
    share = chosen.count(0) / len(chosen)
    return {
        "model": {"alias": name, "revision": f"r-{name}", "parent": parent, "lineage": lineage},
        "task": "mrpc",
        "split": "test",
        "data_sha256": data,
        "measures": {"accuracy": {"value": share, "low": 0.1, "high": 0.9, "method": "Wilson"}},
        "items": items,
        "protocol": {"always_the_same_choice": 0.5},
    }


BASE = record("base", [0, 1, 1, 1, 0, 1, 1, 1])
RECIPE = {"task": "mrpc", "method": "lora", "rank": 8, "batch": 32, "learning_rate": 5e-4}
TUNED = record(
    "tuned", [0, 0, 0, 1, 0, 1, 0, 1], parent="r-base", lineage={"recipe": RECIPE, "step": 7}
)


def test_difference_is_paired():
    name, change = table.difference(TUNED, BASE)
    assert (name, change.value) == ("accuracy", 3 / 8)
    assert 0 <= change.low < 3 / 8 < change.high
    assert table.difference(BASE, BASE)[1].low == table.difference(BASE, BASE)[1].high == 0


def test_markdown():
    text = table.markdown([BASE, TUNED])
    assert "### mrpc, test: 8 items" in text
    assert "| base |  | 0.2500 [0.1000, 0.9000] |  |" in text
    assert "| tuned | mrpc, lora rank 8, 7 steps of 32, rate 0.0005 | 0.6250" in text
    assert "accuracy +0.3750 [" in text
    assert "The same choice every time: 0.5000." in text


def test_other_examples_are_another_table_and_are_not_compared():
    text = table.markdown([BASE, TUNED | {"data_sha256": "d2"}])
    assert text.count("###") == 2
    assert "+0.3750" not in text


def test_another_protocol_is_another_table():
    other = TUNED | {"protocol": TUNED["protocol"] | {"decoding": {"beams": 4}}}
    text = table.markdown([BASE, other])
    assert text.count("###") == 2 and "Decoding: beams 4." in text
    typed = TUNED | {"protocol": TUNED["protocol"] | {"dtype": "torch.bfloat16"}}
    assert table.markdown([BASE, typed]).count("###") == 1


def test_models_of_one_name_are_told_apart_by_their_revisions():
    namesake = record("base", [0] * 8, parent="r-base") | {}
    namesake["model"] |= {"revision": "r-other"}
    assert "accuracy +0.7500 [" in table.markdown([BASE, namesake])
    alone = table.markdown([namesake])
    assert "accuracy" in alone and "+" not in alone


def test_running_text_is_compared_window_by_window():
    def windows(name, nats, parent=None):
        items = [{"nll_nats": nats * 63 + n, "correct": 1, "tokens": 63} for n in range(9)]
        return BASE | {
            "model": {"alias": name, "revision": f"r-{name}", "parent": parent},
            "measures": {"perplexity": {"value": 1.0, "low": None}},
            "items": items,
            "protocol": {"window": 64, "tokens": 1000},
        }

    base, tuned = windows("base", 3.0), windows("tuned", 2.5, "r-base")
    assert "nats per token -0.5000 [-0.5000, -0.5000]" in table.markdown([base, tuned])


def test_means_over_items_only():
    items = [{"group": "a", "answer": "x", "rouge_l": 0.5, "meteor": 0.1}] * 8
    measures = {name: {"value": 0.5} for name in ("bleu", "meteor", "rouge_l")}
    assert table.outcomes({"items": items, "measures": measures}) == {"rouge_l": [0.5] * 8}


def test_files_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.json").write_text(json.dumps(TUNED))
    (tmp_path / "a.json").write_text(json.dumps(BASE))
    (tmp_path / "sub" / "config.json").write_text("{}")
    assert [r["model"]["alias"] for r in table.read([str(tmp_path)])] == ["base", "tuned"]
    out = tmp_path / "table.md"
    table.run(table.Settings((str(tmp_path / "a.json"), str(tmp_path / "sub")), out))
    assert out.read_text() == table.HEAD + table.markdown([BASE, TUNED])


def test_children_follow_their_parents():
    small = record("a compressed", [0] * 8, parent="r-tuned")
    lines = table.markdown([small, TUNED, record("zero", [1] * 8), BASE]).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == ["model", "base", "tuned", "a compressed", "zero"]


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "lacks 'model'"), ("[", "cannot be read as JSON")]
)
def test_a_named_file_that_is_no_evaluation(content, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        table.read([str(tmp_path / "." / "a.json")])
    with pytest.raises(UsageError, match=message):
        table.read([f"{tmp_path}/./a.json"])


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="no evaluation"):
        table.read([str(tmp_path)])
