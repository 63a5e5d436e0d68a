"""int8_weight: two rows by hand, the error bound, agreement with torch, refusals."""

import pytest
import torch

from compress.methods.int8_weight import Int8Weight, int8_codes, int8_scale


def quantize(weight, symmetric):
    scale, zero = int8_scale(weight, symmetric, torch.float32)
    return int8_codes(weight, scale, zero), scale, zero


def test_symmetric_row_by_hand():
    codes, scale, zero = quantize(torch.tensor([[-1.00, 0.0, 0.50, 1.27]]), symmetric=True)
    assert codes.tolist() == [[-100, 0, 50, 127]]
    assert scale.item() == pytest.approx(0.01)  # 1.27 / 127
    assert zero.item() == 0


def test_asymmetric_one_sided_rows_by_hand():
    codes, scale, zero = quantize(torch.tensor([[0.0, 1.0, 2.55], [-2.55, -1.0, -0.5]]), False)
    assert codes.tolist() == [[-128, -28, 127], [-128, 27, 77]]
    assert scale.flatten().tolist() == pytest.approx([0.01, 0.01])  # 2.55 / 255
    assert zero.flatten().tolist() == [-128, 127]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_error_is_at_most_half_a_step(random_rows, seed, symmetric):
    weight = random_rows(seed)
    codes, scale, zero = quantize(weight, symmetric)
    assert (scale > 0).all() and codes.abs().max() <= 128
    assert ((weight - scale * (codes - zero)).abs() <= 0.5001 * scale).all()
    assert (scale * (codes - zero))[0].eq(0).all()  # the all-zero row


@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_torch_fake_quantize(random_rows, symmetric):
    weight = random_rows(seed=7)
    codes, scale, zero = quantize(weight, symmetric)
    reference = torch.fake_quantize_per_channel_affine(
        weight, scale.flatten(), zero.flatten().int(), 0, -128, 127
    )
    torch.testing.assert_close(scale * (codes - zero), reference)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity, scales", [("tensor", 1), ("row", 32), ("group", 128)])
def test_granularity_sets_the_number_of_scales(random_rows, granularity, scales, symmetric):
    weight = random_rows(seed=3)
    method = Int8Weight(symmetric, granularity, group_size=16, dtype="float32")
    layer = method.quantize(weight, None)
    assert layer.scale.numel() == scales
    shared = {"tensor": (1, -1), "row": (32, -1), "group": (128, 16)}[granularity]
    codes, scale, zero = quantize(weight.reshape(shared), symmetric)
    torch.testing.assert_close(layer.weight(), (scale * (codes - zero)).reshape(32, 64))


def test_asymmetric_halves_the_step_on_one_sided_rows(random_rows):
    weight = random_rows(seed=3)[8:16]
    ratio = quantize(weight, False)[1] / quantize(weight, True)[1]
    torch.testing.assert_close(ratio, torch.full((8, 1), 127 / 255))


def test_norms_biases_and_embeddings_stay(gpt2):
    before = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    after = Int8Weight(dtype="float32").compress(gpt2).state_dict()
    kept = [name for name in before if ".h." not in name or "ln_" in name or name.endswith(".bias")]
    assert len(kept) >= 12
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not any(name.endswith("c_attn.weight") for name in after)


def test_skipped_layers_keep_their_weights(llama):
    before = llama.model.layers[0].mlp.down_proj.weight.clone()
    compressed = Int8Weight(skip=("lm_head", "down_proj"), dtype="float32").compress(llama)
    assert torch.equal(compressed.model.layers[0].mlp.down_proj.weight, before)
    assert compressed.model.layers[0].mlp.up_proj.kind == "quant"


def test_refuses_weights_that_are_not_finite(llama):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: .*NaN"):
        Int8Weight().compress(llama)


def test_refuses_biases_that_are_not_finite(gpt2):
    gpt2.transformer.h[0].mlp.c_fc.bias.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"^transformer\.h\.0\.mlp\.c_fc: the bias holds NaN"):
        Int8Weight().compress(gpt2)


def test_refuses_to_have_no_effect():
    with pytest.raises(ValueError, match="no Linear layer"):
        Int8Weight().compress(torch.nn.Sequential(torch.nn.ReLU()))


def test_refuses_an_unknown_granularity():
    with pytest.raises(ValueError, match="granularity must be one of tensor, row, group"):
        Int8Weight(granularity="column")
