"""Products with packed weights against int64 and float64 oracles written here, for every backend this machine has."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsquant.errors import ConfigError
from dsquant.ops import backends, build
from dsquant.ops.fake_quantize import QuantArgs
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import PackedMatrix, image, is_integer, packed_linear, packed_matrix, run
from dsquant.spec import Levels

BACKENDS = (backends.TORCH, *backends.NATIVE)
# A row, a prime, around a tile's 3, a panel's 16 and 8, a chunk of 32 to 256 codes and a panel's depth of 512 or 1024.
SHAPES = [(1, 1, 1), (1, 257, 5), (2, 96, 19), (3, 64, 16), (7, 31, 33), (4, 1030, 17), (5, 768, 8), (1, 2080, 48)]
X_LEVELS = {
    "signed 8": Levels(-128, 127),
    "unsigned 8": Levels(0, 255),
    "signed 4": Levels(-8, 7),
    "unsigned 2": Levels(0, 3),
    "unsigned 1": Levels(0, 1),
    "mid-rise 1": Levels(-1, 0, 0.5),
    "mid-rise 8": Levels(-128, 127, 0.5, 0.5),
}


KINDS = list(product(X_LEVELS, (0.0, 0.5)))  # of x, and the shift of weights


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param != backends.TORCH:
        build.load()  # raises: the project needs a compiler, and code that does not compile must not skip its own tests
    state = backends.availability(request.param)
    if not state.available:
        pytest.skip(f"{request.param}: {state.why}")
    return request.param


def generator_of(*seed):
    return torch.Generator().manual_seed(abs(hash(seed)) % 2**31)


def random_matrix(rows, cols, n_bits, shift=0.0, scale=None, fill=None):
    generator, half = generator_of(rows, cols, n_bits), 2 ** (n_bits - 1)
    codes = torch.randint(-half, half, (rows, cols), generator=generator).to(torch.int8)
    if fill is not None:
        codes.fill_(fill)
    scale = 0.1 + torch.rand(rows, generator=generator) if scale is None else scale
    return packed_matrix(pack(codes, n_bits), scale, n_bits, cols, shift), codes


def codes_of(x, quant):
    """Quantize by the formula, in numpy: float32, half to even."""
    offset = np.float32(0) if quant.offset is None else quant.offset.numpy()
    v = (x.numpy() - offset) / quant.scale.numpy() - np.float32(quant.levels.shift)
    return np.rint(np.clip(v, np.float32(quant.levels.qmin), np.float32(quant.levels.qmax))).astype(np.int64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_bits", [1, 2, 3, 4, 8])
def test_integer_sums_are_those_of_int64_arithmetic(backend, n_bits, shape):
    """With scales of 1 the result is the sum itself; a sum beyond 2^24 is rounded to float32 once."""
    rows, cols, features = shape
    for name, shift in KINDS[::3] if backend == backends.TRITON else KINDS:  # interpreted kernels are slow
        levels = X_LEVELS[name]
        weight, codes = random_matrix(features, cols, n_bits, shift, scale=torch.ones(1))
        quant = QuantArgs(torch.ones(1), None, levels)
        spread = 1.2 * (levels.qmax - levels.qmin)
        x = spread * (torch.rand(rows, cols, generator=generator_of(*shape)) - 0.5) + (levels.qmin + levels.qmax) / 2
        x_levels = 2 * codes_of(x, quant) + int(2 * levels.shift)
        w_levels = 2 * codes.numpy().astype(np.int64) + int(2 * shift)
        expected = ((x_levels @ w_levels.T) / 4).astype(np.float32)
        assert is_integer(weight, quant)
        assert np.array_equal(run(backend, x, weight, None, quant).numpy(), expected), (name, shift)


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_every_level_of_instructions_that_this_processor_has_gives_the_same_bits(monkeypatch, n_bits):
    """`avx2` takes the highest, here each has its turn: 0 is plain C++, 1 AVX2, 2 AVX-512 VNNI, 3 VPOPCNTDQ."""
    for level in range(build.load().dsquant_cpu_level() + 1):
        monkeypatch.setattr(backends, "isa", lambda _, level=level: level)
        for rows, cols, features in [*SHAPES, (14, 300, 37)]:
            weight, _ = random_matrix(features, cols, n_bits, 0.5)
            x = torch.randn(rows, cols, generator=generator_of(rows, cols))
            for levels in (Levels(-128, 127), Levels(0, 255), Levels(-2, 1, 0.5)):
                quant = QuantArgs(torch.tensor([0.03]), torch.tensor([0.2]), levels)
                expected = run(backends.TORCH, x, weight, None, quant)
                assert torch.equal(run(backends.AVX2, x, weight, None, quant), expected), level
        for x_code, w_code in ((255, 2 ** (n_bits - 1) - 1), (0, -(2 ** (n_bits - 1)))):
            weight, _ = random_matrix(17, 8192, n_bits, scale=torch.ones(1), fill=w_code)
            x, quant = torch.full((1, 8192), float(x_code)), QuantArgs(torch.ones(1), None, Levels(0, 255))
            assert torch.equal(
                run(backends.AVX2, x, weight, None, quant), torch.full((1, 17), 8192.0 * x_code * w_code)
            )


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_the_largest_codes_there_are_do_not_saturate(backend, n_bits):
    half, cols = 2 ** (n_bits - 1), 1024 if backend == backends.TRITON else 4096
    for levels, x_code in (
        (Levels(-128, 127), -128),
        (Levels(-128, 127), 127),
        (Levels(0, 255), 255),
        (Levels(0, 255), 0),
    ):
        for w_code in (-half, half - 1):
            weight, _ = random_matrix(17, cols, n_bits, scale=torch.ones(1), fill=w_code)
            x = torch.full((3, cols), float(x_code))
            y = run(backend, x, weight, None, QuantArgs(torch.ones(1), None, levels))
            assert torch.equal(y, torch.full((3, 17), float(np.float32(cols * x_code * w_code))))


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("levels", X_LEVELS.values(), ids=list(X_LEVELS))
def test_every_backend_gives_the_bits_of_the_formula(backend, n_bits, levels):
    """y = float32(sum) * (s_x s_w) + float32(offset s_w sum w + bias), scales, offset and bias being anything."""
    weight, codes = random_matrix(37, 300, n_bits, 0.5)
    generator = generator_of(n_bits)
    x, bias = torch.randn(11, 300, generator=generator), torch.randn(37, generator=generator)
    quant = QuantArgs(torch.tensor([0.137]), torch.tensor([-0.21]), levels)
    x_levels = 2 * codes_of(x, quant) + int(2 * levels.shift)
    w_levels = 2 * codes.numpy().astype(np.int64) + 1
    divisor = 2 * (2 if levels.shift else 1)
    sums = (x_levels @ w_levels.T * divisor // 4).astype(np.float32)
    scale = weight.scale.numpy()
    factor = quant.scale.numpy() * scale / np.float32(divisor)
    moved = quant.offset.numpy().astype(np.float64) * scale.astype(np.float64) * (w_levels.sum(1) / 2)
    expected = sums * factor + (moved + bias.numpy().astype(np.float64)).astype(np.float32)
    assert np.array_equal(run(backend, x, weight, bias, quant).numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_bits", range(1, 9))
def test_a_float_input_is_within_twice_the_error_of_a_float32_product(backend, n_bits, shape):
    rows, cols, features = shape
    for shift in ((n_bits % 2) / 2,) if backend == backends.TRITON else (0.0, 0.5):
        weight, codes = random_matrix(features, cols, n_bits, shift)
        generator = generator_of(*shape)
        x, bias = torch.randn(rows, cols, generator=generator), torch.randn(features, generator=generator)
        w_hat = (codes.double() + shift) * weight.scale.double()[:, None]
        oracle = F.linear(x.double(), w_hat, bias.double())
        naive = torch.zeros(rows, features)
        for k in range(cols):  # one product at a time, each rounded to float32
            naive += x[:, k, None] * w_hat.float()[:, k]
        allowed = 2 * (naive + bias - oracle).abs().max() + 2e-7 * oracle.abs().max()
        assert (run(backend, x, weight, bias, None) - oracle).abs().max() <= allowed
        assert torch.equal(image(weight), w_hat.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(backend, dtype):
    weight, _ = random_matrix(24, 100, 2)
    x, bias = torch.randn(6, 100, generator=generator_of(1)).to(dtype), torch.randn(24).to(dtype)
    for quant in (None, QuantArgs(torch.tensor([0.1]), None, Levels(-8, 7))):
        y = run(backend, x, weight, bias, quant)
        assert y.dtype == dtype
        assert torch.equal(y, run(backend, x.float(), weight, bias.float(), quant).to(dtype))


def test_inputs_of_any_layout_and_rank_give_the_same(backend):
    weight, _ = random_matrix(20, 48, 3)
    quant = QuantArgs(torch.tensor([0.2]), None, Levels(-8, 7))
    x = torch.randn(4, 5, 48, generator=generator_of(2))
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for q in (None, quant):
        expected = run(backend, x.reshape(20, 48), weight, None, q).view(4, 5, 20)
        assert not strided.is_contiguous()
        assert torch.equal(run(backend, strided, weight, None, q), expected)
        assert torch.equal(run(backend, turned, weight, None, q), expected)
        assert torch.equal(run(backend, x[0, 0], weight, None, q), run(backend, x[0, :1], weight, None, q)[0])
        assert run(backend, x[:, :0], weight, None, q).shape == (4, 0, 20)


@pytest.mark.parametrize(("n_bits", "levels"), [(2, Levels(0, 255)), (1, Levels(-1, 0, 0.5)), (1, Levels(0, 3))])
def test_many_rows_go_in_blocks_and_threads_do_not_show(backend, n_bits, levels):
    """1500 rows of 1536 take several blocks of x, and more than one batch of them; 70 of 520 several interpreted tiles."""
    rows, cols = (70, 520) if backend == backends.TRITON else (1500, 1536)
    weight, _ = random_matrix(40, cols, n_bits)
    quant = QuantArgs(torch.tensor([0.05]), torch.tensor([0.3]), levels)
    x = torch.randn(rows, cols, generator=generator_of(3))
    before = torch.get_num_threads()
    try:
        results = {}
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results[threads] = [run(backend, x, weight, None, q) for q in (quant, None)]
    finally:
        torch.set_num_threads(before)
    if backend != backends.TORCH:  # torch's own products may be cut differently
        assert torch.equal(results[1][1], results[3][1])
    assert torch.equal(results[1][0], results[3][0])
    some = slice(None, None, rows // 5)
    one_by_one = torch.cat([run(backend, row, weight, None, quant) for row in x[some].split(1)])
    assert torch.equal(results[1][0][some], one_by_one)


def test_ties_edges_and_outliers_take_the_codes_of_the_definition(backend):
    weight, _ = random_matrix(16, 64, 2)
    x = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5, 1e30, -1e30, float("inf"), -float("inf"), 0.0, -0.0, 7.5, -8.5, 8.0])
    x = F.pad(x, (0, 50)).expand(4, 64)
    for levels in (Levels(-8, 7), Levels(0, 15), Levels(-8, 7, 0.5)):
        quant = QuantArgs(torch.tensor([1.0]), None, levels)
        assert torch.equal(run(backend, x, weight, None, quant), run(backends.TORCH, x, weight, None, quant))


@pytest.mark.parametrize("levels", [Levels(-1, 0, 0.5), Levels(-2, 1)])
@pytest.mark.parametrize("cols", [70, 20_000])
def test_bit_planes_of_rows_of_any_length_give_the_bits_of_the_formula(backend, levels, cols):
    """20,000 bits are more than are multiplied at a time, and end within a word."""
    weight, _ = random_matrix(18, cols, 1, 0.5)
    quant = QuantArgs(torch.tensor([0.6]), torch.tensor([-0.1]), levels)
    x = torch.randn(13, cols, generator=generator_of(6))
    bias = torch.randn(18, generator=generator_of(7))
    assert torch.equal(run(backend, x, weight, bias, quant), run(backends.TORCH, x, weight, bias, quant))


@pytest.mark.parametrize(("n_bits", "levels"), [(2, Levels(-8, 7)), (1, Levels(-1, 0, 0.5))])
def test_a_row_with_nan_is_nan_and_no_other(backend, n_bits, levels):
    weight, _ = random_matrix(19, 70, n_bits)
    x = torch.randn(7, 70, generator=generator_of(4))
    x[3, 69] = float("nan")
    for quant in (None, QuantArgs(torch.tensor([0.1]), None, levels)):
        y = run(backend, x, weight, None, quant)
        assert y.isnan().all(dim=1).tolist() == [False] * 3 + [True] + [False] * 3
        assert not y[[0, 1, 2, 4, 5, 6]].isnan().any()


def test_scales_of_x_by_token_or_channel_dequantize_x_first(backend):
    weight, _ = random_matrix(12, 32, 2)
    x = torch.randn(5, 32, generator=generator_of(5))
    for scale in (0.1 + torch.rand(5, 1), 0.1 + torch.rand(32)):
        quant = QuantArgs(scale, None, Levels(-8, 7))
        x_hat = torch.clamp(x / scale, -8, 7).round() * scale
        assert not is_integer(weight, quant)
        torch.testing.assert_close(run(backend, x, weight, None, quant), x_hat @ image(weight).t())


def test_sums_that_32_bits_cannot_hold_are_not_taken_in_integers(backend):
    weight, _ = random_matrix(2, 70_000, 8, scale=torch.ones(1), fill=127)
    quant = QuantArgs(torch.ones(1), None, Levels(0, 255))
    assert not is_integer(weight, quant)
    y = run(backend, torch.full((1, 70_000), 255.0), weight, None, quant)
    torch.testing.assert_close(y, torch.full((1, 2), 70_000.0 * 255 * 127), rtol=1e-4, atol=0)


def operands(backend, with_offset):
    weight, _ = random_matrix(21, 50, 3, 0.5)
    isa, x, bias = backends.isa(backend), torch.randn(2, 3, 50), torch.randn(21)
    offset = torch.tensor([0.1]) if with_offset else None
    rest = (3, 0.5, -8, 7, 0.0, isa)
    return {
        "packed_linear": (x, weight.words, weight.scale, bias, 3, 0.5, isa),
        "packed_linear_int": (
            x,
            weight.words,
            weight.scale,
            weight.code_sums,
            bias,
            torch.tensor([0.3]),
            offset,
            *rest,
        ),
    }


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("backend", backends.ON_CPU, indirect=True)
def test_native_operators_pass_opcheck(backend, with_offset):
    for name, args in operands(backend, with_offset).items():
        torch.library.opcheck(getattr(torch.ops.dsquant, name).default, args)


def test_a_compiled_function_is_one_graph_and_gives_the_same_bits():
    weight, _ = random_matrix(21, 50, 3)
    quant = QuantArgs(torch.tensor([0.3]), None, Levels(-8, 7))
    x = torch.randn(4, 50, generator=generator_of(6))

    def layer(x):
        return packed_linear(x, weight, None, quant).relu()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_what_does_not_fit_is_refused(backend):
    weight, _ = random_matrix(8, 40, 2)
    with pytest.raises(ValueError, match="x has 41 features, the packed weight 40"):
        packed_linear(torch.zeros(2, 41), weight)
    with pytest.raises(ValueError, match=r"scale is torch\.float32 \(3,\), not float32 of 1 or 8 values"):
        packed_matrix(weight.words, torch.ones(3), 2, 40)
    with pytest.raises(ValueError, match=r"shift is 0\.25"):
        packed_matrix(weight.words, torch.ones(8), 2, 40, 0.25)
    if backend != backends.TORCH:
        broken = PackedMatrix(weight.words, weight.scale, weight.code_sums, 3, 40)
        with pytest.raises((RuntimeError, ValueError), match="words do not hold rows of 40 codes"):
            run(backend, torch.zeros(2, 40), broken, None, None)


def test_a_forced_backend_runs_and_one_that_cannot_is_an_error(monkeypatch):
    weight, _ = random_matrix(8, 40, 2)
    monkeypatch.setenv("DSQ_BACKEND", "torch")
    assert packed_linear(torch.zeros(2, 40), weight).shape == (2, 8)
    monkeypatch.setenv("DSQ_BACKEND", "cpu")
    with pytest.raises(ConfigError, match="DSQ_BACKEND=cpu forces CPU code, and packed_linear got tensors on meta"):
        packed_linear(torch.zeros(2, 40, device="meta"), weight)
