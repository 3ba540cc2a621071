"""What `make gpu` runs on a machine with a GPU: compiled kernels against the definitions, on the device."""

import os

import pytest
import torch

from dsquant.ops import backends
from dsquant.ops.cases import all_cases

pytestmark = pytest.mark.skipif(
    os.environ.get("DSQ_TEST_DEVICE") != "cuda", reason="needs a GPU: run `make gpu` on one"
)


@pytest.mark.parametrize("case", all_cases("cuda") if os.environ.get("DSQ_TEST_DEVICE") == "cuda" else [])
def test_compiled_kernels_agree_with_the_definitions(case):
    with torch.no_grad():
        expected = case.results(backends.TORCH)
        for backend in case.backends("cuda")[1:]:
            state = backends.availability(backend)
            assert state.available, state.why
            assert case.error(backend, expected) <= case.tolerance, backend


def test_a_step_of_a_quantized_model_never_waits_for_the_gpu():
    from tests.shard.test_step import make, train_step

    model, optimizer, quantization, images = make(device="cuda", obr={"weight": 0.01, "start": 0.0})
    train_step(model, optimizer, quantization, images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(model, optimizer, quantization, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
