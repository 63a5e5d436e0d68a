"""quant_math: codes by hand, the half-step bound, packing round trips, clipping pays."""

import pytest
import torch

from compress.quant_math import (
    BITS,
    check_grid,
    fit_range,
    grouped,
    pack,
    packed_bytes,
    rounded,
    to_codes,
    unpack,
)


def test_asymmetric_row_by_hand():
    groups = torch.tensor([[[-1.0, 0.0, 0.5, 2.0]]])  # 2 bits: step (2 - -1) / 3 = 1, zero = 1
    scale, zero = fit_range(groups, 2, symmetric=False, dtype=torch.float32)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    assert to_codes(groups, scale, zero, 2).tolist() == [[[0, 1, 1, 3]]]  # 0.5 rounds to even
    assert rounded(groups, scale, zero, 2).tolist() == [[[-1, 0, 0, 2]]]


def test_symmetric_row_by_hand():
    groups = torch.tensor([[[-1.5, 0.2, 0.7, 1.0]]])  # 2 bits: step 2 * 1.5 / 3 = 1, zero = 2
    scale, zero = fit_range(groups, 2, symmetric=True, dtype=torch.float32)
    assert (scale.item(), zero.item()) == (1.0, 2.0)
    assert rounded(groups, scale, zero, 2).tolist() == [[[-2, 0, 1, 1]]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(3))
def test_error_is_at_most_half_a_step(random_rows, seed, bits, symmetric):
    groups = grouped(random_rows(seed), 16)
    scale, zero = fit_range(groups, bits, symmetric, torch.float32)
    assert (scale > 0).all() and (zero >= 0).all() and (zero <= 2**bits - 1).all()
    error = (rounded(groups, scale, zero, bits) - groups).abs()
    assert (error <= 0.5001 * scale).all()
    assert (rounded(groups, scale, zero, bits)[0] == 0).all()  # the all-zero row


def test_scale_is_exact_in_the_type_it_is_stored_in(random_rows):
    scale, _ = fit_range(grouped(random_rows(1), 16), 4, False, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())


def test_one_sided_rows_use_all_codes(random_rows):
    groups = grouped(random_rows(2)[8:24], -1)
    scale, zero = fit_range(groups, 4, False, torch.float32)
    codes = to_codes(groups, scale, zero, 4)
    assert (codes.amax((1, 2)) - codes.amin((1, 2)) >= 13).all()  # up to 15; they start near 0


def test_matches_torch_fake_quantize(random_rows):
    groups = grouped(random_rows(7), -1)
    scale, zero = fit_range(groups, 8, False, torch.float32)
    reference = torch.fake_quantize_per_channel_affine(
        groups[:, 0], scale.flatten(), zero.flatten().int(), 0, 0, 255
    )
    torch.testing.assert_close(rounded(groups, scale, zero, 8)[:, 0], reference)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_never_raises_the_error_and_pays_on_heavy_tails(bits):
    groups = grouped(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) ** 3, -1)

    def error(clip):
        scale, zero = fit_range(groups, bits, False, torch.float32, clip)
        return (rounded(groups, scale, zero, bits) - groups).square().sum((1, 2))

    assert (error(True) <= error(False)).all()
    assert error(True).sum() < 0.98 * error(False).sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [8, 9, 63, 64, 576])
def test_packing_round_trip(bits, columns):
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (5, columns), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, packed_bytes(columns, bits)) and packed.element_size() == 1
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_packed_sizes_are_what_the_bits_say():
    assert [packed_bytes(576, bits) for bits in BITS] == [144, 216, 288, 576]


def test_four_bit_bytes_by_hand():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    assert pack(codes, 4).tolist() == [[0x51, 0x62, 0x73, 0x84]]


def test_a_short_last_group_is_padded_with_zeros():
    groups = grouped(torch.ones(2, 10), 4)
    assert groups.shape == (2, 3, 4)
    assert groups[0, 2].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("bits, group_size", [(5, 64), (1, 64), (4, 0), (4, 7), (4, -2)])
def test_refuses_grids_that_make_no_sense(bits, group_size):
    with pytest.raises(ValueError, match=r"bits must|group_size must"):
        check_grid(bits, group_size)
