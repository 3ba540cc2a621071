"""The product of training by int8 codes, in Triton's interpreter: what `tests/ops/test_quant_linear.py` does not say of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsquant.ops import backends, gpu
from dsquant.ops.fake_quantize import QuantArgs
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import integer_definition, packed_matrix
from dsquant.ops.quant_linear import WeightGrid, integer_backend, quant_linear
from dsquant.spec import Levels
from tests.ops.conftest import require
from tests.ops.test_quant_linear import WEIGHTS, image


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    require(backends.TRITON)
    monkeypatch.setenv("DSQ_BACKEND", "quant_linear=triton")


@pytest.mark.parametrize(("n_bits", "method"), WEIGHTS)
def test_bfloat16_images_stand_for_their_levels_and_products_round_once(n_bits, method):
    """An image in bfloat16 is a level times the scale, rounded: the product is that of the level itself."""
    codes, scale, levels, w_hat = image(n_bits, method, 9)
    x, bias = torch.randn(11, 37).bfloat16(), torch.randn(9).bfloat16()
    quant = QuantArgs(torch.tensor([0.02]), None, Levels(-128, 127))
    found = quant_linear(x, w_hat.bfloat16(), bias, *quant, grid=WeightGrid(scale, levels))
    matrix = packed_matrix(pack(codes, n_bits), scale, n_bits, 37, levels.shift)
    assert torch.equal(found, integer_definition(x.float(), matrix, bias.float(), quant).bfloat16())


def test_a_product_is_two_launches():
    _, scale, levels, w_hat = image(2, "lsq", 3)
    with gpu.recorded() as launches:
        quant_linear(torch.zeros(5, 37), w_hat, None, torch.ones(1), None, Levels(0, 3), 1.0, WeightGrid(scale, levels))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["_both_codes", "_product"]


@pytest.mark.parametrize(("asked", "outs", "taken"), [("auto", 768, backends.TORCH), ("auto", 3072, backends.TRITON),
                                                      ("triton", 768, backends.TRITON)])  # fmt: skip
def test_auto_leaves_products_with_small_weights_on_gpus_to_floats(asked, outs, taken, monkeypatch):
    monkeypatch.setenv("DSQ_BACKEND", asked)
    with FakeTensorMode():
        x, weight = (torch.empty(rows, 768, dtype=torch.bfloat16, device="cuda") for rows in (197, outs))
        scale = torch.empty(1, device="cuda")
    assert integer_backend(x, weight.dtype, weight.shape, scale, Levels(-2, 1), Levels(-2, 1)) == taken
