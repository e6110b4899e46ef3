# SPDX-License-Identifier: MIT
"""A model repository of Triton Inference Server, from files of kind "server". Triton is not needed.

    OUT/NAME/config.pbtxt    OUT/NAME/1/model.onnx, or model.plan, or a plan for each GPU: model_sm89.plan ...

Triton batches along the first axis of everything and of nothing else, so a server graph (`graphs.server`) takes noise
[B, K, C, H, W] and label [B, 1] and gives images [B, C, H, W]. One request is one call: K steps are inside.
What the files say of themselves is read by `triton_files`, config.pbtxt is written by `triton_config`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast.conditions import Condition
from cmfast.errors import CmfastError
from cmfast.files import atomic_folder, check_target_folder
from cmfast.formats.manifest import Manifest, check_file
from cmfast_export._target import writing
from cmfast_export.targets.triton_config import (
    DEFAULTS,
    EXAMPLE,
    MOST_CHARACTERS,
    ServeOptions,
    check_name,
    config_text,
    largest_batch,
)
from cmfast_export.targets.triton_files import Served, read_served

if TYPE_CHECKING:
    from cmfast_export.request import Request


@dataclass(frozen=True, kw_only=True)
class Written:
    """A repository that was written, and what whoever serves it and asks it must know."""

    path: Path  # of the repository: tritonserver --model-repository
    name: str  # of the model, as clients ask for it
    manifest: Manifest
    backend: str  # onnxruntime or tensorrt
    max_batch: int  # images in one request, at most
    batch: int | None  # the only number of images a request may have, of a file with a fixed batch; Triton batches none
    tensorrt: str | None  # version of TensorRT that built the plans; the server must have the same
    capabilities: tuple[str, ...]  # compute capabilities of the GPUs that it runs on, AMPERE among them; empty: any
    arguments: tuple[str, ...]  # what tritonserver needs besides the repository


def write_repository(
    out: str | os.PathLike[str], models: Sequence[str | os.PathLike[str]], options: ServeOptions = DEFAULTS
) -> Written:
    """Write a model into the repository `out`, a new one or one that has others, and return what was written.

    The files are copied. A model of the same name is left alone: CmfastError.

    Args:
        models: files of kind "server": one .onnx, or TensorRT plans of it, each for other compute capabilities
    """
    files = [check_file(path) for path in models]
    served = read_served(files)
    name = model_name(files[0].stem, options)
    max_batch = largest_batch(served, options)
    check_repository(Path(out), name)
    with writing(out):
        check_repository(Path(out), name)  # what another export wrote meanwhile
        _write(Path(os.path.realpath(out)), name, served, config_text(name, served, max_batch, options))
    return Written(
        path=Path(out),
        name=name,
        manifest=served.manifest,
        backend=served.backend,
        max_batch=max_batch,
        batch=served.batch,
        tensorrt=served.tensorrt,
        capabilities=tuple(served.plans),
        arguments=served.arguments,
    )


def write(model: Path, request: Request) -> Written:
    """Write the repository of a request; `model` is a file of kind server."""
    assert isinstance(request.options, ServeOptions)
    return write_repository(request.out, [model, *request.engines], request.options)


def check(request: Request) -> None:
    """Raise CmfastError where the repository of a request cannot be written."""
    assert isinstance(request.options, ServeOptions)
    check_repository(request.out, model_name(request.name, request.options))


def _write(repository: Path, name: str, served: Served, config: str) -> None:
    """Write a model into a repository, whose path has no links: of "." and of a link, what stands beside it is beside.

    It is put together there: Triton takes every folder in a repository for a model, hidden ones and what a killed run
    left too.
    """
    is_new = not repository.exists()
    with atomic_folder(repository if is_new else repository / name, within=repository.parent) as folder:
        model = folder / name if is_new else folder
        version = model / "1"
        for source, place in served.files:
            (version / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, version / place)
        (model / "config.pbtxt").write_text(config, encoding="utf-8")


def model_name(stem: str, options: ServeOptions = DEFAULTS) -> str:
    """Return what a model is called: as the options say, else its file's name as far as Triton allows it.

    Args:
        stem: the name of its file without folder and suffix; of a model that is a folder the folder's name
    """
    return options.name or re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_")[:MOST_CHARACTERS] or "model"


def check_repository(out: Path, name: str) -> None:
    """Raise CmfastError unless a model of this name can be written into `out`: before the export, not after it.

    `out` may be no folder yet, an empty one, or a model repository; what is hidden in it does not count.
    """
    check_name(name)
    if not out.exists():
        check_target_folder(out)
        return
    if not out.is_dir():
        raise CmfastError(f"{out} exists and is not a folder; name another")
    if not os.access(out, os.W_OK | os.X_OK):
        raise CmfastError(f"cannot write into {out}: no permission; name another folder")
    if os.path.lexists(out / name):
        raise CmfastError(
            f"{out} has {name} already; give this model another name, --serve name=NAME, or remove {out / name}"
        )
    models = [entry for entry in sorted(out.iterdir()) if not entry.name.startswith(".")]
    strangers = [entry.name for entry in models if not (entry / "config.pbtxt").is_file()]
    if strangers:
        raise CmfastError(f"{out} is not a model repository: {strangers[0]} in it is not a model; name another folder")
    repository = Path(os.path.realpath(out))
    for why, is_so in (
        (f"{out} is a file system of its own", os.path.ismount(repository)),
        (f"{repository.parent} is not writable", not os.access(repository.parent, os.W_OK)),
    ):
        if is_so:
            raise CmfastError(
                f"a model is put together beside the repository and moved into it when it is whole, but {why}; "
                f"write a new repository and move the model from there: -o new, then mv new/{name} {out}"
            )


def client_example(written: Written) -> str:
    """Return a Python script that draws from the server the images that cmfast-sample draws from the file."""
    spec, n = written.manifest.spec, written.batch or min(4, written.max_batch)
    (steps,) = spec.sigmas
    one = f"gaussian(0, range({n}), step, {tuple(spec.shape)})"  # of seed 0
    image = spec.data == "image"
    axes = "C, H, W" if image else "..."
    lines = [
        "import numpy as np",
        "import tritonclient.grpc as triton  # pip install 'tritonclient[grpc]'",
        "from cmfast import gaussian, save_images" if image else "from cmfast import gaussian",
        *(["from cmfast.noise import labels"] if spec.classes else []),
        *(["from cmfast.sampling import to_uint8"] if image else []),
        "",
        f"noise = np.stack([{one} for step in range({steps})], axis=1)  # [B, K, {axes}]",
        'inputs = [triton.InferInput("noise", noise.shape, "FP32").set_data_from_numpy(noise)]',
    ]
    for each in spec.conditions:
        if each.name != "label":
            lines += _condition_lines(each, n)
            continue
        lines += [
            f"label = labels(0, range({n}), {spec.classes})[:, None]  # [B, 1], from 0 to {spec.classes - 1}",
            'inputs += [triton.InferInput("label", label.shape, "INT64").set_data_from_numpy(label)]',
        ]
    lines += [
        f'answer = triton.InferenceServerClient("localhost:8001").infer("{written.name}", inputs)',
        'save_images("images.png", to_uint8(answer.as_numpy("images")))'
        if image
        else 'np.save("samples.npy", answer.as_numpy("samples"))',
    ]
    return "\n".join(lines) + "\n"


def _condition_lines(condition: Condition, n: int) -> list[str]:
    """Return lines that pass zeros as a condition, to be replaced by the user's values."""
    if condition.kind == "class":
        shape, dtype, kind, what = [n, 1], "int64", "INT64", f"[B, 1], from 0 to {condition.classes - 1}"
    else:
        sides = [EXAMPLE if isinstance(side, str) else side for side in condition.shape] or [1]
        shape, dtype, kind, what = [n, *sides], "float32", "FP32", f"[{', '.join(map(str, ('B', *condition.shape)))}]"
    name = condition.name
    return [
        f"{name} = np.zeros({shape}, np.{dtype})  # {what}: your values",
        f'inputs += [triton.InferInput("{name}", {name}.shape, "{kind}").set_data_from_numpy({name})]',
    ]
