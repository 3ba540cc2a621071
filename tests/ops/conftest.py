"""The backends that an op with native code is tested on, each test on every one."""

import pytest

from dsquant.ops import backends


@pytest.fixture(params=(backends.TORCH, *backends.NATIVE))
def each_backend(request, monkeypatch):
    """Have the ops of a test run one backend, native code or the definition in PyTorch."""
    if not (found := backends.availability(request.param)).available:
        pytest.skip(f"{request.param}: {found.why}")
    monkeypatch.setenv("DSQ_BACKEND", request.param)
    return request.param
