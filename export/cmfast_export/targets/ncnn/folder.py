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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmfast.backends.ncnn import backend
from cmfast.backends.ncnn.backend import OUTPUT, SIZES, NcnnBackend, check_graph, sizes
from cmfast.errors import CheckFailed, CmfastError, MissingDependency
from cmfast.files import atomic_folder, check_target_folder, write_text
from cmfast.formats.manifest import Input, Manifest, rounding
from cmfast.formats.ncnn_folder import MANIFEST
from cmfast.formats.selftest import record_selftest
from cmfast.model import Model
from cmfast_export._target import files_of
from cmfast_export.verify import Parity, verify

if TYPE_CHECKING:
    from cmfast_export.request import Request
    from cmfast_train.checkpoint import Checkpoint
    from cmfast_train.denoiser import Denoiser

ROOM = 100  # characters of a manifest for the parity
FEW_PIXELS = 64  # of an 8x8 image
NO_WINOGRAD = "31=64"  # bits of a layer's feature mask
WHAT = "writing ncnn's files"


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
    ncnn = backend.import_ncnn(WHAT)
    try:
        return ncnn, Path(import_module("pnnx").EXEC_PATH)
    except ModuleNotFoundError as err:
        raise MissingDependency(WHAT, str(err.name), "ncnn") from None


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
        check_graph(ncnn, request.out, param, manifest.inputs)
        (folder / "model.bin").write_bytes(weights)
        param = tuned(ncnn, param, folder / "model.bin", manifest)
        (folder / "model.param").write_text(param, encoding="ascii")
        manifest = replace(manifest, graph_sha256=hashlib.sha256(param.encode() + weights).hexdigest())
        write_text(folder / MANIFEST, manifest.to_json() + "\n")
        # One thread: on a busy machine ncnn's wait for each other, spinning.
        (parity,) = verify(NcnnBackend(folder / "model.param", threads=1), [reference])
        if failure := parity.failure(atol):
            raise CheckFailed(f"ncnn {failure}; no folder was written")
        manifest = replace(manifest, parity=parity.to_dict()).fitting()
        write_text(folder / MANIFEST, manifest.to_json() + "\n")
    return Written(
        path=request.out, manifest=manifest, parity=parity, version=version("ncnn"),
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


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
    found = named(param.read_text(encoding="ascii"), manifest.inputs), weights.read_bytes()
    shutil.rmtree(scratch)
    return found


def named(param: str, inputs: Sequence[Input]) -> str:
    """Return the text of a .param with blobs in0, in1, .. and out0 under their names, and the sizes of the inputs."""
    words = {f"in{index}": each.name for index, each in enumerate(inputs)} | {"out0": OUTPUT}
    sides = {each.name: sizes(each.shape[1:] or [1]) for each in inputs}
    magic, counts, *layers = param.splitlines()
    lines = [magic, counts]
    for layer in layers:
        kind, name, of_inputs, of_outputs, *rest = layer.split()
        count = int(of_inputs) + int(of_outputs)
        blobs = [words.get(blob, blob) for blob in rest[:count]]
        more = sides[blobs[0]] if kind == "Input" else rest[count:]
        lines.append(" ".join([f"{kind:<24}", f"{name:<24}", of_inputs, of_outputs, *blobs, *more]))
    return "\n".join(lines) + "\n"


def tuned(ncnn: Any, param: str, weights: Path, manifest: Manifest) -> str:
    """Return the text of a .param that computes the same and runs faster, by the sizes that one run has.

    * A Reshape gets them in numbers. With pnnx's expression "0w,0h,0d,0n" it took 6 ms in ncnn 1.0.20261020, more than
      all convolutions around it.
    * A convolution of few pixels is computed without Winograd's algorithm, which saves products and reads up to seven
      times the weights: with two threads, a network of 7.7M weights took 10 % and one of 43M 15 % less.
    """
    magic, counts, *layers = param.splitlines()
    rows = [layer.split() for layer in layers]
    net = backend.new_net(ncnn, threads=1)
    if net.load_param_mem(param) or net.load_model(str(weights)):
        raise CmfastError(f"ncnn {version('ncnn')} cannot read what pnnx wrote")
    zeros = {each.name: np.zeros(example_shape(each), each.dtype)[0] for each in manifest.inputs}
    run = backend.begun(ncnn, net, zeros)
    run.set_light_mode(False)  # keep all blobs
    for row in rows:
        kind, name, first = row[0], row[1], 4 + int(row[2])  # the blobs of a row: what it takes, what it makes
        loose = kind == "Reshape" and any(word.startswith("6=") for word in row)
        if not loose and kind != "Convolution":
            continue
        status, found = run.extract(row[first])
        if status:
            raise CmfastError(f"ncnn could not run the graph up to {name} (status {status})")
        if loose:
            sides = {0: found.w, 1: found.h, 11: found.d, 2: found.c}
            row[first + 1 :] = sizes([sides[key] for key in reversed(SIZES[found.dims])])
        elif found.w * found.h <= FEW_PIXELS:
            row.append(NO_WINOGRAD)
    return "\n".join([magic, counts, *(" ".join(row) for row in rows)]) + "\n"


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

    shape = example_shape(given)
    return torch.zeros(shape, dtype=torch.int64) if given.dtype == "int64" else torch.ones(shape)


def example_shape(given: Input) -> list[int]:
    """Return the shape of an input of one sample."""
    return [1 if side == "batch" else int(side) for side in given.shape]
