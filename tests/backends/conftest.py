# SPDX-License-Identifier: MIT
"""CUDA for tests: of a GPU with `pytest -m gpu`, else of host memory."""

from __future__ import annotations

from typing import Any

import pytest

from cmfast.backends.cuda import kernels
from cmfast.backends.cuda import runtime as cuda
from cmfast.errors import BackendError
from helpers.host_cuda import HostCuda


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return CUDA's runtime: of the GPU, or of host memory."""
    if request.param == "host":
        host = HostCuda()
        monkeypatch.setattr(cuda, "runtime", lambda: host)
        monkeypatch.setattr(kernels, "driver", lambda: host)
    else:
        pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
        try:
            cuda.open_gpu()
        except BackendError as err:
            pytest.skip(str(err))
    return cuda.runtime()
