"""Products of 1- and 2-bit codes in CUDA C++: the kernels' own source, run thread by thread on CPU, and compiled for GPUs."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsquant.errors import BuildError, ConfigError
from dsquant.ops import backends, build
from dsquant.ops.fake_quantize import QuantArgs
from dsquant.ops.pack import pack, packed_words
from dsquant.ops.packed_linear import PackedMatrix, integer_definition, packed_linear, packed_matrix
from dsquant.spec import Levels
from tests.ops.gpu.on_host import by_threads_in_turn, compile_on_host

# Rows, in, out: one; primes; around a tile's 4 and 32 rows and 64 columns, and the 1024 codes that shared memory holds of a row.
SHAPES = [
    (1, 1, 1), (1, 1031, 67), (2, 31, 64), (3, 32, 65), (4, 33, 63), (5, 1024, 5), (16, 1025, 61), (17, 65, 130),
    (32, 64, 64), (33, 97, 129), (197, 211, 101),
]  # fmt: skip
INPUTS = {1: [Levels(0, 1), Levels(-1, 0, 0.5), Levels(-1, 0), Levels(1, 1)],
          2: [Levels(0, 3), Levels(-2, 1), Levels(-2, 1, 0.5), Levels(-1, 1), Levels(-128, -125)]}  # fmt: skip
SOURCES = Path(__file__).parent / "bit_serial"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return by_threads_in_turn(SOURCES / "operator.cpp", tmp_path_factory.mktemp("host"))


def matrix(cols, outs, n_bits, shift, seed=0):
    generator, half = torch.Generator().manual_seed(seed), 2 ** (n_bits - 1)
    codes = torch.randint(-half, half, (outs, cols), generator=generator).to(torch.int8)
    return packed_matrix(pack(codes, n_bits), 0.1 + torch.rand(outs, generator=generator), n_bits, cols, shift)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("w_bits", [1, 2])
@pytest.mark.parametrize("a_bits", [1, 2])
def test_bit_serial_products_are_the_definition_s_to_the_bit(kernels, a_bits, w_bits, shape):
    rows, cols, outs = shape
    generator = torch.Generator().manual_seed(rows)
    for levels in INPUTS[a_bits]:
        for shift, offset, bias in (
            (0.0, None, None),
            (0.5, torch.tensor([-0.21]), torch.randn(outs, generator=generator)),
        ):
            weight, quant = matrix(cols, outs, w_bits, shift), QuantArgs(torch.tensor([0.37]), offset, levels)
            centre = (levels.qmin + levels.qmax) / 2 * 0.37
            x = torch.randn(rows, cols, generator=generator) + centre
            expected = integer_definition(x, weight, bias, quant)
            assert torch.equal(kernels(x, weight, bias, quant), expected), (levels, shift)


def test_a_layer_of_a_vit_is_the_definition_s_to_the_bit(kernels):
    for rows in (1, 197):
        for a_bits, w_bits, levels in ((1, 1, Levels(-1, 0, 0.5)), (2, 1, Levels(0, 3)), (2, 2, Levels(-2, 1))):
            x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(a_bits))
            weight, quant = matrix(768, 768, w_bits, 0.5), QuantArgs(torch.tensor([0.5]), None, levels)
            assert torch.equal(kernels(x, weight, None, quant), integer_definition(x, weight, None, quant))


def test_ties_infinities_and_nans_are_the_definition_s(kernels):
    weight, quant = matrix(70, 9, 2, 0.0), QuantArgs(torch.ones(1), None, Levels(-2, 1))
    x = torch.arange(-140, 140).view(4, 70) * 0.25  # halves among them
    x[1, 3], x[1, 69], x[2, 5] = torch.inf, -torch.inf, torch.nan
    found, expected = kernels(x, weight, None, quant), integer_definition(x, weight, None, quant)
    assert found[2].isnan().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_sums_beyond_24_bits_are_exact_until_they_are_rounded_once(kernels):
    cols = 4_000_003
    codes = torch.ones(1, cols, dtype=torch.int8)
    codes[0, ::7] = -2
    weight = packed_matrix(pack(codes, 2), torch.ones(1), 2, cols, 0.5)
    x, quant = torch.full((1, cols), 9.0), QuantArgs(torch.ones(1), None, Levels(-2, 1, 0.5))
    whole = 3 * (2 * codes.long() + 1).sum()
    assert whole > 2**24
    assert torch.equal(kernels(x, weight, None, quant), (whole.float() / 4).view(1, 1))


def test_inputs_of_any_rank_layout_and_dtype_are_rounded_once(kernels):
    weight, quant = matrix(70, 9, 2, 0.5), QuantArgs(torch.tensor([0.5]), torch.tensor([0.1]), Levels(-2, 1))
    bias, x = torch.randn(9).bfloat16(), torch.randn(4, 70, 3).bfloat16().transpose(1, 2)
    expected = integer_definition(x.float(), weight, bias.float(), quant).bfloat16()
    assert torch.equal(kernels(x, weight, bias, quant), expected)
    assert torch.equal(kernels(x[0, 0], weight, bias, quant), expected[0, 0])
    assert kernels(x[:0], weight, bias, quant).shape == (0, 3, 9)


def test_the_operator_passes_opcheck_and_refuses_what_it_has_no_code_for(kernels):
    weight, one = matrix(70, 9, 2, 0.0), torch.ones(1)
    operator = backends.operator("packed_linear_int", backends.CUDA, "cuda")

    def arguments(n_bits=2, qmin=-2, scale=weight.scale):
        tensors = torch.randn(3, 70), weight.words, scale, weight.code_sums, None, one, one
        return *tensors, n_bits, 0.0, qmin, 1, 0.0, 0

    torch.library.opcheck(operator, arguments())
    with pytest.raises(RuntimeError, match="codes must have 1 or 2 bits"):
        operator(*arguments(n_bits=3))
    with pytest.raises(RuntimeError, match="codes must have 1 or 2 bits"):
        operator(*arguments(qmin=-3))
    with pytest.raises(RuntimeError, match="words do not hold rows of 70 codes"):
        operator(*arguments(n_bits=1))
    with pytest.raises(RuntimeError, match="scale must be of 9 values"):
        operator(*arguments(scale=torch.ones(8)))


def test_no_thread_leaves_its_tensors_or_does_what_c_does_not_define(tmp_path):
    program = tmp_path / "watched"
    compile_on_host(SOURCES / "watched.cpp", program, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]


def test_the_library_compiles_for_sm_80_and_newer_and_torch_loads_it():
    """Needs nvcc, which the extra `cuda` brings, but no GPU."""
    if torch.version.cuda is None:
        pytest.skip("this build of torch has no CUDA runtime")
    build.load_cuda()
    for name in ("packed_linear_cuda", "packed_linear_int_cuda"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsquant::{name}", "CUDA")


def low(n_bits=2, codes=4, scales=1):
    """Return x, a weight and a quantizer of these kinds; within `as_on_gpu`, without values."""
    words, sums = (torch.empty(size, dtype=torch.int32, device="cuda") for size in ((8, packed_words(40, n_bits)), 8))
    weight = PackedMatrix(words, torch.empty(8, device="cuda"), sums, n_bits, 40)
    return (
        torch.empty(3, 40, device="cuda"),
        weight,
        QuantArgs(torch.empty(scales, device="cuda"), None, Levels(0, codes - 1)),
    )


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Have tensors of a GPU that is not there, and backends.choose forget what it chose."""
    caches = (backends.availability, backends._choose, build.load_cuda)
    monkeypatch.delenv("DSQ_BACKEND", raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for cached in caches:
            cached.cache_clear()
        yield monkeypatch
        for cached in caches:
            cached.cache_clear()


def chosen(x, weight, quant):
    """Return which backend `packed_linear` takes."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsquant.ops.packed_linear.run", lambda backend, *_: taken.append(backend))
        packed_linear(x, weight, None, quant)
    return taken[0]


def test_under_auto_a_gpu_takes_triton_until_cuda_was_timed_faster(as_on_gpu):
    as_on_gpu.setattr(torch.cuda, "is_available", lambda: True)
    as_on_gpu.setattr(build, "load_cuda", lambda: None)
    assert chosen(*low()) == backends.TRITON
    as_on_gpu.setattr(backends, "FASTER_IN_CUDA", ("packed_linear_int",))
    backends._choose.cache_clear()
    assert chosen(*low()) == backends.CUDA
    assert chosen(*low(n_bits=4)) == chosen(*low(codes=256)) == chosen(*low(scales=3)) == backends.TRITON
    x, weight = torch.empty(3, 128, dtype=torch.half, device="cuda"), low()[1]._replace(cols=128)
    assert chosen(x, weight, None) == backends.TRITON
    as_on_gpu.setattr(backends, "FASTER_IN_CUDA", ("packed_linear",))
    backends._choose.cache_clear()
    assert chosen(x, weight, None) == backends.CUDA
    assert chosen(*low()) == chosen(x.float(), weight, None) == chosen(x.repeat(6, 1), weight, None) == backends.TRITON


def test_cuda_that_is_forced_runs_or_says_what_it_lacks(as_on_gpu):
    as_on_gpu.setenv("DSQ_BACKEND", "cuda")
    as_on_gpu.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="cuda cannot run packed_linear: there is no GPU that PyTorch can use"):
        chosen(*low())
    as_on_gpu.setattr(torch.cuda, "is_available", lambda: True)
    as_on_gpu.setattr(build, "load_cuda", lambda: None)
    for cached in (backends.availability, backends._choose):
        cached.cache_clear()
    assert chosen(*low()) == chosen(*low(1, 2)) == chosen(*low(2, 2)) == backends.CUDA
    with pytest.raises(ConfigError, match=r"no such code for weights of 4 bits and inputs of 4 codes: .*; use auto or"):
        chosen(*low(n_bits=4))
    with pytest.raises(ConfigError, match="no such code for weights of 2 bits and inputs of 256 codes"):
        chosen(*low(codes=256))
    with pytest.raises(ConfigError, match="no such code for weights of 2 bits and inputs without one scale for all"):
        chosen(low()[0], low()[1], None)
    with pytest.raises(ConfigError, match="DSQ_BACKEND=cuda: fake_quantize has no such code"):
        backends.choose("fake_quantize", "cuda")
    with pytest.raises(ConfigError, match="DSQ_BACKEND=cuda forces GPU code, and packed_linear got tensors on cpu"):
        backends.choose("packed_linear", "cpu", (backends.CUDA,))


def test_on_a_gpu_the_operator_is_traced_without_one(as_on_gpu):
    as_on_gpu.setattr("dsquant.ops.backends.choose", lambda *_: backends.CUDA)
    x, weight, quant = low()
    y = packed_linear(x.bfloat16(), weight, torch.zeros(8, dtype=torch.bfloat16), quant)
    assert (y.shape, y.dtype, y.device.type) == ((3, 8), torch.bfloat16, "cuda")


def test_a_missing_nvcc_is_named_with_the_fix(as_on_gpu, tmp_path):
    as_on_gpu.setattr(torch.cuda, "is_available", lambda: True)
    as_on_gpu.setenv("DSQ_BACKEND", "cuda")
    as_on_gpu.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"cannot run packed_linear: CUDA_HOME is '.*', which has no bin/nvcc; name a"
    ):
        chosen(*low())
    as_on_gpu.delenv("CUDA_HOME")
    as_on_gpu.setenv("PATH", str(tmp_path))
    as_on_gpu.setattr(build, "find_spec", lambda _: None)
    with pytest.raises(BuildError, match=r"there is no nvcc beside torch or on PATH; install dsquant\[cuda\]"):
        build.nvcc()
