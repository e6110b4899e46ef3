# SPDX-License-Identifier: MIT
"""PyTorch as an engine of the runtime: what exported files are compared with, by the exporter and by cmfast-bench.

The runtime finds it through the entry point group "cmfast.engines", by suffix: .pt, .pth, .safetensors, .pkl, a folder.
What is particular to CUDA is in `torch_cuda`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import cmfast
from cmfast.artifact import PRECISIONS, Manifest
from cmfast.engines import DeviceTimes, Inputs
from cmfast.engines._cuda import check_process
from cmfast.engines._origin import Origin, pickled
from cmfast.errors import EngineError
from cmfast.sampler import sample
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import load_model
from cmfast_train.networks.precision import accumulate_in_float32
from cmfast_train.torch_cuda import Compute, OnCuda, compiled

if TYPE_CHECKING:
    from cmfast_train.diffusers_engine import DiffusersEngine

Floats = npt.NDArray[np.float32]
VARIANTS = {"cpu": ("", "channels_last", "compiled"), "cuda": ("", "channels_last", "compiled", "cuda_graph")}


class TorchEngine:
    """A model of any format that is known, run by PyTorch.

    The contracts are `cmfast.engines.Engine` and `LoopEngine`, on CUDA also `TimedEngine`.

    variant    "": eager. "channels_last": eager, with that memory format. "compiled": by torch.compile, on CUDA with
               mode max-autotune. "cuda_graph", on CUDA: the whole few-step loop, and a single call of the denoiser,
               each recorded as one CUDA graph a batch size. A loop stays on the device in all of them
    precision  "" or fp32; fp16, bf16 (`Denoiser.to_precision`); tf32, which only GPUs have. Everything else in the
               process multiplies as it did before
    """

    batch: int | None = None
    origin: Origin | None = None
    timed: Callable[[], AbstractContextManager[list[DeviceTimes]]]  # on CUDA only

    def __init__(
        self,
        model: Checkpoint | os.PathLike[str] | str,
        device: str = "cpu",
        threads: int | None = None,
        variant: str = "",
        precision: str = "",
    ) -> None:
        _check(model, device, variant, precision)
        set_threads(threads)
        _watch_forks()
        self._process = os.getpid()
        checkpoint = model if isinstance(model, Checkpoint) else load_model(model)
        self.manifest = replace(checkpoint_manifest(checkpoint), dtype=PRECISIONS[precision or "fp32"])
        self.name = " ".join(filter(None, ("PyTorch", device, precision, variant)))
        self.denoiser = checkpoint.denoiser().to_precision(precision or "fp32").to(device)
        if precision == "fp16" and device == "cpu":
            accumulate_in_float32(self.denoiser.network)
        if variant == "channels_last":
            self.denoiser.to(memory_format=torch.channels_last)
        self._variant, self._call, self._execute = variant, _callable(self.denoiser, device, variant), _on_cpu
        if device == "cuda":
            on_cuda = OnCuda(captures=variant == "cuda_graph", tf32=precision == "tf32")
            self._execute, self.timed = on_cuda, on_cuda.timed

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def run(self, inputs: Inputs) -> Floats:
        """Return f(x, sigma, label), float32 [B, C, H, W]."""
        call = self._call  # not self, which would keep an engine alive that keeps what it computes
        return self._compute("run", lambda tensors: call(**tensors), inputs)

    def loop(self, noise: Floats, sigmas: Sequence[float], label: npt.NDArray[np.int64] | None) -> Floats:
        """Return what `cmfast.sampler.sample` returns, float32 [B, C, H, W]; it runs on tensors as it is."""
        levels, call, spec = tuple(float(sigma) for sigma in sigmas), self._call, self.manifest.spec

        def draw(tensors: dict[str, Tensor]) -> Tensor:
            noise, label = tensors["noise"], {k: v for k, v in tensors.items() if k == "label"}

            def denoise(x: Tensor, sigma: float) -> Tensor:
                return call(x=x, sigma=x.new_full((len(x),), sigma), **label)

            return sample(denoise, noise, levels, spec)

        return self._compute(levels, draw, {"noise": noise} if label is None else {"noise": noise, "label": label})

    def _compute(self, what: Hashable, compute: Compute, inputs: Inputs) -> Floats:
        if self._execute is not _on_cpu:
            check_process(self._process, self.name)
        try:
            return self._execute(what, compute, inputs)
        except (RuntimeError, MemoryError) as err:
            if out_of_memory(err):
                raise EngineError(f"{self.name} is short of memory; try a smaller batch: {_line(err)}") from None
            if self._variant != "compiled":
                raise
            # commonly: there is no C++ compiler
            raise EngineError(f"torch.compile could not compile or run the model: {_line(err)}") from None


def set_threads(threads: int | None) -> None:
    """Set the number of PyTorch's threads on the CPU, of the whole process; None leaves it.

    In a child of fork there is one only: the others stayed in the parent, and OpenMP would wait for them for ever.
    """
    if _forked and threads not in (None, 1):
        raise EngineError(
            f"{threads} threads were asked for in a process that was forked, where PyTorch hangs with more than one; "
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
    """From the first engine on, notice when this process is a child: the threads of its parent are not there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


def open_folder(
    folder: Path, device: str, threads: int | None, variant: str, precision: str
) -> TorchEngine | DiffusersEngine:
    """Open a diffusers folder: our U-Net with its weights, or as the variant says diffusers' own pipeline."""
    if variant != "diffusers":
        return TorchEngine(folder, device, threads, variant, precision)
    if precision not in ("", "fp32"):
        raise EngineError(
            f"{folder}: diffusers' pipeline is run in fp32 only, not in {precision}; without the variant diffusers "
            "our U-Net runs the folder in any"
        )
    from cmfast_train.diffusers_engine import DiffusersEngine  # diffusers takes seconds to import

    return DiffusersEngine(folder, device, threads)


def checkpoint_manifest(checkpoint: Checkpoint) -> Manifest:
    """Return the manifest of a checkpoint: what an export of it says, without the parity."""
    return Manifest(
        kind="denoiser",
        spec=checkpoint.spec,
        source={**checkpoint.source, "sha256": checkpoint.sha256()},
        made_by={"cmfast": cmfast.__version__, "torch": version("torch")},
    )


def _check(model: object, device: str, variant: str, precision: str) -> None:
    """Raise unless PyTorch, this build of it on this machine, can run a model so."""
    if device == "cuda" and not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        raise EngineError(
            f"device cuda was asked for, but PyTorch {torch.__version__} {why}; "
            "use --device cpu, or install a CUDA build of torch (pytorch.org says how)"
        )
    if variant == "diffusers":
        raise EngineError(f"{model}: diffusers runs folders that it wrote, not this file")
    if variant not in VARIANTS[device]:
        also = "; 'cuda_graph' needs --device cuda" if variant == "cuda_graph" else ""
        have = ", ".join(map(repr, VARIANTS[device]))
        raise EngineError(f"PyTorch on {device} has the variants {have}, not {variant!r}{also}")
    if precision not in ("", *PRECISIONS):
        raise EngineError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32" and device == "cpu":
        raise EngineError("precision tf32 is a GPU's way to multiply float32; use --device cuda, or --precision fp32")
    if precision in ("tf32", "bf16") and device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        raise EngineError(
            f"the {torch.cuda.get_device_name()} has no {precision} (that begins with compute capability 8.0); "
            "use --precision fp16 or fp32"
        )


def _callable(denoiser: torch.nn.Module, device: str, variant: str) -> Callable[..., Any]:
    if variant != "compiled":
        return denoiser
    # dynamic=False: one program for each batch size, which is torch.compile at its fastest.
    return compiled(denoiser) if device == "cuda" else torch.compile(denoiser, dynamic=False)


def _on_cpu(what: Hashable, compute: Compute, inputs: Inputs) -> Floats:
    """Return compute(inputs); the contract is `torch_cuda.OnCuda.__call__`."""
    with torch.inference_mode():
        # writable, which PyTorch warns of otherwise: it has no tensors that are not
        return compute({k: torch.from_numpy(np.require(v, requirements="CW")) for k, v in inputs.items()}).numpy()


def _line(err: Exception) -> str:
    return (str(err).strip().splitlines() or ["?"])[0][:300]
