"""low_rank: the error is what Eckart and Young say, ranks by hand, files, refusals."""

import json

import pytest
import torch
from comparing import layer_and_gram

import compress
from compress import checkpoint
from compress.base import TorchRunner
from compress.low_rank_linear import LowRankLinear
from compress.methods.low_rank import LowRank, ranked, uniform_ranks

IDS = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(0))


def error(change, gram):
    return float(((change.double() @ gram.double()) * change.double()).sum())


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_the_error_is_that_of_the_singular_values_that_went(rank):
    weight, gram = layer_and_gram(20, 32)
    method = LowRank(damping=1e-9)
    first, second = method.factors(weight, gram, rank)
    assert first.shape == (rank, 32) and second.shape == (20, rank)
    # sqrt(eig(W H W^T)) are the singular values of W S, whatever square root S of H is.
    squares = torch.linalg.eigvalsh(weight.double() @ gram.double() @ weight.double().T)
    lost = float(squares[: 20 - rank].sum())
    found = error(second @ first - weight, gram)
    assert found == pytest.approx(lost, rel=1e-3, abs=1e-6 * float(squares.sum()))
    plain = LowRank(whiten=False).factors(weight, gram, rank)
    assert found <= error(plain[1] @ plain[0] - weight, gram) * 1.0001 + 1e-3


def test_the_plain_svd_is_the_best_without_inputs():
    weight, gram = layer_and_gram(20, 32)
    first, second = LowRank(whiten=False).factors(weight, gram, 5)
    values = torch.linalg.svdvals(weight.double())
    lost = float((second.double() @ first.double() - weight).square().sum())
    assert lost == pytest.approx(float(values[5:].square().sum()), rel=1e-4)


def test_ranks_by_hand():
    shapes = {(0, "a"): (10, 40), (0, "b"): (20, 20)}
    assert uniform_ranks(shapes, 0.5) == {(0, "a"): 4, (0, "b"): 5}  # 200/50, 200/40
    with pytest.raises(ValueError, match="leaves a of 10 x 40 no rank"):
        uniform_ranks(shapes, 0.9)
    # All of a's output is in one component, b's is in all alike: a gives, b stays whole.
    spectra = {
        (0, "a"): torch.tensor([1.0] + [1e-6] * 9),
        (0, "b"): torch.ones(20),
    }
    assert ranked(shapes, spectra, 0.3) == {(0, "a"): 1}  # 50 + 400 of 800
    with pytest.raises(ValueError, match="no rank"):
        ranked(shapes, spectra, 0.95)


@pytest.mark.parametrize("spread", ["uniform", "global"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_the_budget_is_kept_in_the_file(spread, family, request, tmp_path):
    folder = request.getfixturevalue(family)
    model = compress.apply(f"low_rank(spread={spread},ratio=0.4)", checkpoint.load(folder), IDS)
    logits = TorchRunner(model).logits(IDS)
    compress.save(model, tmp_path / "thin")
    again = compress.load(tmp_path / "thin")
    layers = [each for each in again.modules() if isinstance(each, LowRankLinear)]
    assert layers and torch.equal(TorchRunner(again).logits(IDS), logits)

    def numbers(which):
        return sum(
            each.numel()
            for name, each in which.named_parameters()
            if each.dim() == 2 and (".layers." in name or ".h." in name)
        )

    left = numbers(again) / numbers(checkpoint.load(folder))
    assert 0.5 < left <= 0.6
    names = set(TorchRunner(again).kernels(1))
    assert "low rank float32" in names


def test_damaged_specs_are_refused():
    layer = LowRankLinear(torch.zeros(2, 8), torch.zeros(4, 2), None)
    spec = json.loads(json.dumps(layer.spec()))
    assert LowRankLinear.from_spec(spec).first.shape == (2, 8)
    for key, value in (("rank", 5), ("rank", 0), ("out_features", "4"), ("dtype", "int8")):
        with pytest.raises(ValueError, match=key if value != 5 else "rank 5 is more"):
            LowRankLinear.from_spec(spec | {key: value})


@pytest.mark.parametrize(
    "wrong", [dict(ratio=0.0), dict(ratio=1.0), dict(spread="even"), dict(damping=0.0)]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        compress.get("low_rank", **wrong)
