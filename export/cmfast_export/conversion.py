# SPDX-License-Identifier: MIT
"""A request carried out: the model is read, a graph made where the target needs one, and the target written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cmfast.files import temporary_folder
from cmfast_export._target import writing
from cmfast_export.precision_search import Choice, export_graph
from cmfast_export.request import Request
from cmfast_export.targets.table import at
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.denoiser import Denoiser
from cmfast_train.from_factory import own_model
from cmfast_train.importers import load_model
from cmfast_train.importers.facts import Given


def convert(request: Request, seen: Callable[[Choice], object] = lambda _: None) -> object:
    """Fulfil a request; return what the target's writer found.

    Args:
        request: the request.
        seen: gets the graph that a target is made from, verified, before the target is written.

    Raises:
        CmfastError: the request cannot be fulfilled.
        CheckFailed: what was written differs from PyTorch; it has been removed.
    """
    with writing(request.out):
        request.check_out()  # what another export wrote meanwhile
        write = at(request.target.writer)
        if request.target.needs == "model":
            exported = request.target.takes_files and request.graph is None
            return write(request.model if exported else _model(request), request)
        with _graph(request, seen) as file:
            return write(file, request)


@contextmanager
def _graph(request: Request, seen: Callable[[Choice], object]) -> Iterator[Path]:
    """Give the verified graph that a target is made from: the given file, or one exported for now."""
    if request.graph is None:
        yield request.model
        return
    # Beside a repository, also where that is ".": Triton takes what is in it for models.
    with temporary_folder(os.path.realpath(request.out)) as folder:
        file = folder / f"{request.name}.onnx"  # a repository's model is called so
        found = export_graph(_model(request), file, request.graph, timed=request.graph.device == "cuda")
        seen(found)
        yield file


def _model(request: Request) -> Checkpoint | Denoiser:
    given = Given.parse(request.assignments)
    if request.own:
        weights = request.model if request.own.weights else None
        return own_model(request.own.factory, request.own.spec, weights, given)
    return load_model(request.model, request.source, given)
