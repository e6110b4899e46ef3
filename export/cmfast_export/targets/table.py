# SPDX-License-Identifier: MIT
"""The table of targets: what `cmfast-export --format NAME` can write. Start reading here.

A target of ours is a module beside this one and a row here. One of another package is the same module there, and its
row is found by an entry point of the group "cmfast.targets": NAME = "package.module:ROW".

A writer is named by its place, package.module:function, and imported when it is used:

    def write(file: Path, request: Request) -> object     # needs="graph": a verified ONNX file
    def write(model: Checkpoint, request: Request) -> object     # needs="model"

It writes `request.out` (`cmfast.files.atomic_file` and `atomic_folder` never leave half of it) and returns what was
found, which `report` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from cmfast.checks import shown
from cmfast.errors import CmfastError
from cmfast.formats.manifest import KINDS
from cmfast.formats.table import ENGINE, ONNX, OPENVINO, ORT

GROUP = "cmfast.targets"  # of entry points


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target: what it is called, what writes it, and which options it takes.

    Attributes:
        name: of `--format`.
        writer: place of the function that writes it.
        suffixes: of the file that it writes, the usual one first; (): it writes a folder.
        needs: what the writer gets: "graph", a verified ONNX file, or "model", the checkpoint or denoiser (of a target
            that takes files also the path of one).
        kinds: graphs that it can be made from, the default first; (): none, so no option of a graph applies.
        takes_files: whether it is also made from an exported ONNX file.
        takes_engines: whether it is also made from engines, several together.
        options: place of a frozen dataclass whose fields `flag` sets, NAME=VALUE; "": it has no options.
        flag: --build, how it is made, or --serve, how it is served.
        caches: whether `--cache` applies.
        automatic: whether `--precision auto` applies.
        int8: whether `--precision int8` applies.
        flavour: of the graph, one of `cmfast_export.FLAVOURS`.
        check: place of a function that gets the request and raises CmfastError before the work; "": none.
        report: place of a function that gets what the writer returned and the request, and prints; "": one line.
    """

    name: str
    writer: str
    suffixes: tuple[str, ...] = ()
    needs: str = "graph"
    kinds: tuple[str, ...] = KINDS
    takes_files: bool = True
    takes_engines: bool = False
    options: str = ""
    flag: str = "--build"
    caches: bool = False
    automatic: bool = True
    int8: bool = False
    flavour: str = ""
    check: str = ""
    report: str = ""


_HERE = "cmfast_export.targets"
_REPORT = "cmfast_export.report"
TARGETS = (
    Target(
        name="onnx", writer=f"{_HERE}.onnx_graph:write", suffixes=ONNX.suffixes, needs="model", takes_files=False,
        int8=True, report=f"{_REPORT}:onnx",
    ),
    Target(
        name="ort-cuda", writer=f"{_HERE}.onnx_graph:write", suffixes=ONNX.suffixes, needs="model", takes_files=False,
        automatic=False, flavour="ort-cuda", report=f"{_REPORT}:onnx",
    ),
    Target(
        name="engine", writer=f"{_HERE}.tensorrt_engine:write", suffixes=ENGINE.suffixes,
        options=f"{_HERE}.tensorrt_options:BuildOptions", caches=True, check=f"{_HERE}.tensorrt_engine:check",
        report=f"{_REPORT}:engine",
    ),
    Target(
        name="openvino", writer=f"{_HERE}.openvino_ir:write", suffixes=OPENVINO.suffixes, needs="model",
        automatic=False, check=f"{_HERE}.openvino_ir:check", report=f"{_REPORT}:openvino",
    ),
    Target(
        name="triton", writer=f"{_HERE}.triton_repository:write", kinds=("server",), takes_engines=True,
        options=f"{_HERE}.triton_config:ServeOptions", flag="--serve", check=f"{_HERE}.triton_repository:check",
        report=f"{_REPORT}:repository",
    ),
    Target(
        name="ort", writer=f"{_HERE}.ort_format:write", suffixes=ORT.suffixes, kinds=("denoiser", "sampler"),
        automatic=False, check=f"{_HERE}.ort_format:check", report=f"{_REPORT}:ort_format",
    ),
    Target(
        name="web", writer=f"{_HERE}.web.page:write", kinds=("denoiser", "sampler"), automatic=False,
        options=f"{_HERE}.web.runtime:WebOptions", check=f"{_HERE}.web.page:check", report=f"{_REPORT}:page",
    ),
    Target(
        name="ncnn", writer=f"{_HERE}.ncnn.folder:write", needs="model", kinds=("denoiser",), takes_files=False,
        automatic=False, check=f"{_HERE}.ncnn.folder:check", report=f"{_REPORT}:ncnn",
    ),
    Target(
        name="cmfast", writer=f"{_HERE}.checkpoint:write", suffixes=(".pt", ".safetensors"), needs="model", kinds=(),
        takes_files=False, report=f"{_REPORT}:checkpoint",
    ),
    Target(
        name="diffusers", writer=f"{_HERE}.diffusers_folder:write", needs="model", kinds=(), takes_files=False,
        report=f"{_REPORT}:folder",
    ),
)  # fmt: skip
NAMES = tuple(target.name for target in TARGETS)


def find_target(name: str) -> Target:
    """Return the target of this name: one of ours, else one that an installed package offers.

    Raises:
        CmfastError: there is none, or what a package offers is no `Target`.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    from importlib.metadata import entry_points  # slow to import, and our own do without

    for entry in entry_points(group=GROUP, name=name):
        found = entry.load()
        if not isinstance(found, Target) or found.name != name:
            raise CmfastError(f"the entry point {name} of {GROUP}: need a Target of that name, got {shown(found)}")
        return found
    others = sorted(entry.name for entry in entry_points(group=GROUP))
    raise CmfastError(f"--format must be one of {', '.join([*NAMES, *others])}, got {shown(name)}")


def at(place: str) -> Any:
    """Return the function or class at package.module:name, imported now."""
    return resolve_name(place)
