"""Triton kernels of products with packed weights, interpreted: what `tests/ops/test_packed_linear.py` does not say of them."""

import pytest
import torch
import torch.nn.functional as F

from dsquant.ops import backends, gpu
from dsquant.ops.fake_quantize import QuantArgs
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import image, packed_matrix, run
from dsquant.spec import Levels

ROWS = (1, 16, 67)  # a row, a thin tile, a tile and more
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN, OUT = 263, 67  # primes, behind the blocks of a tile


def matrix(n_bits, shift, cols=IN):
    generator, half = torch.Generator().manual_seed(n_bits), 2 ** (n_bits - 1)
    codes = torch.randint(-half, half, (OUT, cols), generator=generator).to(torch.int8)
    return packed_matrix(pack(codes, n_bits), 0.1 + torch.rand(OUT, generator=generator), n_bits, cols, shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_bits", "shift"), [(2, 0.0), (3, 0.5), (8, 0.5)])
def test_products_of_any_dtype_are_those_of_float64_rounded_once(n_bits, shift, dtype):
    weight, generator = matrix(n_bits, shift), torch.Generator().manual_seed(1)
    bias = torch.randn(OUT, generator=generator).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, IN, generator=generator).to(dtype)
        y = run(backends.TRITON, x, weight, bias, None)
        oracle = F.linear(x.double(), image(weight).double(), bias.double())
        assert y.dtype is dtype
        rounding = oracle.abs() * torch.finfo(dtype).eps / 2 * 1.01
        assert ((y.double() - oracle).abs() <= rounding + 1e-6 * oracle.abs().max()).all()


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("n_bits", range(1, 9))
def test_one_row_of_floats_takes_every_code_where_it_lies(n_bits, shift):
    """Powers of two, and what they are times levels of few bits, have exact sums; a word's place or a shift too few shows."""
    weight = matrix(n_bits, shift)._replace(scale=torch.ones(OUT))
    for first in (0, 97, IN - 13):
        x = torch.zeros(1, IN)
        x[0, first : first + 13] = 2.0 ** torch.arange(13)
        assert torch.equal(run(backends.TRITON, x, weight, None, None), F.linear(x, image(weight)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter says so of infinities
@pytest.mark.parametrize("rows", [1, 5, 67])
def test_float32_of_any_size_keeps_its_24_bits_and_infinities_and_nans(rows):
    weight, generator = matrix(2, 0.5), torch.Generator().manual_seed(3)
    x = torch.randn(rows, IN, generator=generator) * 10.0 ** torch.randint(-30, 30, (rows, 1), generator=generator)
    found, oracle = run(backends.TRITON, x, weight, None, None), F.linear(x.double(), image(weight).double())
    assert ((found - oracle).abs() <= 1e-6 * oracle.abs().amax(1, keepdim=True)).all()
    x[0, 3], x[-1, 5] = torch.inf, torch.nan
    found, expected = run(backends.TRITON, x, weight, None, None), F.linear(x, image(weight))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [Levels(-128, 127), Levels(0, 255, 0.5), Levels(-1, 0, 0.5)], ids=str)
def test_integer_products_of_any_dtype_and_number_of_rows_are_the_definition_s(levels, dtype):
    weight, generator = matrix(3, 0.5), torch.Generator().manual_seed(2)
    quant = QuantArgs(torch.tensor([0.03]), torch.tensor([0.4]), levels)
    bias = torch.randn(OUT, generator=generator)
    for rows in ROWS:
        x = torch.randn(rows, IN, generator=generator).to(dtype)
        assert torch.equal(run(backends.TRITON, x, weight, bias, quant), run(backends.TORCH, x, weight, bias, quant))


@pytest.mark.parametrize("cols", [IN, 272])  # odd; of rows that begin at multiples of 16 bytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_bits", "shift"), [(1, 0.5), (2, 0.0), (3, 0.5), (8, 0.0)])
def test_a_weight_unpacked_for_very_many_rows_gives_the_definition_s_products(n_bits, shift, dtype, cols, monkeypatch):
    small = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SHARED_M": 2}
    monkeypatch.setattr(gpu.packed_linear, "MANY_ROWS", 16)
    monkeypatch.setattr(gpu.int8_product, "TILE", small)
    monkeypatch.setattr(gpu.int8_product, "ODD", (small, {}))
    monkeypatch.setattr(gpu.int8_product, "LOADED", (small, {}))
    weight, quant = matrix(n_bits, shift, cols), QuantArgs(torch.tensor([0.03]), torch.tensor([0.4]), Levels(0, 255))
    rows = 67  # five tiles: two bands and half of one
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[5, 7] = float("inf")
    with gpu.recorded() as launches:
        run(backends.TRITON, x, weight, None, quant)
    copied = cols != IN and launches[1].arguments["y"].element_size() == 2
    assert [launch.kernel.__name__ for launch in launches] == [
        "_both_codes",
        "_product_by_copies" if copied else "_product",
    ]
    assert torch.equal(run(backends.TRITON, x, weight, None, quant), run(backends.TORCH, x, weight, None, quant))


@pytest.mark.parametrize("large", [False, True], ids=["small sums", "large sums"])
def test_a_nan_in_very_many_rows_is_its_row_s_alone(large, monkeypatch):
    monkeypatch.setattr(gpu.packed_linear, "MANY_ROWS", 4)
    weight, quant = (
        matrix(8, 0.0, 272),
        QuantArgs(torch.tensor([0.01]), None, Levels(-128, 127) if large else Levels(-2, 1)),
    )
    x = torch.randn(5, 272, generator=torch.Generator().manual_seed(3)).half()
    wanted = run(backends.TORCH, x, weight, None, quant)
    x[3, 200] = float("nan")
    found = run(backends.TRITON, x, weight, None, quant)
    assert found[3].isnan().all()
    assert torch.equal(found[[0, 1, 2, 4]], wanted[[0, 1, 2, 4]])


def test_a_row_is_quantized_on_the_way_and_several_by_one_kernel_more():
    weight, quant = matrix(2, 0.0), QuantArgs(torch.ones(1), None, Levels(-8, 7))
    for rows, args, expected in ((1, None, 1), (1, quant, 1), (5, None, 1), (5, quant, 2)):
        with gpu.recorded() as launches:
            run(backends.TRITON, torch.zeros(rows, IN), weight, None, args)
        assert len(launches) == expected


def test_on_gpus_the_dispatcher_finds_the_kernels():
    for name in ("packed_linear", "packed_linear_int"):
        assert name in gpu.OPERATORS
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsquant::{name}", "CUDA")
