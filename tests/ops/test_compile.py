"""torch.compile takes a quantized block as one graph: on CPU with the bits of the same block uncompiled, on GPUs as operators."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from dsquant.ops import backends
from dsquant.ops.fake_quantize import QuantArgs, fake_quantize
from dsquant.ops.quant_attention import quant_attention
from dsquant.ops.quant_linear import quant_linear
from dsquant.spec import Levels

SIGNED, UNSIGNED = Levels(-2, 1), Levels(0, 3)
HEADS, TOKENS, FEATURES = 2, 20, 32


def block(x, qkv_weight, qkv_bias, out_weight, scales, offset):
    """Attend to x (B, N, C), then map it, every site quantized."""
    batch = x.shape[0]
    qkv = quant_linear(x, qkv_weight, qkv_bias, scales[0], offset, SIGNED)
    q, k, v = qkv.view(batch, TOKENS, 3, HEADS, FEATURES // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    args = [
        QuantArgs(scale, None, grid) for scale, grid in zip(scales[1:5], (*[SIGNED] * 2, UNSIGNED, SIGNED), strict=True)
    ]
    y = quant_attention(q, k, v, 0.25, *args).transpose(1, 2).reshape(x.shape)
    y = quant_linear(y, out_weight, None, scales[5], None, SIGNED, gelu=True)
    return fake_quantize(y.relu(), scales[6], None, UNSIGNED)


def leaves(batch, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def leaf(*size):
        return (torch.randn(size, generator=generator) * 0.3).to(device).requires_grad_()

    scales = [leaf(1).detach().abs().add(0.1).requires_grad_() for _ in range(7)]
    weights = leaf(3 * FEATURES, FEATURES), leaf(3 * FEATURES), leaf(FEATURES, FEATURES)
    return leaf(batch, TOKENS, FEATURES), *weights, scales, leaf(1)


def results(run, given):
    flat = [t for entry in given for t in (entry if isinstance(entry, list) else [entry])]
    y = run(*given)
    return [y.detach(), *torch.autograd.grad(y, flat, torch.ones_like(y))]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [backends.TORCH, "cpu"])
def test_a_compiled_block_is_one_graph_and_gives_the_same_bits_for_batches_of_any_size(backend, monkeypatch):
    monkeypatch.setenv("DSQ_BACKEND", backend)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for batch in (2, 3, 5):
        given = leaves(batch)
        for found, expected in zip(results(compiled, given), results(block, given), strict=True):
            assert torch.equal(found, expected)


def operators(graphs):
    """Count the operators of dsquant in graphs and in those within them."""
    modules = [module for graph in graphs for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for module in modules for node in module.graph.nodes]
    called = [arg for node in nodes for arg in (node.target, *node.args) if isinstance(arg, torch._ops.OpOverload)]
    return Counter(op.name().removeprefix("dsquant::") for op in called if op.namespace == "dsquant")


def test_on_gpus_a_block_is_one_graph_of_the_kernels_operators_forward_and_backward(monkeypatch):
    """No GPU takes part: tensors are fake. Autograd has no engine for such a device, but Dynamo traces backward with forward."""
    monkeypatch.delenv("DSQ_BACKEND", raising=False)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    with FakeTensorMode():
        y = torch.compile(block, backend=keep, fullgraph=True)(*leaves(2, "cuda"))
    assert (y.device.type, y.shape) == ("cuda", (2, TOKENS, FEATURES))
    assert len(graphs) == 1
    once = ("quant_attention", "quant_attention_backward", "gelu_quantize", "gelu_quantize_backward")
    assert operators(graphs) == {"fake_quantize": 2, "fake_quantize_backward": 2} | dict.fromkeys(once, 1)


def test_gpu_operators_survive_the_partition_into_forward_and_backward(monkeypatch):
    """On fake CPU tensors, which have an autograd engine, with what is chosen for a GPU."""
    monkeypatch.setattr(backends, "_choose", lambda *_: backends.TRITON)
    monkeypatch.setattr(backends, "operator", lambda name, *_: getattr(torch.ops.dsquant, name).default)
    parts = {"forward": [], "backward": []}

    def keep(part):
        def compiler(graph, _):
            parts[part].append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    with FakeTensorMode():
        given = leaves(2)
        shapes = [t.shape for t in results(torch.compile(block, backend=backend, fullgraph=True), given)]
    assert shapes[0] == shapes[1] == (2, TOKENS, FEATURES)
    assert {part: len(graphs) for part, graphs in parts.items()} == {"forward": 1, "backward": 1}
    assert operators(parts["forward"]) == {"fake_quantize": 2, "gelu_quantize": 1, "quant_attention": 1}
    backward = {"fake_quantize_backward": 2, "gelu_quantize_backward": 1, "quant_attention_backward": 1}
    assert operators(parts["backward"]) == backward
