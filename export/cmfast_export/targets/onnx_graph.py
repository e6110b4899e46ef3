# SPDX-License-Identifier: MIT
"""The targets onnx and ort-cuda: the verified graph itself, in the requested precision or the fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmfast_export.precision_search import Choice, export_graph

if TYPE_CHECKING:
    from cmfast_export.pipeline import Source
    from cmfast_export.request import Request


def write(model: Source, request: Request) -> Choice:
    """Write the graph to `request.out`. It is what will be run, so `--precision auto` may time it."""
    assert request.graph
    return export_graph(model, request.out, request.graph, timed=True)
