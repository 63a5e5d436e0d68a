"""kernels: each takes only what it computes exactly; the choice is measured and remembered."""

import json
import shutil

import pytest
import torch
from comparing import random, relative

from compress import compiled, int4_layout, integer_kernels, kernel_choice, kernels
from compress.dense_linear import DenseLinear
from compress.methods.dynamic import Dynamic
from compress.methods.int8_weight import Int8Weight
from compress.methods.rtn import Rtn
from compress.quant_linear import QuantLinear


def rtn(rows=96, columns=128, **settings):
    return Rtn(**settings).quantize(random(rows, columns, seed=0), None)


def int8(columns=128, **settings):
    return Int8Weight(**settings).quantize(random(96, columns, seed=0), None)


def fitting(layer, dtype=torch.bfloat16):
    return [kernel.name for kernel in layer.candidates if kernel.fits(layer, dtype)]


REBUILD = ["rebuild", "rebuild float32"]
COMPILED = ["compiled"] if compiled.library() else []  # where there is a compiler
INT16 = ["compiled int16"] if COMPILED and compiled.loaded().has_rounded_rows() else []
OURS = [*COMPILED, *INT16]
INT4 = [*OURS, "int4pack", *REBUILD]
INT8 = [*OURS, "int8pack", *REBUILD]
GRIDS = [(4, True), (4, False), (3, False), (2, True), (8, False)]


@pytest.mark.parametrize(
    "layer, names",
    [
        (rtn(), INT4),
        (rtn(symmetric=True), INT4),
        (rtn(bits=3), ["int4pack", *REBUILD]),
        (rtn(bits=2), ["int4pack", *REBUILD]),
        (rtn(rows=90), INT4),  # filled up to sixteens with zeros
        (rtn(group_size=-1), INT4),
        (rtn(columns=160), ["int4pack", *REBUILD]),  # 64, 64 and 32: groups of 32 for the kernel
        (rtn(group_size=48), REBUILD),  # not a group of the kernel, which would crash, unchecked
        (rtn(columns=100), REBUILD),
        (rtn(rows=1, columns=2**16), INT4),
        (rtn(rows=1, columns=2**16 + 64), ["int4pack", *REBUILD]),  # more than C's stack is for
        (rtn(dtype="float32"), [*OURS, *REBUILD]),  # scales that int4pack would round
        (int8(), INT8),
        (int8(symmetric=False), INT8),
        (
            Int8Weight(True, "tensor").quantize(random(96, 128, seed=0), None),
            INT8,
        ),
        (int8(granularity="group"), [*OURS, *REBUILD]),
        (int8(columns=100), REBUILD),  # it reads 16 at a time
    ],
)
def test_what_kernels_take(layer, names):
    assert fitting(layer) == names
    first = COMPILED if "compiled" in names else []
    assert fitting(layer, torch.float32) == [*first, "rebuild float32"]


def test_codes_that_a_kernel_would_crash_on_go_elsewhere():
    layer = Int8Weight().quantize(random(96, 128, seed=0), None)
    assert "int8pack" in fitting(layer)
    shifted = torch.empty(96 * 128 + 8, dtype=torch.int8)[8:].view(96, 128)
    x, weight = random(1, 128, seed=1).bfloat16(), layer.weight(torch.float64)
    layer.codes = shifted.copy_(layer.codes)  # 8 bytes off: as in a memory-mapped file
    assert fitting(layer) == [*OURS, *REBUILD]
    assert relative(layer(x), x.double() @ weight.T) < 0.004


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("columns", [128, 160])
@pytest.mark.parametrize("bits, symmetric", GRIDS)
def test_every_kernel_means_the_same_weights(bits, symmetric, columns, rows):
    make = Int8Weight(symmetric) if bits == 8 else Rtn(bits=bits, symmetric=symmetric)
    layer = make.quantize(random(90, columns, seed=0), None)
    x = random(rows, columns, seed=1).bfloat16()
    exact = x.double() @ layer.weight(torch.float64).T
    for kernel in layer.candidates:
        if kernel.fits(layer, torch.bfloat16):
            twin = layer.twin()
            kernel.prepare(twin)
            assert relative(kernel.multiply(twin, x), exact) < 0.004, kernel.name
            # The codes may be held otherwise now; they are the same, and so is what is saved.
            for mine, other in zip(twin.codes_and_zero(), layer.codes_and_zero(), strict=True):
                assert torch.equal(mine, other)
            assert torch.equal(twin.weight(), layer.weight())
            assert torch.equal(twin.state_dict()["codes"], layer.state_dict()["codes"])
            numbers = torch.tensor([3, 89, 64, 0])
            assert torch.equal(twin.rows(numbers), layer.weight()[numbers])
            assert relative(kernels.rebuild(twin, x, torch.float32), exact) < 0.004


def test_a_compiler_gives_the_compiled_kernels(tmp_path, monkeypatch):
    find = compiled.library.__wrapped__
    monkeypatch.delenv("SLIMBENCH_CC", raising=False)
    assert (find() is not None) == (shutil.which("cc") is not None)
    monkeypatch.setenv("SLIMBENCH_CC", "none")
    assert find() is None
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("SLIMBENCH_CC", "false")  # a compiler that fails
    assert find() is None and not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(not COMPILED, reason="no C compiler on this machine")
def test_a_library_that_others_can_write_is_not_loaded(tmp_path, monkeypatch):
    find = compiled.library.__wrapped__
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    assert find() is not None
    (made,) = tmp_path.rglob("*.so")
    for path in (made, made.parent):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        assert find() is None
        path.chmod(mode)
    monkeypatch.setattr(compiled.sys, "byteorder", "big")
    assert find() is None


@pytest.mark.skipif(not COMPILED, reason="no C compiler on this machine")
@pytest.mark.parametrize("kind", ["zeros", "symmetric", "offset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, columns, size", [(7, 64, 64), (90, 192, 96), (33, 704, 32)])
def test_the_compiled_kernel_against_float64(kind, dtype, rows, columns, size):
    codes = (random(rows, columns, seed=0) * 3 + 8).clamp(0, 15).to(torch.uint8)
    scale = random(rows, columns // size, seed=1)
    zero = (scale * 3 + 8).clamp(0, 15) if kind == "zeros" else None
    offset = random(*scale.shape, seed=2) if kind == "offset" else None
    layer = QuantLinear.from_codes(
        *(codes, scale, zero, random(rows, seed=3), 4, size), dtype=dtype, offset=offset
    )
    compiled.prepare(layer)
    for count in (1, 15):
        x = random(count, columns, seed=4)
        exact = x.double() @ layer.weight(torch.float64).T
        assert relative(compiled.multiply(layer, x), exact) < 1e-6
        x = x.bfloat16()
        exact = x.double() @ layer.weight(torch.float64).T
        y = compiled.multiply(layer, x)
        assert y.dtype == torch.bfloat16 and relative(y, exact) < 0.004
    x[0, 5] = torch.nan
    y = compiled.multiply(layer, x)
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.skipif(not COMPILED, reason="no C compiler on this machine")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, columns, size", [(7, 64, 32), (90, 192, 96), (33, 704, -1)])
def test_the_compiled_kernel_for_8_bits_against_float64(symmetric, dtype, rows, columns, size):
    codes = (random(rows, columns, seed=0) * 60 + 128).clamp(0, 255).to(torch.uint8)
    scale = random(rows, 1 if size == -1 else columns // size, seed=1)
    zero = None if symmetric else (scale * 60 + 128).clamp(0, 255)
    layer = QuantLinear.from_codes(codes, scale, zero, None, 8, size, dtype=dtype)
    compiled.prepare(layer)
    x = random(15, columns, seed=4)
    exact = x.double() @ layer.weight(torch.float64).T
    assert relative(compiled.multiply(layer, x), exact) < 1e-6
    assert relative(compiled.multiply(layer, x[:1].bfloat16()), exact[:1]) < 0.006


def grid(rows, columns, bits, size, kind, dtype):
    """A layer of random codes. kind: zeros, symmetric or offset."""
    top = 2**bits - 1
    codes = (random(rows, columns, seed=0) * top / 4 + top / 2).clamp(0, top).to(torch.uint8)
    scale = random(rows, columns // size, seed=1)
    zero = (scale * top / 4 + top / 2).clamp(0, top) if kind == "zeros" else None
    offset = random(*scale.shape, seed=2) if kind == "offset" else None
    return QuantLinear.from_codes(codes, scale, zero, None, bits, size, dtype=dtype, offset=offset)


BITS_AND_KINDS = [(4, "zeros"), (4, "symmetric"), (4, "offset"), (8, "zeros"), (8, "symmetric")]
GRIDS_FOR_INT16 = [  # rows, columns, size: steps of 1, 2 and 4; groups cut by the middle; odd rows
    (7, 64, 32),
    (90, 192, 96),
    (33, 576, 64),
    (8, 768, 128),
    (5, 2304, 2304),
    (3, 4096, 256),
]


@pytest.mark.skipif(not INT16, reason="no AVX2 or no C compiler on this machine")
@pytest.mark.parametrize("bits, kind", BITS_AND_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, columns, size", GRIDS_FOR_INT16)
def test_inputs_are_rounded_to_15_bits_and_nothing_else_is(bits, kind, dtype, rows, columns, size):
    layer = grid(rows, columns, bits, size, kind, dtype)
    compiled.prepare(layer)
    weight = layer.weight(torch.float64)
    # Whole numbers up to 255 are held exactly; so is bfloat16 down to 1/64 of a block's largest.
    x = random(3, columns, seed=4).mul(80).round().clamp(-255, 255)
    exact = x.double() @ weight.T
    assert relative(compiled.multiply(layer, x, int16=True), exact) < 1e-6
    x = random(3, columns, seed=5).sign() * (random(3, columns, seed=6).abs() + 0.1)
    x = x.clamp(-6, 6).bfloat16()
    twice = compiled.multiply(layer, x.float(), int16=True)
    assert relative(twice, x.double() @ weight.T) < 1e-6
    narrow = compiled.multiply(layer, x, int16=True)
    assert torch.equal(narrow, twice.bfloat16())
    # Beyond that half a step is lost: 2^-14 of the largest of 128, whatever the others are.
    x = random(15, columns, seed=7) * 10.0 ** random(15, columns, seed=8)
    block = min(size, 128) if size % 128 == 0 or size < 128 else 32
    largest = x.abs().unflatten(1, (-1, block)).amax(-1).repeat_interleave(block, 1).double()
    bound = largest @ weight.abs().T * 2.0**-14
    away = (compiled.multiply(layer, x, int16=True) - x.double() @ weight.T).abs()
    assert (away <= bound + 1e-6 * (x.abs().double() @ weight.abs().T)).all()
    assert away.max() > 1e-3 * bound.max()  # it does round
    # Many rows go another way, and mean the same.
    few = torch.cat([compiled.multiply(layer, x[:, :], int16=True)] * 3)[:37]
    many = compiled.multiply(layer, torch.cat([x] * 3)[:37], int16=True)
    assert relative(many, few) < 1e-6
    assert torch.equal(many[15:30], many[:15])
    x = x.bfloat16()
    many = compiled.multiply(layer, torch.cat([x] * 2)[:18], int16=True)
    assert relative(many[:15], compiled.multiply(layer, x, int16=True)) < 1e-3


@pytest.mark.skipif(not INT16, reason="no AVX2 or no C compiler on this machine")
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_inputs_that_are_zero_tiny_huge_or_not_finite(bits):
    layer = grid(6, 256, bits, 64, "zeros", torch.bfloat16)
    compiled.prepare(layer)
    weight = layer.weight(torch.float64)
    x = random(6, 256, seed=3)
    x[0] = 0
    x[1] *= 1e-30  # counts as zero
    x[2] *= 2.0**100
    x[3, 7], x[4, 200] = torch.nan, -torch.inf
    x[5, 64:128] = 0
    exact = x.double() @ weight.T
    for rows in (6, 18):  # few and many
        y = compiled.multiply(layer, torch.cat([x] * 3)[:rows], int16=True)
        assert torch.equal(y[:2], torch.zeros(2, 6))
        assert y[3:5].isnan().all()
        for row in (2, 5):
            assert relative(y[row], exact[row]) < 3e-4


@pytest.mark.skipif(not COMPILED, reason="no C compiler on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(1, 32), (7, 64), (90, 416)])
def test_plain_weights_go_through_c_too(dtype, rows, columns):
    layer = DenseLinear(random(rows, columns, seed=0, dtype=dtype), random(rows, seed=1))
    assert "compiled" in fitting(layer, dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert "compiled" not in fitting(layer, other)
    x = random(15, columns, seed=2, dtype=dtype)
    exact = x.double() @ layer.codes.double().T
    limit = 1e-6 if dtype == torch.float32 else 0.003
    assert relative(compiled.multiply(layer, x), exact) < limit
    assert "compiled" not in fitting(DenseLinear(random(8, 40, seed=0), None), torch.float32)


@pytest.mark.skipif(not COMPILED, reason="no C compiler on this machine")
def test_a_layer_that_changes_its_type_or_its_codes_is_prepared_anew():
    layer, x = rtn(), random(1, 128, seed=7).bfloat16()
    for kernel in layer.candidates:
        if kernel.fits(layer, torch.bfloat16):
            kernel.prepare(layer)
    assert layer.int4 is not None and layer.pairs is not None
    codes = layer.codes_and_zero()[0]
    layer.float()
    assert layer.int4 is None and layer.pairs is None and not layer.chosen
    assert torch.equal(layer.codes_and_zero()[0], codes)
    compiled.prepare(layer)
    assert layer.pairs.dtype == torch.float32
    other = Rtn().quantize(random(96, 128, seed=9), None)
    compiled.multiply(layer, x)
    layer.load_state_dict(other.state_dict())
    compiled.prepare(layer)
    exact = x.double() @ other.weight(torch.float64).T
    assert relative(compiled.multiply(layer, x), exact) < 0.004


@pytest.mark.skipif(not COMPILED, reason="no C compiler on this machine")
def test_rows_of_a_joined_layer_go_through_the_compiled_kernel():
    parts = [rtn(rows=64), Rtn().quantize(random(32, 128, seed=6), None)]
    joined = QuantLinear(
        *(torch.cat(each) for each in zip(*(part.per_row()[:3] for part in parts), strict=True)),
        None,
        4,
        64,
        128,
    )
    compiled.prepare(joined)
    x = random(2, 128, seed=5)
    whole = compiled.multiply(joined, x)
    parts[1].look_into(joined, 64)
    assert torch.equal(compiled.multiply(parts[1], x), whole[:, 64:])


@pytest.mark.skipif(not COMPILED, reason="no C compiler on this machine")
def test_a_layer_that_another_type_laid_out_anew_is_still_the_same(monkeypatch):
    fastest = {torch.float32: "compiled", torch.bfloat16: "int4pack"}

    def remembered(layer, dtype, rows, fitting):
        return next((each for each in fitting if each.name == fastest[dtype]), fitting[-1])

    monkeypatch.setattr(kernel_choice, "_remembered", remembered)
    layer, x = rtn(), random(1, 128, seed=7)
    exact = x.double() @ layer.weight(torch.float64).T
    assert relative(layer(x), exact) < 1e-6 and layer.kernel(1, torch.float32) == "compiled"
    layer(x.bfloat16())
    assert layer.int4 is not None
    assert relative(layer(x), exact) < 1e-6 and layer.kernel(1, torch.float32) == "rebuild float32"


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 90, 112, 257])
def test_the_order_of_int4_codes_is_torchs(rows):
    codes = torch.randint(0, 16, (rows, 64), dtype=torch.uint8)
    packed = int4_layout.pack(codes)
    assert int4_layout.is_known(codes.device) and len(packed) == rows + -rows % 16
    assert torch.equal(int4_layout.unpack(packed, 0, rows), codes.T)
    numbers = torch.randint(0, rows, (40,))
    assert torch.equal(int4_layout.rows(packed, numbers), codes[numbers])
    if rows > int4_layout.BLOCK:
        rest = int4_layout.unpack(packed, int4_layout.BLOCK, rows)
        assert torch.equal(rest, codes[int4_layout.BLOCK :].T)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_kernels_compute_integers(dtype, rows):
    layer = Dynamic().quantize(random(96, 128, seed=0), None)
    span = torch.randint(-255, 1, (rows, 1), generator=torch.Generator().manual_seed(1))
    x = (torch.randint(0, 256, (rows, 128)) + span).to(dtype)  # a zero of its own for each token
    exact = x.double() @ layer.weight(torch.float64).T
    names = set()
    for kernel in layer.candidates:
        if kernel.fits(layer, dtype):
            kernel.prepare(layer)
            error = relative(kernel.multiply(layer, x), exact)
            assert error < (0.003 if kernel.name == "int8pack" else 1e-6), kernel.name
            names.add(kernel.name)
    assert {"int_mm", "float32 integers"} <= names


def test_onednn_is_left_out_where_it_saturates(monkeypatch):
    layer = Dynamic().quantize(random(96, 128, seed=0), None)
    assert ("onednn int8" in fitting(layer)) == integer_kernels.onednn_is_exact()
    monkeypatch.setattr(integer_kernels, "onednn_is_exact", lambda: False)
    assert "onednn int8" not in fitting(layer)


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    return tmp_path / "kernels.json"


def test_the_choice_is_measured_once_and_kept(own_table, monkeypatch):
    layer = rtn()
    few, many = kernel_choice.choose(layer, torch.bfloat16, layer.candidates)
    assert few.name in INT4 and many.name in [*INT16, *REBUILD]
    (name,) = tables = json.loads(own_table.read_text())
    assert torch.__version__ in name and f"{torch.get_num_threads()} threads" in name
    keys = sorted(tables[name])
    assert [key.split()[0] for key in keys] == ["few", "many"] and "128->96" in keys[0]
    assert sorted(tables[name][keys[0]]) == sorted(INT4)
    assert all(us > 0 for known in tables[name].values() for us in known.values())
    monkeypatch.setattr(kernel_choice, "measured", None)  # would fail if called
    again = kernel_choice.choose(rtn(), torch.bfloat16, layer.candidates)
    assert again == (few, many)
    assert any("128->96" in line and "int4pack" in line for line in kernel_choice.report())


def test_the_table_decides_and_a_broken_one_is_measured_anew(own_table):
    layer = rtn()
    few, many = kernel_choice.choose(layer, torch.bfloat16, layer.candidates)
    other = next(name for name in REBUILD if name != many.name)
    (name,) = tables = json.loads(own_table.read_text())
    for key, known in tables[name].items():
        wanted = few.name if key.startswith("few") else other
        tables[name][key] = {each: 1.0 if each == wanted else 100.0 for each in known}
    own_table.write_text(json.dumps(tables))
    kernel_choice._tables.cache_clear()
    chosen = kernel_choice.choose(rtn(), torch.bfloat16, layer.candidates)
    assert [kernel.name for kernel in chosen] == [few.name, other]
    for text in ("no JSON", "[]", json.dumps({name: {key: "x" for key in tables[name]}})):
        own_table.write_text(text)
        kernel_choice._tables.cache_clear()
        few, _ = kernel_choice.choose(rtn(), torch.bfloat16, layer.candidates)
        known = json.loads(own_table.read_text())[name]
        (measured,) = (value for key, value in known.items() if key.startswith("few"))
        # The fastest, where one that Python has to be asked for is CALLED slower than it is.
        cost = {
            k.name: measured[k.name] + kernel_choice.CALLED * k.called
            for k in layer.candidates
            if k.name in measured
        }
        assert min(cost, key=cost.get) == few.name


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "file" / "below"))
    layer = rtn()
    assert len(kernel_choice.choose(layer, torch.bfloat16, layer.candidates)) == 2


def test_offsets_are_added_after_the_scale():
    codes = torch.tensor([[0, 15, 3, 8] * 8], dtype=torch.uint8)
    scale, offset = torch.tensor([[0.5]]), torch.tensor([[-3.0]])
    layer = QuantLinear.from_codes(
        codes, scale, None, None, 4, 32, dtype=torch.float32, offset=offset
    )
    assert torch.equal(layer.weight(), codes * 0.5 - 3)
    x = random(2, 32, seed=3)
    torch.testing.assert_close(layer(x), x @ layer.weight().T)
    with pytest.raises(ValueError, match="zeros or offsets, not both"):
        QuantLinear.from_codes(codes, scale, scale, None, 4, 32, offset=offset)
