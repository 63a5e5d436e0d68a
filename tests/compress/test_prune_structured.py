"""prune_structured: the cost of a unit against brute force, by hand, against another library."""

import math

import pytest
import torch
import torch_pruning as pruning
from comparing import layer_and_gram

import compress
from compress import checkpoint
from compress.block_shapes import shapes
from compress.unit_choice import choose, inverse, unit_costs, unit_energies, without
from compress.unit_slopes import slopes


def error(change, gram):
    return float(((change @ gram) * change).sum())


def best_without(weight, gram, gone):
    """The least squares that `without` solves, by the normal equations of the inputs that stay."""
    stay = [column for column in range(len(gram)) if column not in gone]
    new = weight @ gram[:, stay] @ torch.linalg.inv(gram[stay][:, stay])
    change = weight.clone()
    change[:, stay] -= new
    return new, error(change, gram)


@pytest.mark.parametrize("size", [1, 3])
def test_the_cost_of_a_unit_is_the_least_squares_error_without_it(size):
    weight, gram = (part.double() for part in layer_and_gram(6, 12))
    count = 12 // size
    costs = unit_costs(weight, inverse(gram, 1e-12), count)
    for unit in range(count):
        gone = range(unit * size, (unit + 1) * size)
        new, expected = best_without(weight, gram, gone)
        assert float(costs[unit]) == pytest.approx(expected, rel=1e-5)
        dropped = torch.zeros(12, dtype=torch.bool)
        dropped[list(gone)] = True
        found, rest = without(weight, inverse(gram, 1e-12), dropped)
        torch.testing.assert_close(found, new, rtol=1e-5, atol=1e-7)
        stay = ~dropped
        torch.testing.assert_close(
            rest, torch.linalg.inv(gram[stay][:, stay]), rtol=1e-5, atol=1e-7
        )


def test_one_after_the_other_is_all_at_once():
    weight, gram = (part.double() for part in layer_and_gram(6, 12))
    kept, found = choose(weight, inverse(gram, 1e-12), 12, 7, None)
    gone = [column for column in range(12) if column not in kept.tolist()]
    new, _ = best_without(weight, gram, gone)
    torch.testing.assert_close(found, new, rtol=1e-5, atol=1e-7)
    assert kept.tolist() == sorted(kept.tolist()) and len(kept) == 7


def test_of_two_inputs_that_are_equal_one_goes_and_the_other_takes_its_place():
    """x0 = x1: each alone costs nothing, both together cost a lot."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 1] = x[:, 0]
    weight = torch.tensor([[2.0, 3.0, 0.5, 0.5]], dtype=torch.float64)
    gram = x.T @ x / len(x)
    kept, new = choose(weight, inverse(gram, 1e-9), 4, 3, None)
    assert kept.tolist() in ([0, 2, 3], [1, 2, 3])
    assert new[0, 0].item() == pytest.approx(5.0, abs=1e-3)
    kept, _ = choose(weight, inverse(gram, 1e-9), 4, 2, None)
    assert kept.tolist()[0] in (0, 1) and kept.tolist()[1] in (2, 3)
    by_energy = unit_energies(weight, gram, 4)  # 4, 9, .25, .25 times E[x^2]
    assert by_energy.argsort(descending=True).tolist()[:2] == [1, 0]


def test_slopes_are_the_squared_derivatives_of_the_loss(tiny_llama):
    """Against the loss itself with a unit scaled by 1 +- h."""
    model = checkpoint.load(tiny_llama)
    ids = torch.randint(0, 257, (1, 16), generator=torch.Generator().manual_seed(0))
    found = slopes(model, ids)

    def loss():
        logits = model(ids).logits[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    block = model.model.layers[1]
    assert [len(score) for score in found[1]] == [2, block.mlp.down_proj.in_features]
    for layer, unit, size, score in (
        (block.mlp.down_proj, 5, 1, found[1][1][5]),
        (block.self_attn.o_proj, 1, 32, found[1][0][1]),
    ):
        whole = layer.weight.data.clone()
        values = []
        for step in (0.02, -0.02):
            layer.weight.data = whole.clone()
            layer.weight.data[:, unit * size : (unit + 1) * size] *= 1 + step
            values.append(loss())
        layer.weight.data = whole
        assert math.sqrt(float(score)) == pytest.approx(
            abs(values[0] - values[1]) / 0.04, rel=0.05, abs=1e-5
        )


def test_channels_go_as_torch_pruning_takes_them(tiny_llama):
    """The same channels out of the same layers: torch-pruning's graph finds ours."""
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    method = compress.get(
        "prune_structured", heads=False, importance="magnitude", refit=False, round_to=1
    )
    ours = method.compress(checkpoint.load(tiny_llama), ids)
    theirs = checkpoint.load(tiny_llama)
    theirs.config.use_cache = False
    theirs.requires_grad_(True)
    graph = pruning.DependencyGraph().build_dependency(theirs, ids, verbose=False)
    keep = shapes(ours)[0].channels
    for block in theirs.model.layers:
        mlp = block.mlp
        squares = sum(
            (mlp.down_proj.weight if down else layer.weight.T).detach().square().sum(0)
            for down, layer in ((0, mlp.gate_proj), (0, mlp.up_proj), (1, mlp.down_proj))
        )
        gone = squares.argsort()[: len(squares) - keep].tolist()
        graph.get_pruning_group(mlp.gate_proj, pruning.prune_linear_out_channels, gone).prune()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (dict(ratio=0.0), "ratio"),
        (dict(ratio=1.0), "ratio"),
        (dict(importance="size"), "importance"),
        (dict(spread="even"), "spread"),
        (dict(iterations=31), "iterations"),
        (dict(round_to=0), "round_to"),
        (dict(damping=0.0), "damping"),
    ],
)
def test_settings_that_make_no_sense(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        compress.get("prune_structured", **wrong)


def test_what_leaves_nothing_is_refused(tiny_llama):
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ratio 0\.99 leaves a block nothing.*at most"):
        compress.apply("prune_structured(ratio=0.99)", checkpoint.load(tiny_llama), ids)
    with pytest.raises(ValueError, match="needs calibration"):
        compress.apply("prune_structured", checkpoint.load(tiny_llama))
