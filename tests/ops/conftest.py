"""The backends that an op with native code is tested on, each test on every one."""

import pytest

from dsquant.ops import backends


def require(backend):
    """Skip where this processor lacks the instructions; fail where native code does not build: a skip would hide that.

    Triton's kernels run on CPU, interpreted, where there is no GPU (`tests/conftest.py`).
    """
    built = backends.availability(backends.PORTABLE)
    assert built.available, built.why
    if not (found := backends.availability(backend)).available:
        pytest.skip(found.why)


@pytest.fixture(params=(backends.TORCH, *backends.NATIVE))
def each_backend(request, monkeypatch):
    """Have the ops of a test run one backend, native code or the definition in PyTorch."""
    require(request.param)
    monkeypatch.setenv("DSQ_BACKEND", request.param)
    return request.param


@pytest.fixture(params=backends.NATIVE)
def native_backend(request):
    """Return a native backend that this processor can run."""
    require(request.param)
    return request.param
