# SPDX-License-Identifier: MIT
"""The files that contenders open: those that were passed, and the denoisers that are exported from the checkpoint.

The exporter is the command cmfast-export in a process of its own: the runtime does not import it, and its memory is
gone before anything is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from cmfast.bench.failures import LeftOut, Say
from cmfast.bench.fastest import is_same_model, ncnn_beside
from cmfast.bench.suite.request import SuiteRequest
from cmfast.bench.suite.ways import CHECKPOINT, FLOAT, INT8, NCNN
from cmfast.errors import BackendError, CmfastError, one_line
from cmfast.formats.manifest import INT8 as INT8_WORDS
from cmfast.formats.table import NCNN as NCNN_FORMAT
from cmfast.formats.table import format_of, read_manifest

# Of what is exported. The folder for ncnn comes last: "auto" finds it beside model.onnx.
NAMES = {FLOAT: "model.onnx", INT8: "model_int8.onnx", NCNN: "model_ncnn"}
OPTIONS = {FLOAT: (), INT8: ("--precision", "int8"), NCNN: ("--format", "ncnn")}
NEEDS = {INT8: "int8", NCNN: "fp32"}  # exported only for contenders of this precision
WORDS = {FLOAT: "in float32", INT8: "in int8", NCNN: "for ncnn"}
EXPORTER = "cmfast-export"
_RUN = (
    "import sys; from importlib.metadata import entry_points; "
    "(command,) = entry_points(group='console_scripts', name='cmfast-export'); "
    "sys.argv[0] = 'cmfast-export'; sys.exit(command.load()())"
)


def files_of(request: SuiteRequest, folder: Path, say: Say) -> tuple[dict[str, Path], list[LeftOut]]:
    """Return the files by kind (`ways`), and what there is no file for.

    Args:
        request: names the checkpoint and the exported files that there are.
        folder: where missing ones are exported to; one that is there already is taken.
        say: gets a line for each export.

    Raises:
        CmfastError: a MODEL is no denoiser in float32 or int8, two are of a kind, or an export failed.
    """
    files = given_files(request)
    missing = list[LeftOut]()
    for kind in NAMES:
        if kind in files or (kind in NEEDS and NEEDS[kind] not in request.precision):
            continue
        found = folder / NAMES[kind]
        if not found.exists():
            try:
                _export(request, found, kind, say)
            except BackendError as err:
                if kind == FLOAT and request.baseline and exporter_is_installed() and not request.keep_going:
                    raise
                why, beside = str(err), ncnn_beside(files[FLOAT]) if kind == NCNN and FLOAT in files else None
                if beside:
                    why = f"{beside.parent.name} is damaged or of another model; delete it, or export it again"
                missing.append(LeftOut(contender=f"every way to run {NAMES[kind]}", what="export", why=why))
                continue
        files[kind] = found
    return files, missing


def given_files(request: SuiteRequest) -> dict[str, Path]:
    """Return the files that were passed, by kind, and the folder for ncnn of the same model beside one of them.

    It is the one that "auto" tries, too.

    Raises CmfastError as `files_of` does.
    """
    files = {} if request.baseline is None else {CHECKPOINT: request.baseline}
    for file in request.models:
        manifest = read_manifest(file)
        ncnn = format_of(file) is NCNN_FORMAT
        if manifest.kind != "denoiser" or manifest.dtype != "float32":
            raise CmfastError(
                f"{file} is a {manifest.kind} in {manifest.dtype}; --suite takes denoisers in float32 or int8: "
                "cmfast-export model.pt"
            )
        kind = NCNN if ncnn else INT8 if INT8_WORDS in manifest.made_by else FLOAT
        if kind in files:
            raise CmfastError(f"{file} and {files[kind]} are both {WORDS[kind]}; remove one")
        files[kind] = file
    wanted = FLOAT in files and NCNN not in files and NEEDS[NCNN] in request.precision
    if wanted and (graph := ncnn_beside(files[FLOAT])) and is_same_model(graph, files[FLOAT]):
        files[NCNN] = graph.parent
    return files


def exporter_is_installed() -> bool:
    """Whether cmfast-export can be run."""
    from importlib.metadata import entry_points

    return bool(entry_points(group="console_scripts", name=EXPORTER)) and find_spec("onnx_ir") is not None


def names_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the names of the files for a record, which does not say in which folders they are."""
    return {kind: file.name for kind, file in files.items()}


def _export(request: SuiteRequest, path: Path, kind: str, say: Say) -> None:
    if request.baseline is None:
        raise BackendError("there is no such file and no checkpoint to export; pass it as a MODEL, or add --baseline")
    if kind == NCNN and find_spec("ncnn") is None:
        raise BackendError("ncnn is not installed: pip install 'cmfast[ncnn]'")
    if not exporter_is_installed():
        raise BackendError("cmfast-export is not installed: pip install 'cmfast[export]'; or pass the file as a MODEL")
    say(f"exporting {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-P", "-c", _RUN, os.fspath(request.baseline), "-o", os.fspath(path), *OPTIONS[kind]]
    done = subprocess.run(program, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BackendError(f"the export failed: {one_line(why.removeprefix('cmfast-export: '), 500)}")
