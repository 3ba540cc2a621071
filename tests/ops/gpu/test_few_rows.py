"""Products of few rows in 16 bits in CUDA C++: the kernels' own source, run thread by thread on CPU."""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsquant.ops import backends
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import _beyond_cuda, image, packed_matrix
from tests.ops.gpu.on_host import by_threads_in_turn, compile_on_host

SOURCES = Path(__file__).parent / "few_rows"
DTYPES = (torch.bfloat16, torch.float16)
# Rows, in, out: one, around the 8 columns that tensor cores take and the 16 outs of a block; less than a warp's words, and more
# than those that a block reads at once.
SHAPES = [(1, 128, 1), (1, 4224, 35), (2, 256, 16), (7, 384, 17), (8, 768, 33), (9, 128, 31), (16, 640, 15)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return by_threads_in_turn(SOURCES / "operator.cpp", tmp_path_factory.mktemp("host"))


def matrix(cols, outs, n_bits, shift):
    generator, half = torch.Generator().manual_seed(cols), 2 ** (n_bits - 1)
    codes = torch.randint(-half, half, (outs, cols), generator=generator).to(torch.int8)
    return packed_matrix(pack(codes, n_bits), 0.1 + torch.rand(outs, generator=generator), n_bits, cols, shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_bits", [1, 2, 4])
def test_products_are_those_of_float64_rounded_once(kernels, n_bits, shape, dtype):
    rows, cols, outs = shape
    generator = torch.Generator().manual_seed(rows)
    for shift in (0.0, 0.5):
        weight, bias = matrix(cols, outs, n_bits, shift), torch.randn(outs, generator=generator).to(dtype)
        x = torch.randn(rows, cols, generator=generator).to(dtype)
        y = kernels(x, weight, bias)
        oracle = F.linear(x.double(), image(weight).double(), bias.double())
        assert y.dtype is dtype
        rounding = oracle.abs() * torch.finfo(dtype).eps / 2 * 1.01
        assert ((y.double() - oracle).abs() <= rounding + 1e-6 * oracle.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_bits", "shift"), [(1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5), (4, 0.0), (4, 0.5)])
def test_every_code_has_its_level_in_every_place(kernels, n_bits, shift, dtype):
    cols, half = 256, 2 ** (n_bits - 1)
    codes = (torch.arange(2**n_bits)[:, None] + torch.arange(cols)) % (2 * half) - half
    weight = packed_matrix(pack(codes.to(torch.int8), n_bits), torch.ones(1), n_bits, cols, shift)
    ones = torch.eye(cols, dtype=dtype)
    found = torch.cat([kernels(rows, weight) for rows in ones.split(16)])
    assert torch.equal(found, (codes.T + shift).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_rounded_as_torch_rounds_it(kernels, dtype):
    """Ties to even, subnormal numbers, what is too large, and NaN: of scales times one."""
    bits = torch.cat([torch.arange(0, 2**31 - 1, 2**31 // 4001), torch.arange(0x38800000, 0x38800000 + 2**17, 0x800)])
    scale = torch.cat(
        [bits.to(torch.int32).view(torch.float32), torch.tensor([65519.0, 65520.0, 2.0**-24, 2.0**-25, 3e38])]
    )
    codes = torch.zeros(len(scale), 128, dtype=torch.int8)
    codes[:, 0] = 1
    weight = packed_matrix(pack(codes, 2), scale, 2, 128)
    x = torch.zeros(2, 128, dtype=dtype)
    x[0, 0], x[1, 0] = 1, -1
    found, expected = kernels(x, weight), (x[:, :1].float() * scale).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_inputs_of_any_rank_and_layout_are_taken(kernels):
    weight = matrix(128, 9, 2, 0.5)
    x = torch.randn(2, 128, 3).bfloat16().transpose(1, 2)
    expected = F.linear(x.double(), image(weight).double())
    torch.testing.assert_close(kernels(x, weight).double(), expected, rtol=2**-8, atol=1e-5)
    odd = torch.randn(129).bfloat16()[1:]  # lies at no multiple of 16 bytes
    assert torch.equal(kernels(odd, weight), kernels(odd.clone(), weight))
    assert kernels(x[:0], weight).shape == (0, 3, 9)


def test_the_operator_passes_opcheck_and_refuses_what_it_has_no_code_for(kernels):
    operator = backends.operator("packed_linear", backends.CUDA, "cuda")

    def arguments(n_bits=2, cols=128, rows=3, dtype=torch.bfloat16):
        weight = matrix(cols, 9, n_bits, 0.0)
        return torch.randn(rows, cols).to(dtype), weight.words, weight.scale, None, n_bits, 0.0, 0

    torch.library.opcheck(operator, arguments())
    with pytest.raises(RuntimeError, match="codes must have 1, 2 or 4 bits"):
        operator(*arguments(n_bits=3))
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16"):
        operator(*arguments(dtype=torch.float32))
    with pytest.raises(RuntimeError, match="rows of 96 codes do not fill 16 bytes"):
        operator(*arguments(cols=96))
    with pytest.raises(RuntimeError, match="x must have at most 16 rows"):
        operator(*arguments(rows=17))


def test_what_cuda_has_no_code_for_is_named():
    weight, x = matrix(128, 9, 2, 0.0), torch.zeros(16, 128, dtype=torch.float16)
    assert _beyond_cuda(x, weight, None) == ""
    assert _beyond_cuda(x.new_zeros(17, 128), weight, None) == "inputs of more than 16 rows"
    assert "2 bits and 96 columns: rows must fill 16 bytes" in _beyond_cuda(x[:, :96], matrix(96, 9, 2, 0.0), None)
    assert "weights of 3 bits" in _beyond_cuda(x, matrix(128, 9, 3, 0.0), None)
    assert "they must be integers" in _beyond_cuda(x.float(), weight, None)


def test_no_thread_leaves_its_tensors_or_does_what_c_does_not_define(tmp_path):
    program = tmp_path / "watched"
    compile_on_host(SOURCES / "watched.cpp", program, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]
