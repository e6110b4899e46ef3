# SPDX-License-Identifier: MIT
"""The kernels around the network: noise, noise levels, renoising, samples and pixels, of `sampling.cu`.

They are loaded as PTX, which the driver translates for its card, so neither a CUDA toolkit nor torch is needed, and
the same file serves every card from compute capability 7.5 on. Numbers of device memory are addresses.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from functools import partial
from importlib.resources import files
from typing import Any

from cmfast.backends.cuda.runtime import Stream, call
from cmfast.errors import BackendError, MissingDependency, one_line

PTX = "sampling.ptx"  # benchmarks/make_ptx.py makes it
THREADS = 256  # of a block
MOST_BLOCKS = 2**16  # a thread takes further elements where they are more
_NUMBER, _WORD, _FLOAT = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "add_noise": (_NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _WORD, _FLOAT, _WORD),
    "less_noise": (_NUMBER, _NUMBER, _NUMBER, _FLOAT, _WORD),
    "fill": (_NUMBER, _NUMBER, _FLOAT),
    "values": (_NUMBER, _NUMBER, _NUMBER, _NUMBER, _WORD),
    "pixels": (_NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _WORD),
}


def driver() -> Any:
    """Return cuda.bindings.driver, or raise with the line that installs it."""
    try:
        from cuda.bindings import driver as bindings
    except ModuleNotFoundError:
        raise MissingDependency("running kernels on an NVIDIA GPU", "cuda-bindings", "gpu") from None
    return bindings


class Kernels:
    """The kernels, loaded; each call hands one over to the stream.

    Args:
        stream: What they are handed over to.

    Raises:
        BackendError: The driver does not take them, because it is older than CUDA 12.0, or there is none.
    """

    def __init__(self, stream: Stream) -> None:
        self._driver, self._stream = driver(), stream
        self._words = partial(_words, self._driver)
        ptx = files("cmfast.backends.cuda").joinpath(PTX).read_bytes()
        try:
            module = call(self._driver.cuModuleLoadData, ptx + b"\0", words=self._words)
        except RuntimeError as err:  # of cuda-bindings: there is no driver
            raise BackendError(f"cuda-bindings finds no driver: {one_line(err, 200)}") from None
        weakref.finalize(self, self._driver.cuModuleUnload, module).atexit = False
        get = self._driver.cuModuleGetFunction
        self._functions = {name: call(get, module, name.encode(), words=self._words) for name in SIGNATURES}

    def add_noise(
        self, x: int, x0: int, request: int, samples: int, size: int, step: int, std: float, *, clip: bool = False
    ) -> None:
        """Hand over x = x0 + std * noise, float32 [samples, size]; x0 at address 0 is left out.

        Args:
            x: float32, written.
            x0: float32, or 0.
            request: uint64 [1 + samples]: the seed, and the index of each sample.
            samples: How many.
            size: Values of a sample.
            step: The network call that the noise is for.
            std: Standard deviation of the noise.
            clip: Clip x0 to [-1, 1] first.
        """
        self._launch("add_noise", samples * ((size + 3) // 4), x, x0, request, samples, size, step, std, int(clip))

    def less_noise(self, x: int, x0: int, count: int, ratio: float, *, clip: bool) -> None:
        """Hand over x = x0 + ratio * (x - x0), float32 [count]; clip: x0 to [-1, 1] first."""
        self._launch("less_noise", count, x, x0, count, ratio, int(clip))

    def fill(self, to: int, count: int, value: float) -> None:
        """Hand over filling `count` float32 with a value."""
        self._launch("fill", count, to, count, value)

    def values(self, to: int, not_finite: int, x0: int, count: int, *, clip: bool) -> None:
        """Hand over copying x0, clipped to [-1, 1] or not; the word `not_finite` becomes 1 where a value is not."""
        self._launch("values", count, to, not_finite, x0, count, int(clip))

    def pixels(self, to: int, not_finite: int, x0: int, batch: int, shape: tuple[int, ...], *, clip: bool) -> None:
        """Hand over images uint8 [batch, H, W, C] of x0 [batch, C, H, W] in [-1, 1]; the rest is as in `values`."""
        channels, positions = shape[0], math.prod(shape[1:])
        count = batch * channels * positions
        self._launch("pixels", count, to, not_finite, x0, batch, channels, positions, int(clip))

    def _launch(self, name: str, threads: int, *values: int | float) -> None:
        blocks = min(max(math.ceil(threads / THREADS), 1), MOST_BLOCKS)
        stream, shared = int(self._stream.handle), 0
        call(
            self._driver.cuLaunchKernel, self._functions[name], blocks, 1, 1, THREADS, 1, 1, shared, stream,
            (values, SIGNATURES[name]), 0, words=self._words,
        )  # fmt: skip


def _words(bindings: Any, error: Any) -> str:
    _, text = bindings.cuGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)
