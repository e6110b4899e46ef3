# SPDX-License-Identifier: MIT
"""One export in a process of its own, and the seconds of its parts: what export_time.py starts.

    python benchmarks/export_parts.py cmfast model.pt model.onnx 0
    python benchmarks/export_parts.py torch model.pt model.onnx 0

The last argument is the moment when the process was started, seconds of the system's monotonic clock. What is printed
is JSON: {part: [wall seconds, CPU seconds]}.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class Parts:
    """Seconds by part: each moment counts for the innermost part that it is in.

    Args:
        started: when the process was started, `time.monotonic`.
    """

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._names, self._last = ["start and imports"], (started, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block for a part."""
        self._count()
        self._names.append(name)
        try:
            yield
        finally:
            self._count()
            self._names.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, whose calls count for a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def _count(self) -> None:
        now = (time.monotonic(), time.process_time())
        spent = self.seconds.setdefault(self._names[-1], [0.0, 0.0])
        for index in (0, 1):
            spent[index] += now[index] - self._last[index]
        self._last = now


def by_cmfast(parts: Parts, model: Path, out: Path) -> None:
    """Export as cmfast-export does."""
    from click.testing import CliRunner

    from cmfast_export.graphs.garbage import uncollected

    atexit.register(gc.freeze)  # this and the pause are the command's own
    with uncollected():
        from cmfast_export import cli, pipeline
        from cmfast_export.checking import Check
        from cmfast_export.graphs import denoiser, writer

    with contextlib.ExitStack() as patches:
        for home, name, part in (
            (pipeline, "load_model", "read"),
            (pipeline, "TorchBackend", "read"),
            (denoiser, "trace", "trace, by torch.export"),
            (denoiser, "translate", "ONNX, by torch.onnx"),
            (denoiser, "finish", "fold"),
            (pipeline, "_cost", "fold"),
            (writer, "write_with_manifest", "write"),
            (pipeline, "graph_sha256", "write"),
            (writer, "seal", "write"),
            (Check, "__call__", "verify"),
            (pipeline, "record_selftest", "verify"),
        ):
            patches.enter_context(mock.patch.object(home, name, parts.timed(part, getattr(home, name))))
        with parts.part("the rest"):
            CliRunner().invoke(cli.command, [str(model), "-o", str(out)], catch_exceptions=False, standalone_mode=False)


def by_torch(parts: Parts, model: Path, out: Path) -> None:
    """Export by torch.onnx.export alone, with its defaults and a dynamic batch; nothing is verified."""
    import torch

    from cmfast_train.importers import load_model

    class Plain(torch.nn.Module):
        """The denoiser with its inputs by position, of which torch.export can make the batch dynamic."""

        def __init__(self, denoiser: torch.nn.Module) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> Any:
            return self.denoiser(x, sigma, label=label)

    with parts.part("read"):
        denoiser = load_model(model).denoiser()
    inputs = (torch.zeros(2, *denoiser.spec.shape), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    batch = {0: torch.export.Dim("B", max=2**20)}
    trace = parts.timed("trace, by torch.export", torch.export.export)
    with parts.part("ONNX, by torch.onnx"), mock.patch("torch.export.export", trace):
        program = torch.onnx.export(
            Plain(denoiser).eval(),
            inputs,
            input_names=["x", "sigma", "label"],
            output_names=["denoised"],
            dynamic_shapes=(batch, batch, batch),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    with parts.part("write"):
        program.save(out)


def main() -> None:
    """Run one export."""
    way, model, out, started = sys.argv[1:]
    parts = Parts(float(started))
    with contextlib.redirect_stdout(sys.stderr):
        (by_cmfast if way == "cmfast" else by_torch)(parts, Path(model), Path(out))
    with parts.part(""):  # what came before it is counted
        pass
    print(json.dumps({name: each for name, each in parts.seconds.items() if name}))


if __name__ == "__main__":
    main()
