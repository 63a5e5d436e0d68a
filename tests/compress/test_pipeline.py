"""Methods joined by +: written, read, refused in orders that make no sense, equal to one by one."""

import json
from dataclasses import asdict

import pytest
import torch

import compress
from compress import checkpoint, registry
from compress.base import TorchRunner

IDS = torch.randint(0, 257, (4, 24), generator=torch.Generator().manual_seed(0))
WRITTEN = "prune_structured(ratio=0.3)+prune_depth+gptq(bits=3,skip=['lm_head','o_proj'])"


def test_written_and_read():
    name, settings = registry.parse(WRITTEN)
    assert name == "prune_structured+prune_depth+gptq"
    assert settings["stages"] == [{"ratio": 0.3}, {}, {"bits": 3, "skip": ["lm_head", "o_proj"]}]
    method = registry.get(name, **settings)
    assert [type(stage).__name__ for stage in method.stages] == [
        "PruneStructured",
        "PruneDepth",
        "Gptq",
    ]
    assert method.needs_calibration and method.leaves == "codes"
    stored = json.loads(json.dumps(asdict(method)))  # as a record keeps it
    assert registry.get(name, **stored) == method
    again = registry.describe(name, stored)
    assert registry.get(registry.parse(again)[0], **registry.parse(again)[1]) == method
    assert registry.changed(name, stored) == (
        "prune_structured(ratio=0.3) gptq(bits=3,skip=['lm_head','o_proj'])"
    )
    assert registry.parse_list("rtn+cast, gptq")[0][0] == "rtn+cast"
    assert registry.parse("file:a+b.gguf") == ("file", {"path": "a+b.gguf"})


def test_as_one_by_one(tiny_llama):
    model = checkpoint.load(tiny_llama)
    for stage in ("prune_structured(ratio=0.3)", "prune_depth", "gptq(bits=8)"):
        model = compress.apply(stage, model, IDS)
    steps = []
    both = compress.apply(
        "prune_structured(ratio=0.3)+prune_depth+gptq(bits=8)",
        checkpoint.load(tiny_llama),
        IDS,
        lambda done, total: steps.append((done, total)),
    )
    assert torch.equal(TorchRunner(both).logits(IDS), TorchRunner(model).logits(IDS))
    assert steps == sorted(steps) and steps[-1] == (3000, 3000)


@pytest.mark.parametrize(
    "order, reason",
    [
        ("gptq+recover", "gptq leaves packed codes.*: recover cannot follow it"),
        ("rtn+prune_structured", "rtn leaves packed codes.*: prune_structured cannot follow it"),
        ("prune_depth+dynamic+awq", "dynamic leaves packed codes.*: awq cannot follow it"),
        ("prune_depth+file", "file reads a file of its own"),
    ],
)
def test_orders_that_make_no_sense(order, reason):
    with pytest.raises(ValueError, match=reason):
        registry.get(order)


def test_what_cannot_be_read():
    with pytest.raises(registry.UnknownName, match="did you mean gptq"):
        registry.get("prune_depth+gptx")
    with pytest.raises(registry.UnknownName, match="no setting 'bit'"):
        compress.apply("prune_depth+gptq(bit=3)", None, IDS)
    with pytest.raises(ValueError, match="settings of a stage stand in its own brackets"):
        compress.apply("prune_depth+gptq", None, IDS, bits=3)
    for text in ("gptq+", "gptq+(bits=3)", "gptq(bits=3+rtn"):
        with pytest.raises(ValueError):
            compress.apply(text, None, IDS)


def test_every_order_that_fits_and_why_others_do_not():
    name, settings = registry.parse("prune_depth+prune_structured+rtn(bits=3)")
    fit, reasons = registry.get(name, **settings).orders()
    assert [each.name for each in fit] == [
        "prune_depth+prune_structured+rtn",
        "prune_structured+prune_depth+rtn",
    ]
    assert all(each.stages[-1].bits == 3 for each in fit)
    assert len(reasons) == 4 and all("rtn leaves packed codes" in reason for reason in reasons)
    name, settings = registry.parse("cast+cast")
    assert len(registry.get(name, **settings).orders()[0]) == 1


def test_prefixes():
    name, settings = registry.parse("prune_depth(blocks=2)+recover+gptq")
    (first, one), (second, two) = registry.get(name, **settings).prefixes()
    assert (first, one) == ("prune_depth", compress.get("prune_depth", blocks=2))
    assert second == two.name == "prune_depth+recover" and two.stages[0].blocks == 2
