"""Ways to compute a linear layer, for `benchmarks/packed.py`: dsquant's packed weights and those of others, on CPU and GPU."""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsquant.ops import backends
from dsquant.ops.fake_quantize import QuantArgs
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import packed_linear, packed_matrix
from dsquant.spec import Levels, qrange

# Of weights, of activations.
ON_CPU = ((1, 1), (1, 2), (2, 2), (2, 8), (3, 8), (4, 8), (8, 8), (2, None), (4, None))
ON_GPU = ((1, 1), (1, 2), (2, 2), (2, 8), (4, 8), (8, 8), (2, None), (4, None))
BLOCK = 32  # columns that share a scale in MatMulNBits
Layer = Callable[[Tensor], Any]


class Engine(NamedTuple):
    """Name a way to compute a linear layer of inputs of a dtype; `build(weight, bias)` returns it, or raises EngineError."""

    name: str
    n_bits: int
    a_bits: int
    build: Callable[[Tensor, Tensor], Layer]
    dtype: torch.dtype = torch.float32


class EngineError(Exception):
    """Signal an engine that this machine does not have, in words for the benchmark's line."""


def engines(device: str, threads: int) -> list[Engine]:
    """Return every engine of a device that is compared; `threads` is for those that do not ask torch."""
    return cpu_engines(threads) if device == "cpu" else gpu_engines()


def cpu_engines(threads: int) -> list[Engine]:
    backend = backends.choose("packed_linear", "cpu")
    return [
        Engine("torch fp32", 32, 32, _linear(torch.float32)),
        Engine("torch bf16", 16, 16, _linear(torch.bfloat16)),
        Engine("torch int8 dynamic", 8, 8, _int8_dynamic),
        Engine("onnxruntime fp32", 32, 32, lambda w, b: _onnx(w, b, None, threads)),
        Engine("onnxruntime MatMulNBits", 4, 8, lambda w, b: _onnx(w, b, 4, threads)),
        Engine("onnxruntime MatMulNBits", 2, 8, lambda w, b: _onnx(w, b, 2, threads)),
        *(Engine(f"dsquant {backend}", n_bits, a_bits or 32, _dsquant(n_bits, a_bits)) for n_bits, a_bits in ON_CPU),
    ]


def gpu_engines() -> list[Engine]:
    """Return those of a GPU; gemlite's kernels take float16."""
    half, by_bits = torch.bfloat16, [(n_bits, a_bits) for n_bits, a_bits in ON_GPU if (a_bits or 8) <= 2]
    return [
        Engine("torch fp32", 32, 32, _linear(torch.float32)),
        Engine("torch bf16", 16, 16, _linear(half), half),
        *(Engine("gemlite", n, 16, lambda w, b, n=n: _gemlite(w, b, n), torch.float16) for n in (2, 4)),
        *(Engine("dsquant triton", n, a or 16, _dsquant(n, a, backends.TRITON), half) for n, a in ON_GPU),
        *(Engine("dsquant cuda", n, a, _dsquant(n, a, backends.CUDA), half) for n, a in by_bits),
    ]


def _linear(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Layer]:
    def build(weight: Tensor, bias: Tensor) -> Layer:
        weight, bias = weight.to(dtype), bias.to(dtype)
        return lambda x: nn.functional.linear(x.to(dtype), weight, bias)

    return build


def _int8_dynamic(weight: Tensor, bias: Tensor) -> Layer:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao, and still what torch itself ships
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        raise EngineError(f"this torch has no dynamic int8 linear: {error}") from None


def _dsquant(n_bits: int, a_bits: int | None, backend: str | None = None) -> Callable[[Tensor, Tensor], Layer]:
    """Return a builder of layers on packed weights by a backend, or by the one that runs by default."""

    def build(weight: Tensor, bias: Tensor) -> Layer:
        half = 2 ** (n_bits - 1)
        codes = (weight * half).round().clamp(-half, half - 1).to(torch.int8)
        shift = 0.5 if n_bits == 1 else 0.0
        scale = torch.full((1,), 0.02, device=weight.device)
        matrix = packed_matrix(pack(codes, n_bits), scale, n_bits, weight.shape[1], shift)
        quant = None
        if a_bits is not None:
            grid = Levels(-1, 0, 0.5) if a_bits == 1 else Levels(*qrange(a_bits, True))
            quant = QuantArgs(torch.tensor([4.0 / 2**a_bits], device=weight.device), None, grid)
        if backend is None:
            return lambda x: packed_linear(x, matrix, bias, quant)
        if not (found := backends.availability(backend)).available:
            raise EngineError(found.why)

        def forced(x: Tensor) -> Tensor:
            with backends.forced(f"packed_linear={backend}"):
                return packed_linear(x, matrix, bias, quant)

        return forced

    return build


def _onnx(weight: Tensor, bias: Tensor, n_bits: int | None, threads: int) -> Layer:
    """Make a session of one MatMul, or of one MatMulNBits with activations of 8 bits (accuracy_level 4); weights are random."""
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            raise EngineError(f"{package} is not installed")
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, k = weight.shape
    array = lambda tensor, name: numpy_helper.from_array(tensor.contiguous().numpy(), name)  # noqa: E731
    if n_bits is None:
        operands = [array(weight.t(), "w")]
        node = helper.make_node("MatMul", ["x", "w"], ["product"])
    else:
        blocks = -(-k // BLOCK)
        packed_codes = torch.randint(0, 256, (n, blocks, BLOCK * n_bits // 8)).to(torch.uint8)
        operands = [array(packed_codes, "w"), array(torch.rand(n * blocks), "s")]
        attributes = {"K": k, "N": n, "bits": n_bits, "block_size": BLOCK, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["product"], domain="com.microsoft", **attributes)
    value = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size])  # noqa: E731
    nodes = [node, helper.make_node("Add", ["product", "b"], ["y"])]
    graph = helper.make_graph(nodes, "linear", [value("x", k)], [value("y", n)], [*operands, array(bias, "b")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would delay the next engine
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": torch.zeros(1, k).numpy()})
    except Exception as error:  # onnxruntime's own exceptions share no base class but this
        reason = str(error).splitlines()[0]
        raise EngineError(f"onnxruntime {onnxruntime.__version__} with onnx {onnx.__version__}: {reason}") from None
    return lambda x: session.run(None, {"x": x.numpy()})


def _gemlite(weight: Tensor, bias: Tensor, n_bits: int) -> Layer:
    """Make gemlite's layer of n-bit weights, one scale and zero for each 128 columns, and float16 inputs; weights are random.

    Its tiles are those it comes with for the GPU and shape, else its default ones. GEMLITE_AUTOTUNE=fast has it time some twenty
    of them first, as it would by itself, for the best of it: a minute or more for each shape and number of rows.
    """
    if importlib.util.find_spec("gemlite") is None:
        raise EngineError("gemlite is not installed")
    try:
        _choose_gemlite_tiles(os.environ.get("GEMLITE_AUTOTUNE", "default"))
        from gemlite.core import DType, GemLiteLinear
    except Exception as error:  # it asks for a GPU where it is imported
        raise EngineError(f"gemlite: {str(error).splitlines()[0]}") from None

    n, k = weight.shape
    try:
        layer = GemLiteLinear(n_bits, 128, k, n, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 2**n_bits, (n, k), device=weight.device).to(torch.uint8)
        scales, zeros = (torch.rand(n * k // 128, 1, device=weight.device).half() for _ in range(2))
        layer.pack(codes, scales, zeros, bias.half())
        layer(torch.zeros(1, k, device=weight.device).half())
    except Exception as error:  # what it raises on a GPU or shape that it has no kernel for is no one class
        raise EngineError(f"gemlite: {str(error).splitlines()[0]}") from None
    return layer


@cache
def _choose_gemlite_tiles(mode: str) -> None:
    import gemlite

    gemlite.set_autotune(mode)
