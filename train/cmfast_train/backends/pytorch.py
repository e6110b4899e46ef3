# SPDX-License-Identifier: MIT
"""PyTorch as a backend of the runtime: what exported files are compared with, by the exporter and by cmfast-bench.

The runtime finds it through the entry point group "cmfast.backends", by suffix: .pt, .pth, .safetensors, .pkl, a
folder. What is particular to CUDA is in `torch_cuda`.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import cmfast
from cmfast import sampling
from cmfast.backends import DeviceTimes, Drawn, Inputs, variant_words
from cmfast.backends.cuda.runtime import check_process
from cmfast.backends.origin import Origin, pickled
from cmfast.errors import BackendError, OutOfMemory
from cmfast.formats.manifest import Manifest
from cmfast.formats.values import PRECISIONS
from cmfast.noise import as_u64
from cmfast.sampling import sample
from cmfast.spec import ModelSpec
from cmfast_train.backends import torch_noise
from cmfast_train.backends.torch_cuda import Compute, OnCuda, compiled
from cmfast_train.checkpoint import Checkpoint, weights_sha256
from cmfast_train.denoiser import Denoiser
from cmfast_train.importers import load_model
from cmfast_train.kernels.fuse import fuse
from cmfast_train.networks.precision import BACKBONES, accumulate_in_float32, converts_itself

Floats = npt.NDArray[np.float32]
VARIANTS = {
    "cpu": ("", "channels_last", "compiled"),
    "cuda": ("", "channels_last", "fused", "compiled", "reduce-overhead", "cuda_graph"),
}
NOISE, SAMPLES = "noise", "samples"  # names that no condition has
MODES = {"compiled": "max-autotune", "reduce-overhead": "reduce-overhead"}  # of torch.compile, by variant


class TorchBackend:
    """A model of any format that is known, run by PyTorch.

    The contracts are `cmfast.backends.Backend` and `LoopBackend`, on CUDA also `TimedBackend`, `DrawBackend` and
    `ReleasingBackend`.

    Args:
        variant: words, separated by spaces or commas. None: eager. "channels_last": with that memory format.
            "fused", on CUDA: with kernels that do the work of several operations, in that format. "compiled": by
            torch.compile, on a CPU with the weights as constants, on CUDA with mode max-autotune; "reduce-overhead",
            on CUDA: with that mode. "cuda_graph", on CUDA: the whole few-step loop, and a single call of the denoiser,
            each recorded as one CUDA graph a batch size; torch.compile's modes record such graphs too, so they combine
            with channels_last only. A loop stays on the device in all of them
        precision: "" or fp32; fp16, bf16 (`Denoiser.to_precision`); tf32, which only GPUs have. Everything else in
            the process multiplies as it did before
    """

    batch: int | None = None
    origin: Origin | None = None
    timed: Callable[[], AbstractContextManager[list[DeviceTimes]]]  # on CUDA only
    release: Callable[[], None]  # on CUDA only
    draw: Callable[..., Iterator[Drawn]]  # on CUDA only: a CPU draws noise faster by numpy

    def __init__(
        self,
        model: Checkpoint | Denoiser | os.PathLike[str] | str,
        device: str = "cpu",
        threads: int | None = None,
        variant: str = "",
        precision: str = "",
    ) -> None:
        words = _check(model, device, variant, precision)
        set_threads(threads)
        _watch_forks()
        source = model if isinstance(model, (Checkpoint, Denoiser)) else load_model(model)
        self.manifest = replace(manifest_of(source), dtype=PRECISIONS[precision or "fp32"])
        self.name = " ".join(filter(None, ("PyTorch", device, precision, *words)))
        denoiser = source.denoiser() if isinstance(source, Checkpoint) else snapshot(source)
        if BACKBONES[precision or "fp32"] != torch.float32 and not converts_itself(denoiser.network):
            raise BackendError(
                f"{precision} of this network is made by its export: cmfast-export --precision {precision}; "
                "here use fp32"
            )
        self.denoiser = denoiser.to_precision(precision or "fp32").to(device)
        if precision == "fp16" and device == "cpu":
            accumulate_in_float32(self.denoiser.network)
        if "channels_last" in words or "fused" in words:
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if "fused" in words:
            fuse(self.denoiser)
        self._call, self._execute = _callable(self.denoiser, device, words), _on_cpu
        self._border = _Border(self.name, compiled=not MODES.keys().isdisjoint(words))
        if device == "cuda":
            self._run_on(OnCuda(captures="cuda_graph" in words, tf32=precision == "tf32"))

    def _run_on(self, device: OnCuda) -> None:
        self._execute, self.timed, self.release = device, device.timed, device.release
        self._border = replace(self._border, process=os.getpid())
        # of the parts, not of self, which would be a cycle
        self.draw = functools.partial(_draw, device, self._border, self._call, self.manifest.spec)

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def run(self, inputs: Inputs) -> Floats:
        """Return f(x, sigma, **conditions), float32 [B, *shape]."""
        call = self._call  # not self, which would keep a backend alive that keeps what it computes
        return self._compute("run", lambda tensors: call(**tensors), inputs)

    def loop(self, noise: Floats, sigmas: Sequence[float], conditions: Inputs) -> Floats:
        """Return what `cmfast.sampling.sample` returns, float32 [B, *shape]; it runs on tensors as it is."""
        sigmas = tuple(float(sigma) for sigma in sigmas)
        call, spec = self._call, self.manifest.spec

        def compute(tensors: dict[str, Tensor]) -> Tensor:
            return _loop(call, tensors[NOISE], sigmas, _without(tensors, NOISE), spec)

        return self._compute(sigmas, compute, {NOISE: noise, **conditions})

    def _compute(self, what: Hashable, compute: Compute, inputs: Inputs) -> Floats:
        with self._border.crossed():
            return self._execute(what, compute, inputs)


def _loop(
    call: Callable[..., Tensor],
    noise: Tensor,
    sigmas: tuple[float, ...],
    conditions: Mapping[str, Tensor],
    spec: ModelSpec,
) -> Tensor:
    """Return `cmfast.sampling.sample`, which runs on tensors as it is."""

    def denoise(x: Tensor, *one_or_two: float) -> Tensor:
        both = dict(zip(("sigma", "sigma_next"), (x.new_full((len(x),), sigma) for sigma in one_or_two), strict=False))
        return call(x=x, **both, **conditions)

    samples: Tensor = sample(denoise, noise, sigmas, spec)
    return samples


def _draw(
    device: OnCuda,
    border: _Border,
    call: Callable[..., Tensor],
    spec: ModelSpec,
    seed: int,
    batches: Sequence[tuple[range, Inputs]],
    sigmas: Sequence[float],
    *,
    pixels: bool,
) -> Iterator[Drawn]:
    """Yield batches drawn on the device from the noise on; the contract is `cmfast.backends.DrawBackend.draw`."""
    sigmas = tuple(float(sigma) for sigma in sigmas)
    most = max((len(samples) for samples, _ in batches), default=0)
    key = torch_noise.key_of(seed).numpy()

    def inputs(samples: range, conditions: Inputs) -> dict[str, npt.NDArray[Any]]:
        each = {SAMPLES: as_u64(samples, "sample").view(np.int64), **conditions}
        # A smaller batch is filled up with its last sample: another size would be compiled or captured anew.
        return {NOISE: key} | {name: _filled_up(value, most) for name, value in each.items()}

    def compute(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        noise = torch_noise.gaussian(tensors[NOISE], tensors[SAMPLES], len(sigmas), spec.shape)
        x0 = _loop(call, noise, sigmas, _without(tensors, NOISE, SAMPLES), spec)
        images = sampling.pixels(x0).to(torch.uint8).permute(0, 2, 3, 1) if pixels else x0
        return images.contiguous(), x0.isfinite().all()

    results = device.each(("draw", sigmas, pixels), compute, (inputs(*batch) for batch in batches))
    for samples, _ in batches:
        with border.crossed():
            images, finite = next(results)
        yield Drawn(images[: len(samples)], bool(finite))


def _without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _filled_up(values: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    return np.pad(values, [(0, n - len(values)), *[(0, 0)] * (values.ndim - 1)], mode="edge")


@dataclass(frozen=True)
class _Border:
    """Where PyTorch's errors become lines."""

    name: str  # of the backend
    compiled: bool  # by torch.compile
    process: int | None = None  # that opened it on CUDA

    @contextmanager
    def crossed(self) -> Iterator[None]:
        if self.process is not None:
            check_process(self.process, self.name)
        try:
            yield
        except (RuntimeError, MemoryError) as err:
            if out_of_memory(err):
                raise OutOfMemory(f"{self.name} is short of memory; try a smaller batch: {_line(err)}") from None
            if not self.compiled:
                raise
            # commonly: there is no C++ compiler
            raise BackendError(f"torch.compile could not compile or run the model: {_line(err)}") from None


def set_threads(threads: int | None) -> None:
    """Set the number of PyTorch's threads on the CPU, of the whole process; None leaves it.

    In a child of fork there is one only: the others stayed in the parent, and OpenMP would wait for them for ever.
    """
    if _forked and threads not in (None, 1):
        raise BackendError(
            f"{threads} threads were requested in a process that was forked, where PyTorch hangs with more than one; "
            'start it by "spawn" (multiprocessing.set_start_method), or leave the threads out'
        )
    if threads is not None:
        torch.set_num_threads(threads)


def out_of_memory(err: BaseException) -> bool:
    """Whether PyTorch had no memory, on a GPU or the CPU, for which it has no exception of its own."""
    words = ("can't allocate memory", "not enough memory", "std::bad_alloc")
    return isinstance(err, (torch.OutOfMemoryError, MemoryError)) or any(word in str(err) for word in words)


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)


@functools.cache
def _watch_forks() -> None:
    """From the first backend on, notice when this process is a child: the threads of its parent are not there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


def manifest_of(model: Checkpoint | Denoiser) -> Manifest:
    """Return the manifest of a model: what an export of it says, without the parity."""
    digest = model.sha256() if isinstance(model, Checkpoint) else weights_sha256(model.network.state_dict())
    return Manifest(
        kind="denoiser",
        spec=model.spec,
        source={**(model.source if isinstance(model, Checkpoint) else {"format": "module"}), "sha256": digest},
        made_by={"cmfast": cmfast.__version__, "torch": version("torch")},
    )


def snapshot(denoiser: Denoiser) -> Denoiser:
    """Return a copy of a denoiser to evaluate on the CPU; the original goes on training."""
    return copy.deepcopy(denoiser).cpu().eval().requires_grad_(False)


def _check(model: object, device: str, variant: str, precision: str) -> tuple[str, ...]:
    """Return the words of the variant; raise unless PyTorch, this build of it on this machine, can run a model so."""
    if device == "cuda" and not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        raise BackendError(
            f"device cuda was requested, but PyTorch {torch.__version__} {why}; "
            "use --device cpu, or install a CUDA build of torch (pytorch.org says how)"
        )
    words = _words(model, device, variant)
    if precision not in ("", *PRECISIONS):
        raise BackendError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32" and device == "cpu":
        raise BackendError("precision tf32 is a GPU's way to multiply float32; use --device cuda, or --precision fp32")
    if precision in ("tf32", "bf16") and device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        raise BackendError(
            f"the {torch.cuda.get_device_name()} has no {precision} (that begins with compute capability 8.0); "
            "use --precision fp16 or fp32"
        )
    return words


def _words(model: object, device: str, variant: str) -> tuple[str, ...]:
    words = variant_words(variant)
    if "diffusers" in words:
        raise BackendError(f"{model}: diffusers runs folders that it wrote, not this file")
    for word in words:
        if word not in VARIANTS[device]:
            also = f"; {word!r} needs --device cuda" if word in VARIANTS["cuda"] else ""
            have = ", ".join(map(repr, VARIANTS[device]))
            raise BackendError(f"PyTorch on {device} has the variants {have}, not {word!r}{also}")
    modes = [word for word in words if word in MODES]
    others = [word for word in words if word in (*MODES, "fused", "cuda_graph") and word not in modes[:1]]
    if modes and others:
        raise BackendError(
            f"{modes[0]!r} does not combine with {others[0]!r}: torch.compile has its own way to fuse and to "
            "record; use one of them, or either with 'channels_last'"
        )
    if "fused" in words:
        return tuple(word for word in words if word != "channels_last")  # which it implies
    return words


def _callable(denoiser: torch.nn.Module, device: str, words: tuple[str, ...]) -> Callable[..., Any]:
    for word in words:
        if word in MODES:
            return compiled(denoiser, MODES[word]) if device == "cuda" else _frozen(denoiser)
    return denoiser


def _frozen(denoiser: torch.nn.Module) -> Callable[..., Any]:
    """Return the denoiser compiled for the CPU: a program for each batch size, the weights as constants in it."""
    from torch._inductor import config

    call = torch.compile(denoiser, dynamic=False)  # torch.compile at its fastest

    def run(**tensors: Tensor) -> Tensor:
        # Around the call, not as an option of torch.compile: the first call of a size compiles, and asks for it twice.
        with config.patch(freezing=True):
            result: Tensor = call(**tensors)
        return result

    return run


def _on_cpu(what: Hashable, compute: Compute, inputs: Inputs) -> Floats:
    """Return compute(inputs); the contract is `torch_cuda.OnCuda.__call__`."""
    with torch.inference_mode():
        # writable, which PyTorch warns of otherwise: it has no tensors that are not
        return compute({k: torch.from_numpy(np.require(v, requirements=["C", "W"])) for k, v in inputs.items()}).numpy()


def _line(err: Exception) -> str:
    return (str(err).strip().splitlines() or ["?"])[0][:300]
