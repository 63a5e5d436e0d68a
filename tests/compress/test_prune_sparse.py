"""prune_sparse: exact shares and patterns, SparseGPT against its equations, files checked."""

import json

import pytest
import torch
from comparing import layer_and_gram
from safetensors.torch import load_file, save_file

import compress
from compress import checkpoint
from compress.base import TorchRunner
from compress.methods.prune_sparse import BLOCK, PruneSparse
from compress.sparse_linear import SparseLinear

IDS = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(0))


def error(method, weight, gram):
    new, stays = method.solve(weight, gram)
    change = new * stays - weight
    return ((change @ gram) * change).sum().item()


def by_the_equations(method, weight, gram):
    """Column by column in float64; H^-1 shrinks by Gaussian elimination, no Cholesky factor.

    A column's cost is w^2 / [H^-1]_jj at its turn, when the columns before it are settled.
    """
    rows, columns = weight.shape
    weight = weight.double()
    damping = method.damping * gram.diagonal().double().mean()
    full = torch.linalg.inv(gram.double() + damping * torch.eye(columns, dtype=torch.float64))
    inverses = []  # H^-1 of the columns from j on, in place
    for j in range(columns):
        inverses.append(full.clone())
        full = full - torch.outer(full[:, j], full[j]) / full[j, j]
    pivots = torch.stack([inverses[j][j, j] for j in range(columns)])
    stays = torch.ones(rows, columns, dtype=torch.bool)
    kept, of = method.kept_of()
    for j in range(columns):
        if of and j % of == 0:
            run = slice(j, j + of)
            ranks = (weight[:, run] ** 2 / pivots[run]).argsort(1, descending=True)
            for row in range(rows):
                stays[row, run] = False
                stays[row, j + ranks[row, :kept]] = True
        if not of and j % BLOCK == 0:
            run = slice(j, min(j + BLOCK, columns))
            cost = weight[:, run] ** 2 / pivots[run]
            gone = round(method.ratio * cost.numel())
            stays[:, run] = cost > cost.flatten().sort().values[gone - 1]
        change = torch.where(stays[:, j], 0.0, weight[:, j]) / pivots[j]
        weight = weight - torch.outer(change, inverses[j][j])
        weight[:, j] = torch.where(stays[:, j], weight[:, j], 0.0)
    return weight, stays


@pytest.mark.parametrize(
    "settings", [{}, {"pattern": "2:4"}, {"pattern": "4:8"}, {"ratio": 0.25}, {"ratio": 0.75}]
)
def test_sparsegpt_is_its_equations(settings):
    method = PruneSparse(**settings)
    weight, gram = layer_and_gram()
    found, stays = method.solve(weight, gram)
    expected, where = by_the_equations(method, weight, gram)
    assert torch.equal(stays, where)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["", "2:4", "4:8"])
def test_each_is_better_than_the_simpler(pattern):
    weight, gram = layer_and_gram(rows=32, columns=256)
    sparsegpt, wanda, magnitude = (
        error(PruneSparse(pattern=pattern, importance=each), weight, gram)
        for each in ("sparsegpt", "wanda", "magnitude")
    )
    assert sparsegpt < 0.9 * wanda and wanda < 0.9 * magnitude


def test_wanda_and_magnitude_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5], [4.0, 0.1, -0.2, 5.0]])
    gram = torch.diag(torch.tensor([16.0, 1.0, 1.0, 4.0]))  # inputs of size 4 1 1 2
    _, stays = PruneSparse(importance="wanda").solve(weight, gram)  # 4 2 3 1 / 16 .1 .2 10
    assert stays.tolist() == [[True, False, True, False], [True, False, False, True]]
    _, stays = PruneSparse(importance="magnitude").solve(weight, gram)  # 5 4 3 2 stay
    assert stays.tolist() == [[False, True, True, False], [True, False, False, True]]
    _, stays = PruneSparse(importance="magnitude", pattern="1:2").solve(weight, gram)
    assert stays.tolist() == [[False, True, True, False], [True, False, False, True]]


@pytest.mark.parametrize("importance", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_the_file_holds_what_was_promised(family, importance, pattern, request, tmp_path):
    method = f"prune_sparse(importance={importance},pattern='{pattern}',dtype=float32)"
    model = compress.apply(method, checkpoint.load(request.getfixturevalue(family)), IDS)
    logits = TorchRunner(model).logits(IDS)
    compress.save(model, tmp_path / "sparse")
    again = compress.load(tmp_path / "sparse")
    layers = [each for each in again.modules() if isinstance(each, SparseLinear)]
    assert len(layers) in (8, 21)
    for layer in layers:
        stays, weight = layer.stays(), layer.weight()
        count = layer.in_features * layer.out_features
        assert len(layer.values) == int(stays.sum()) == count // 2
        assert not weight[~stays].any()
        if pattern:
            assert (stays.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert torch.equal(TorchRunner(again).logits(IDS), logits)
    plain = again(IDS, use_cache=False).logits  # transformers' forward pass
    assert (plain - logits).norm() < 1e-4 * logits.norm()


def test_sizes_that_eight_does_not_divide():
    weight = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    stays = torch.rand(5, 13, generator=torch.Generator().manual_seed(1)) > 0.4
    bias = torch.arange(5.0)
    layer = SparseLinear.from_weight(weight, stays, bias, torch.float32)
    assert layer.mask.shape == (5, 2) and torch.equal(layer.weight(), weight * stays)
    x = torch.randn(3, 13)
    torch.testing.assert_close(layer(x), x @ (weight * stays).T + bias)
    again = SparseLinear.from_spec(json.loads(json.dumps(layer.spec())))
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.weight(), layer.weight())


def test_damaged_files_are_refused(tiny_llama, tmp_path):
    model = compress.apply("prune_sparse", checkpoint.load(tiny_llama), IDS)
    compress.save(model, tmp_path / "m")
    file, about = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "compression.json"
    tensors, specs = load_file(file), json.loads(about.read_text())
    name = "model.layers.0.mlp.up_proj"
    wrong = dict(tensors)
    wrong[f"{name}.mask"] = torch.zeros_like(wrong[f"{name}.mask"])
    save_file(wrong, file)
    with pytest.raises(ValueError, match=r"a mask of 0 weights, and \d+ of them"):
        TorchRunner(compress.load(tmp_path / "m"))
    for key, value, reason in (
        ("count", 10**9, "is more than"),
        ("count", 7, "wrong shape"),
        ("in_features", -1, "in_features"),
        ("dtype", "int8", "dtype"),
    ):
        spec = json.loads(json.dumps(specs))
        spec["layers"][name][key] = value
        about.write_text(json.dumps(spec))
        with pytest.raises(ValueError, match=reason):
            compress.load(tmp_path / "m")


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (dict(ratio=0.0), "ratio"),
        (dict(ratio=1.0), "ratio"),
        (dict(pattern="4:2"), "pattern"),
        (dict(pattern="half"), "pattern"),
        (dict(pattern="3:7"), "pattern"),
        (dict(pattern="2:4", ratio=0.6), r"2:4 is a ratio of 0\.5"),
        (dict(importance="size"), "importance"),
        (dict(damping=0.0), "damping"),
    ],
)
def test_settings_that_make_no_sense(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        compress.get("prune_sparse", **wrong)
