# SPDX-License-Identifier: MIT
"""cmfast-bench: how fast model files sample, against each other and against eager PyTorch, and why.

This module parses and prints; `cmfast.bench` does the work.
"""

from __future__ import annotations

import functools
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmfast.cli.parameters import INTS, MODEL
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError

if TYPE_CHECKING:
    from cmfast.bench.comparison import Prepared
    from cmfast.bench.record import Record

EPILOG = """\b
Examples:
  cmfast-bench model.onnx --baseline model.pt
  cmfast-bench model.onnx sampler.onnx --baseline model.pt --steps 2 --batch 1,8,64 --json bench.json
  cmfast-bench model.onnx --baseline model.pt --variants openvino --precision bf16     on a CPU, also in bfloat16
  cmfast-bench --baseline model.pt --compile --threads 4 --plot bench.png
  cmfast-bench model.onnx --baseline cd_imagenet64 --diffusers     by cmfast's U-Net and by diffusers
  cmfast-bench sampler.engine fp16.onnx --baseline model.pt --device cuda --variants channels_last,cuda_graph
"""


def _names(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the names in a comma-separated list; None: the option was not given."""
    return None if value is None else tuple(name for name in value.split(",") if name)


@click.command("cmfast-bench", epilog=EPILOG)
@click.argument("models", nargs=-1, metavar="MODEL...", type=MODEL)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Checkpoint that PyTorch runs: the reference for outputs and speed.",
)
@click.option(
    "--precision",
    metavar="NAME,..",
    callback=_names,
    help="Extra precisions for the baseline and for OpenVINO; default: those of the MODELs.",
)
@click.option(
    "--variants",
    metavar="NAME,..",
    callback=_names,
    help="Other ways to run. Baseline: channels_last (default), fused, compiled, reduce-overhead, cuda_graph, "
    "'channels_last cuda_graph', 'fused cuda_graph'. An .onnx file: openvino, 'openvino throughput', cuda_graph, nhwc, "
    "'nhwc cuda_graph', tensorrt.",
)
@click.option("--diffusers", is_flag=True, help="Also time diffusers' own pipeline; the baseline is its folder.")
@click.option("--steps", type=INTS, default="1,2", show_default=True, help="Network calls per image.")
@click.option("--batch", type=INTS, default="1,8", show_default=True, help="Images per call.")
@click.option("--compile", "compiled", is_flag=True, help="Also time torch.compile (a minute or more each).")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Timing per contender and setting.")
@click.option("--budget", type=float, help="Limit in seconds for everything, shared by the settings.")
@click.option("--starts/--no-starts", default=True, show_default=True, help="Also measure start-up, in new processes.")
@click.option("--threads", type=int, help="CPU threads; default: the backend's choice.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--tolerance",
    type=float,
    help="Largest difference allowed, pixels in [-1, 1]; default: 0.001, more below float32.",
)
@click.option("--keep-going", is_flag=True, help="Leave out and record what fails or differs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the medians to this .png file.")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything and list what would be timed.")
def command(
    models: tuple[Path, ...],
    baseline: Path | None,
    precision: tuple[str, ...] | None,
    variants: tuple[str, ...] | None,
    diffusers: bool,
    steps: tuple[int, ...],
    batch: tuple[int, ...],
    compiled: bool,
    seconds: float,
    budget: float | None,
    starts: bool,
    threads: int | None,
    device: str,
    tolerance: float | None,
    keep_going: bool,
    json_file: Path | None,
    plot: Path | None,
    dry_run: bool,
) -> None:
    """Time sampling from each MODEL on the same noise, interleaved, after comparing the images.

    With --baseline, everything is compared with eager PyTorch in fp32, and in speed also with eager PyTorch in the same
    precision; otherwise with the first MODEL. A sampler graph runs at its own number of steps only.
    """
    from cmfast.bench.comparison import measure, prepare
    from cmfast.bench.report import draw, show
    from cmfast.bench.request import Request

    request = Request(
        models=models,
        baseline=baseline,
        precision=precision,
        variants=variants,
        diffusers=diffusers,
        steps=steps,
        batch=batch,
        compiled=compiled,
        seconds=seconds,
        budget=budget,
        starts=starts,
        threads=threads,
        device=device,
        tolerance=tolerance,
        keep_going=keep_going,
    )
    _check_outputs(json_file, plot, request.files)
    prepared = prepare(request, functools.partial(click.echo, err=True))
    if dry_run:
        for jobs in prepared.settings:
            click.echo(f"{jobs[0].where}: {', '.join(job.contender.name for job in jobs)}")
        least = min(seconds * sum(map(len, prepared.settings)), budget or math.inf)
        click.echo(f"at least {least:,.0f} s of timing")
        return
    record = measure(prepared)
    show(record)
    if json_file is not None:
        record.save(json_file)
        click.echo(f"the record is in {json_file}")
    if plot is not None:
        draw(record, plot)
        click.echo(f"the chart is in {plot}")
    if record.warning:
        click.echo(f"warning: {record.warning}")
    click.echo(f"next: {_next_command(record, prepared)}")


def _next_command(record: Record, prepared: Prepared) -> str:
    from cmfast.conditions import sample_arguments

    request = prepared.request
    exported = {c.name: c for c in prepared.contenders if c.file in request.models}
    rows = [row for row in record.rows if row.contender in exported]
    if not rows:
        return f"cmfast-export {request.baseline}"
    best = max(rows, key=lambda row: row.times_as_fast)
    winner = exported[best.contender]
    how = " --device cuda" if request.device == "cuda" else ""
    how += f" --variant {shlex.quote(winner.variant)}" if winner.variant else ""
    how += f" --precision {winner.precision}" if winner.precision else ""
    given = sample_arguments(winner.model.spec.conditions, winner.model.spec.data)
    return f"cmfast-sample {winner.file} --steps {best.steps}{how} -n 64{given}"


def _check_outputs(json_file: Path | None, plot: Path | None, inputs: list[Path]) -> None:
    """Raise CmfastError, before any work is done, if an output cannot be written or is an input."""
    from cmfast.files import check_outputs

    check_outputs({"--json": json_file, "--plot": plot}, inputs=inputs)
    for path, suffix in ((json_file, ".json"), (plot, ".png")):
        if path is not None and path.suffix.lower() != suffix:
            raise CmfastError(f"{path}: need a name ending in {suffix}")
    if plot is not None:
        from cmfast.bench.report import need_matplotlib

        need_matplotlib()


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
