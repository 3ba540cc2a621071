"""Measure a linear layer with packed weights against torch and ONNX Runtime at the shapes of a ViT, interleaved in one run."""

import importlib.util
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsquant.errors import ConfigError
from dsquant.ops import backends
from dsquant.ops.fake_quantize import QuantArgs
from dsquant.ops.pack import pack
from dsquant.ops.packed_linear import packed_linear, packed_matrix
from dsquant.ops.timing import interleaved
from dsquant.spec import Levels, qrange

SHAPES = "768x3072,3072x768,768x2304"  # in x out: fc1, fc2 and qkv of ViT-B
# Of weights, of activations.
DSQUANT_BITS = ((1, 1), (1, 2), (2, 2), (2, 8), (3, 8), (4, 8), (8, 8), (2, None), (4, None))
BLOCK = 32  # columns that share a scale in MatMulNBits
Layer = Callable[[Tensor], Any]


class Engine(NamedTuple):
    """Name a way to compute a linear layer; `build(weight, bias)` returns the layer, or raises EngineError."""

    name: str
    n_bits: int
    a_bits: int
    build: Callable[[Tensor, Tensor], Layer]


class EngineError(Exception):
    """Signal an engine that this machine does not have, in words for the benchmark's line."""


def packed(
    shapes: str = SHAPES, m: str = "1,197", threads: str = "1,2", repeats: int = 15, copies: int = 4,
    out: str | None = None,
) -> None:  # fmt: skip
    """Time a linear layer in every engine and print one JSON line a case.

    A line holds m, k (in), n (out), n_bits, a_bits, threads, engine, seconds and ratio_to_torch_fp32, how many times faster
    than torch in float32 the engine is. Engines take turns; seconds are medians of wall-clock time for one layer. Activation
    codes are made inside the timed call. An engine that is not there gets a line that says so.

    Args:
        shapes: in x out, comma-separated.
        m: rows of the input, comma-separated.
        threads: of torch and ONNX Runtime, comma-separated.
        repeats: timed runs of each engine, after two warm-up runs.
        copies: layers of a shape that one run goes through in turn. Several, as in a model, do not find their float
            weights in the cache from the run before; with 1 the weights may stay there.
        out: also write the lines to this file.
    """
    lines = []
    for count in integers(threads):
        torch.set_num_threads(count)
        for shape in str(shapes).split(","):
            k, n = _shape(shape)
            for rows in integers(m):
                for line in _case(rows, k, n, count, repeats, copies):
                    print(json.dumps(line), flush=True)
                    lines.append(json.dumps(line))
    if out:
        Path(out).write_text("\n".join(lines) + "\n")


def _shape(text: str) -> tuple[int, int]:
    sizes = integers(text.replace("x", ","))
    if len(sizes) != 2:
        raise ConfigError(f"{text!r} is no shape in x out, such as 768x3072")
    return sizes[0], sizes[1]


def integers(text: object) -> list[int]:
    """Parse `1,197`, which fire gives as a tuple, an int or a string."""
    parts = text if isinstance(text, (tuple, list)) else str(text).split(",")
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of whole numbers, such as 1,197 or 768x3072") from None


@torch.inference_mode()
def _case(m: int, k: int, n: int, threads: int, repeats: int, copies: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    weights = [(torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)) for _ in range(copies)]
    runs, missing = {}, {}
    for engine in engines(threads):
        try:
            layers = [engine.build(*weight) for weight in weights]
        except EngineError as error:
            missing[engine] = str(error)
            continue
        runs[engine] = lambda layers=layers: [layer(x) for layer in layers]
    seconds = interleaved(runs, repeats)
    floats = next(taken for engine, taken in seconds.items() if engine.name == "torch fp32")
    machine = {"copies": copies, "cpu": platform.machine(), "torch": torch.__version__}
    common = {"m": m, "k": k, "n": n, "threads": threads}
    lines = []
    for engine in [*runs, *missing]:
        line = {**common, "n_bits": engine.n_bits, "a_bits": engine.a_bits, "engine": engine.name}
        if engine in missing:
            lines.append({**line, "seconds": None, "ratio_to_torch_fp32": None, "unavailable": missing[engine]})
        else:
            ratio = floats / seconds[engine]
            lines.append(
                {**line, "seconds": seconds[engine] / copies, "ratio_to_torch_fp32": round(ratio, 3), **machine}
            )
    return lines


def engines(threads: int) -> list[Engine]:
    """Return every engine that is compared, dsquant at several bits; `threads` is for those that do not ask torch."""
    backend = backends.choose("packed_linear", "cpu")
    return [
        Engine("torch fp32", 32, 32, _linear(torch.float32)),
        Engine("torch bf16", 16, 16, _linear(torch.bfloat16)),
        Engine("torch int8 dynamic", 8, 8, _int8_dynamic),
        Engine("onnxruntime fp32", 32, 32, lambda w, b: _onnx(w, b, None, threads)),
        Engine("onnxruntime MatMulNBits", 4, 8, lambda w, b: _onnx(w, b, 4, threads)),
        Engine("onnxruntime MatMulNBits", 2, 8, lambda w, b: _onnx(w, b, 2, threads)),
        *(
            Engine(f"dsquant {backend}", n_bits, a_bits or 32, _dsquant(n_bits, a_bits))
            for n_bits, a_bits in DSQUANT_BITS
        ),
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


def _dsquant(n_bits: int, a_bits: int | None) -> Callable[[Tensor, Tensor], Layer]:
    def build(weight: Tensor, bias: Tensor) -> Layer:
        half = 2 ** (n_bits - 1)
        codes = (weight * half).round().clamp(-half, half - 1).to(torch.int8)
        shift = 0.5 if n_bits == 1 else 0.0
        matrix = packed_matrix(pack(codes, n_bits), torch.full((1,), 0.02), n_bits, weight.shape[1], shift)
        if a_bits is None:
            return lambda x: packed_linear(x, matrix, bias)
        grid = Levels(-1, 0, 0.5) if a_bits == 1 else Levels(*qrange(a_bits, True))
        quant = QuantArgs(torch.tensor([4.0 / 2**a_bits]), None, grid)
        return lambda x: packed_linear(x, matrix, bias, quant)

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
