# SPDX-License-Identifier: MIT
"""A denoiser for ncnn, converted by pnnx from a trace, and run by ncnn before it has its name.

    OUT/model.param      the graph; its inputs are x, sigma, sigma_next of a flow map, and the conditions by name
    OUT/model.bin        the weights, float32
    OUT/manifest.json    what they compute; its graph_sha256 is the SHA-256 of model.param, then model.bin

ncnn has no batch: every call is one sample, x [*shape], sigma [1], a class one int32.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cmfast.errors import ArtifactError, CheckFailed, CmfastError, MissingDependency
from cmfast.files import atomic_folder, check_target_folder, write_text
from cmfast.formats.manifest import Input, Manifest, rounding
from cmfast.formats.selftest import record_selftest
from cmfast.model import Model
from cmfast_export._target import files_of
from cmfast_export.verify import Parity, verify

if TYPE_CHECKING:
    from cmfast.backends import Inputs
    from cmfast_export.request import Request
    from cmfast_train.checkpoint import Checkpoint
    from cmfast_train.denoiser import Denoiser

ROOM = 100  # characters of a manifest for the parity
OUTPUT = "denoised"
# What ncnn would else compute in where the processor has it.
NARROW = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage", "use_int8_inference")


@dataclass(frozen=True, kw_only=True)
class Written:
    """A folder that was written."""

    path: Path
    manifest: Manifest
    parity: Parity  # from PyTorch
    version: str  # of ncnn
    seconds: float


def check(request: Request) -> None:
    """Raise CmfastError where the folder of a request cannot be made: before the work, not after it."""
    check_target_folder(request.out, [file for path in request.inputs for file in files_of(path)])
    graph = request.graph
    assert graph
    if graph.precision != "fp32" or graph.weights:
        raise CmfastError("ncnn's files are written in float32; leave --precision and --weights out")
    if graph.batch not in (None, 1):
        raise CmfastError(f"ncnn runs one sample at a time, got --batch {graph.batch}; leave it out")
    if graph.device != "cpu":
        raise CmfastError("ncnn's files are verified on the CPU: leave --device out")
    import_ncnn()


def import_ncnn() -> tuple[Any, Path]:
    """Return the module ncnn and pnnx's program."""
    try:
        return import_module("ncnn"), Path(import_module("pnnx").EXEC_PATH)
    except ModuleNotFoundError as err:
        raise MissingDependency("writing ncnn's files", str(err.name), "ncnn") from None


def write(model: Checkpoint | Denoiser, request: Request) -> Written:
    """Write the folder `request.out`.

    Raises:
        CmfastError: pnnx or ncnn lacks what the network needs.
        CheckFailed: ncnn computes something else than PyTorch; no folder was written.
    """
    from cmfast_train.backends.pytorch import TorchBackend

    begun, (ncnn, pnnx) = time.perf_counter(), import_ncnn()
    reference = TorchBackend(model)
    manifest = reference.manifest
    for condition in manifest.spec.conditions:
        if condition.dynamic:
            raise CmfastError(f"the condition {condition.name} has sizes that vary, and an ncnn graph has fixed ones")
    atol = rounding("float32", "cpu") if request.tolerance is None else request.tolerance
    made_by = {**manifest.made_by, "ncnn": version("ncnn"), "pnnx": version("pnnx"), "verified": "ncnn cpu"}
    manifest = replace(manifest, made_by=made_by, selftest=record_selftest(Model(reference), atol)).fitting(ROOM)
    with atomic_folder(request.out) as folder:
        param, weights = _converted(pnnx, reference.denoiser, manifest, folder / "scratch")
        (folder / "model.param").write_text(param, encoding="ascii")
        (folder / "model.bin").write_bytes(weights)
        manifest = replace(manifest, graph_sha256=hashlib.sha256(param.encode() + weights).hexdigest())
        (parity,) = verify(NcnnBackend(ncnn, folder, manifest), [reference])
        if failure := parity.failure(atol):
            raise CheckFailed(f"ncnn {failure}; no folder was written")
        manifest = replace(manifest, parity=parity.to_dict()).fitting()
        write_text(folder / "manifest.json", manifest.to_json() + "\n")
    return Written(
        path=request.out, manifest=manifest, parity=parity, version=version("ncnn"),
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


class NcnnBackend:
    """A folder of this target, run on the CPU in float32, sample by sample."""

    batch: int | None = None

    def __init__(self, ncnn: Any, folder: Path, manifest: Manifest) -> None:
        """Open a folder whose manifest was read."""
        self.manifest, self.name = manifest, "ncnn cpu"
        self._ncnn, self._net = ncnn, ncnn.Net()
        for option in NARROW:
            setattr(self._net.opt, option, False)
        self._net.opt.use_vulkan_compute = False
        self._net.opt.num_threads = 1  # on a busy machine its threads wait for each other, spinning
        _check_layers(ncnn, (folder / "model.param").read_text(encoding="ascii"))
        if self._net.load_param(str(folder / "model.param")) or self._net.load_model(str(folder / "model.bin")):
            raise ArtifactError(f"{folder}: ncnn {version('ncnn')} cannot read its files")

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Evaluate the graph for each sample in turn; as `cmfast.backends.Backend.run`."""
        count = len(inputs["x"])
        return np.stack([self._one({name: values[i] for name, values in inputs.items()}) for i in range(count)])

    def _one(self, inputs: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        run = self._net.create_extractor()
        for name, value in inputs.items():
            array = np.atleast_1d(np.asarray(value))
            array = array.astype(np.int32 if array.dtype.kind == "i" else np.float32)
            run.input(name, self._ncnn.Mat(np.ascontiguousarray(array)).clone())  # Mat borrows the memory
        status, out = run.extract(OUTPUT)
        if status:  # then there may be no output to look at
            raise CmfastError(f"ncnn could not run the graph (status {status})")
        found = np.array(out, np.float32)
        if found.size != np.prod(self.manifest.spec.shape):
            raise CmfastError(f"ncnn returned {list(found.shape)}, expected is {list(self.manifest.spec.shape)}")
        return found.reshape(self.manifest.spec.shape)


def _converted(pnnx: Path, denoiser: Denoiser, manifest: Manifest, scratch: Path) -> tuple[str, bytes]:
    """Return the text of model.param and the bytes of model.bin; scratch: a folder for pnnx, removed."""
    import torch

    scratch.mkdir()
    names = [each.name for each in manifest.inputs]
    examples = [_example(each) for each in manifest.inputs]
    _trace(denoiser, names, examples).save(str(scratch / "model.pt"))
    kinds = {torch.float32: "f32", torch.int64: "i64"}
    shapes = ",".join(f"[{','.join(map(str, each.shape))}]{kinds[each.dtype]}" for each in examples)
    command = [str(pnnx), "model.pt", f"inputshape={shapes}", "fp16=0"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace")
    param, weights = scratch / "model.ncnn.param", scratch / "model.ncnn.bin"
    if done.returncode or not param.is_file() or not weights.is_file():
        said = (done.stderr + done.stdout).strip().splitlines()
        raise CmfastError(f"pnnx could not convert the network (exit status {done.returncode}): {said[-1:] or ''}")
    found = named(param.read_text(encoding="ascii"), names), weights.read_bytes()
    shutil.rmtree(scratch)
    return found


def named(param: str, inputs: Sequence[str]) -> str:
    """Return the text of a .param with blobs in0, in1, .. and out0 under the names of inputs and output."""
    words = {f"in{index}": name for index, name in enumerate(inputs)} | {"out0": OUTPUT}
    magic, counts, *layers = param.splitlines()
    lines = [magic, counts]
    for layer in layers:
        kind, name, of_inputs, of_outputs, *rest = layer.split()
        count = int(of_inputs) + int(of_outputs)
        blobs = [words.get(blob, blob) for blob in rest[:count]]
        lines.append(" ".join([f"{kind:<24}", f"{name:<24}", of_inputs, of_outputs, *blobs, *rest[count:]]))
    return "\n".join(lines) + "\n"


def _check_layers(ncnn: Any, param: str) -> None:
    """Raise CmfastError where pnnx left operators that ncnn has no layer for: it would crash or skip them."""
    kinds = {line.split()[0] for line in param.splitlines()[2:]}
    if lacking := sorted(kind for kind in kinds if ncnn.layer_to_index(kind) < 0):
        raise CmfastError(f"ncnn {version('ncnn')} has no layer for {', '.join(lacking)} of this network")


def _trace(denoiser: Denoiser, names: Sequence[str], examples: Sequence[Any]) -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    class Sliced(TorchFunctionMode):
        """Tensor.narrow as a slice: pnnx 20261020 leaves it, and ncnn has no layer for it."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.narrow and not kwargs:
                x, dim, start, length = args
                return x[(slice(None),) * dim + (slice(start, start + length),)]
            return func(*args, **(kwargs or {}))

    class Call(torch.nn.Module):
        """A denoiser whose inputs have places instead of names."""

        def __init__(self) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.denoiser(**dict(zip(names, values, strict=True)))
            return result

    with torch.no_grad(), Sliced(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the checks of shapes, which are fixed here
        return torch.jit.trace(Call().eval(), tuple(examples), check_trace=False)


def _example(given: Input) -> Any:
    """Return an input of one sample, in the shape and type that the graph is traced with."""
    import torch

    shape = [1 if side == "batch" else int(side) for side in given.shape]
    return torch.zeros(shape, dtype=torch.int64) if given.dtype == "int64" else torch.ones(shape)
