# SPDX-License-Identifier: MIT
"""cmfast-bench: how fast model files sample, against each other and against eager PyTorch, and why.

This module parses and prints; `cmfast.bench` does the work.
"""

from __future__ import annotations

import contextlib
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
    from collections.abc import Callable

    from cmfast.bench.comparison import Prepared
    from cmfast.bench.record import Record
    from cmfast.bench.suite.record import SuiteRecord
    from cmfast.bench.suite.request import SuiteRequest

EPILOG = """\b
Examples:
  cmfast-bench model.onnx --baseline model.pt
  cmfast-bench model.onnx sampler.onnx --baseline model.pt --steps 2 --batch 1,8,64 --json bench.json
  cmfast-bench model.onnx --baseline model.pt --variants openvino --precision bf16     on a CPU, also in bfloat16
  cmfast-bench --baseline model.pt --compile --threads 4 --plot bench.png
  cmfast-bench model.onnx --baseline cd_imagenet64 --diffusers     by cmfast's U-Net and by diffusers
  cmfast-bench --suite cpu --baseline model.pt --json suite.json --plot suite.png     every way to run it on this CPU
  cmfast-bench --suite cpu --baseline model.pt --threads 1,2 --batch 1,8,64 --processes 1,2 --keep files
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
    "--suite",
    type=click.Choice(["cpu"]),
    help="Time one network call of every way to run the model on this CPU; .onnx files that are no MODEL are exported.",
)
@click.option(
    "--precision",
    metavar="NAME,..",
    callback=_names,
    help="Extra precisions for the baseline and for OpenVINO; default: those of the MODELs. With --suite: fp32, bf16, "
    "int8; default: all.",
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
@click.option(
    "--steps",
    type=INTS,
    default="1,2",
    show_default=True,
    help="Network calls per image. With --suite: those of 1,2,4 that the model has noise levels for.",
)
@click.option("--batch", type=INTS, default="1,8", show_default=True, help="Images per call.")
@click.option("--compile", "compiled", is_flag=True, help="Also time torch.compile (a minute or more each).")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Timing per contender and setting.")
@click.option("--budget", type=float, help="Limit in seconds for everything, shared by the settings.")
@click.option("--starts/--no-starts", default=True, show_default=True, help="Also measure start-up, in new processes.")
@click.option(
    "--threads",
    type=INTS,
    help="CPU threads; default: the backend's choice. With --suite: one number or several; default: all cores.",
)
@click.option("--processes", type=INTS, help="With --suite: also so many processes at a time, with cores of their own.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --suite: folder for the exported files; what it has is not exported again.",
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path),
    help="With --suite: a record of cmfast-eval --json, whose Frechet distances --plot shows.",
)
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
@click.pass_context
def command(
    context: click.Context,
    models: tuple[Path, ...],
    baseline: Path | None,
    suite: str | None,
    precision: tuple[str, ...] | None,
    variants: tuple[str, ...] | None,
    diffusers: bool,
    steps: tuple[int, ...],
    batch: tuple[int, ...],
    compiled: bool,
    seconds: float,
    budget: float | None,
    starts: bool,
    threads: tuple[int, ...] | None,
    processes: tuple[int, ...] | None,
    keep: Path | None,
    evaluations: tuple[Path, ...],
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

    With --suite cpu, the contenders are PyTorch, ONNX Runtime and OpenVINO in all their ways on a CPU, in float32,
    bfloat16 and int8, and ncnn, as far as they are installed; MODELs are .onnx denoisers in float32 and int8 and a
    folder for ncnn.
    """
    _check_options(context, suite)
    if suite:
        from cmfast.bench.suite.request import SuiteRequest
        from cmfast.bench.suite.ways import PRECISIONS

        by_default = context.get_parameter_source("steps") == click.core.ParameterSource.DEFAULT
        whole = SuiteRequest(
            models=models,
            baseline=baseline,
            precision=PRECISIONS if precision is None else precision,
            diffusers=diffusers,
            compiled=compiled,
            steps=None if by_default else steps,
            batch=batch,
            threads=threads or (),
            processes=processes or (),
            seconds=seconds,
            starts=starts,
            keep=keep,
            evaluations=evaluations,
            keep_going=keep_going,
        )
        _run_suite(whole, json_file, plot, dry_run=dry_run)
        return
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
        threads=threads[0] if threads else None,
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
    if json_file is not None:
        record.save(json_file)
    show(record)
    command = functools.partial(_next_command, record, prepared)
    _keep(record, json_file, functools.partial(draw, record), plot, command)


def _check_options(context: click.Context, suite: str | None) -> None:
    """Raise CmfastError for options that the suite does not take, or that only it takes."""
    given = {
        name for name in context.params if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT
    }
    if suite:
        if wrong := sorted(given & {"variants", "budget", "tolerance"}):
            raise CmfastError(f"--suite {suite} takes no --{wrong[0]}; remove it")
        if context.params["device"] != "cpu":
            raise CmfastError(f"--suite {suite} measures a CPU; remove --device {context.params['device']}")
        return
    if wrong := sorted(given & {"processes", "keep", "evaluations"}):
        raise CmfastError(
            f"--{wrong[0].removesuffix('s') if wrong[0] == 'evaluations' else wrong[0]} needs --suite cpu"
        )
    if len(context.params["threads"] or ()) > 1:
        raise CmfastError("--threads takes several numbers with --suite cpu only; pass one")


def _run_suite(request: SuiteRequest, json_file: Path | None, plot: Path | None, *, dry_run: bool) -> None:
    from cmfast.bench.suite.show import draw, show
    from cmfast.bench.suite.suite import planned, run_suite

    _check_outputs(json_file, plot, [*request.files, *request.evaluations])
    if dry_run:
        ways = planned(request)
        click.echo(f"one network call each: {', '.join(way.name for way in ways)}")
        cells = len(request.batch) * len(request.every_threads)
        click.echo(f"at least {request.seconds * len(ways) * cells:,.0f} s of timing")
        return
    record = run_suite(request, functools.partial(click.echo, err=True))
    if json_file is not None:
        record.save(json_file)
    show(record)
    _keep(record, json_file, functools.partial(draw, record), plot, functools.partial(_next_of_suite, record))
    record.raise_failure()


def _next_of_suite(record: SuiteRecord) -> str:
    """Return the command that samples by the fastest contender that keeps 50 dB."""
    from cmfast.bench.suite.files import OPTIONS, given_files
    from cmfast.bench.suite.ways import WAYS

    first, request = record.calls[0], record.request
    ways = {way.name: way for way in WAYS if not way.plain}
    rows = [row for row in record.calls if (row.threads, row.batch) == (first.threads, first.batch)]
    rows = [row for row in rows if row.contender in ways]
    if not rows:
        return f"cmfast-info {shlex.quote(str(request.files[0]))}"
    close = [row for row in rows if min(row.decibels.values()) >= 50]
    way = ways[min(close or rows, key=lambda row: row.wall_median_ms).contender]
    how = f" --variant {shlex.quote(way.variant)}" if way.variant else ""
    how += f" --precision {way.precision}" if way.precision != "fp32" else ""
    how += f" --tolerance-db {way.tolerance_db:g}" if way.tolerance_db else ""
    given, name, made = given_files(request).get(way.file), record.files[way.file], ""
    path = given or (request.keep or Path()) / name
    if given is None and request.keep is None:  # it was exported into a temporary folder
        options = " ".join(OPTIONS[way.file])
        made = f"cmfast-export {shlex.quote(str(request.baseline))} {options} -o {name} && ".replace("  ", " ")
    sample = f"cmfast-sample {shlex.quote(str(path))}{how} --threads {first.threads} -n 64{record.sample_arguments}"
    return made + sample


def _keep(
    record: Record | SuiteRecord,
    json_file: Path | None,
    draw: Callable[[Path], None],
    plot: Path | None,
    command: Callable[[], str],
) -> None:
    """Say where a record is, write its chart, then print the record's warning and the command that comes next."""
    if json_file is not None:
        click.echo(f"the record is in {json_file}")
    if plot is not None:
        draw(plot)
        click.echo(f"the chart is in {plot}")
    if record.warning:
        click.echo(f"warning: {record.warning}")
    with contextlib.suppress(CmfastError):  # a file is no longer there
        click.echo(f"next: {command()}")


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
