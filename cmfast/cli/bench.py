# SPDX-License-Identifier: MIT
"""cmfast-bench: how fast model files sample, against each other and against eager PyTorch, and why.

Everything is checked and opened first, then outputs are compared, then times are taken (`cmfast.bench.timing`): a wrong
answer is not timed. After the timing, and not in it, a GPU's own times and the machine's ceilings
(`cmfast.bench.roofline`) say what the time goes to. A contender that fails is named with its setting
(`cmfast.bench.failures`). The method is described in benchmarks/README.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cmfast.bench.contenders import Agreed, Contender, Job, check_all_run, compare, open_contenders, plan
from cmfast.bench.failures import Failures, LeftOut
from cmfast.bench.options import Options
from cmfast.bench.report import draw, need_matplotlib, show
from cmfast.bench.turns import Budget, Times, time_setting
from cmfast.cli.parameters import INTS
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError, EngineError

EPILOG = """\b
Examples:
  cmfast-bench model.onnx --baseline model.pt
  cmfast-bench model.onnx sampler.onnx --baseline model.pt --steps 2 --batch 1,8,64 --json bench.json
  cmfast-bench --baseline model.pt --compile --threads 4 --plot bench.png
  cmfast-bench model.onnx --baseline cd_imagenet64 --diffusers     a folder, by our U-Net and by diffusers
  cmfast-bench sampler.engine fp16.onnx --baseline model.pt --device cuda --variants channels_last,cuda_graph
"""

INCLUDED = {  # what the numbers of a record stand for
    "median_ms": "host wall time from numpy noise to numpy images, transfers in and out included",
    "device_times": "medians over calls after the timing, each call the sum of the engine's runs in it; host_ms and "
    "enqueue_ms, which begins with the arrays in page-locked memory, by the host's clock, the rest between CUDA events",
    "flops": "operations of the call: convolutions and matrix products, of all steps and images",
    "floor_ms": "the larger of operations over the measured matrix rate and bytes over the measured bandwidth",
    "of_roofline": "floor_ms / median_ms",
    "alone": "timed after the others and not in turns with them, beside whom the device's memory was short",
}


def _names(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the names of a list with commas; of an empty one none, and None where the option was not given."""
    return None if value is None else tuple(name for name in value.split(",") if name)


@click.command("cmfast-bench", epilog=EPILOG)
@click.argument("models", nargs=-1, metavar="MODEL...", type=click.Path(path_type=Path))
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="Checkpoint that PyTorch runs, plain and in variants."
)
@click.option(
    "--precision", metavar="NAME,..", callback=_names, help="Of the baseline, besides fp32; default: MODELs'."
)
@click.option(
    "--variants",
    metavar="NAME,..",
    callback=_names,
    help="Also: channels_last (default), fused, compiled, reduce-overhead, cuda_graph, 'channels_last cuda_graph', "
    "'fused cuda_graph' of the baseline; cuda_graph, nhwc, 'nhwc cuda_graph', tensorrt of an .onnx file.",
)
@click.option("--diffusers", is_flag=True, help="Also diffusers' own pipeline; the baseline is its folder.")
@click.option("--steps", type=INTS, default="1,2", show_default=True, help="Network calls an image.")
@click.option("--batch", type=INTS, default="1,8", show_default=True, help="Images at a time.")
@click.option("--compile", "compiled", is_flag=True, help="Also the variant compiled (a minute or more each).")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Counted time of each at each setting.")
@click.option("--budget", type=float, help="Seconds for everything, shared among the settings; default: no limit.")
@click.option("--starts/--no-starts", default=True, show_default=True, help="Start each in a process of its own too.")
@click.option("--threads", type=int, help="CPU threads; default: each engine's choice.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--tolerance", type=float, help="Largest difference, pixels in [-1, 1]; default: 0.001, more below float32."
)
@click.option("--keep-going", is_flag=True, help="Leave out, and name in the record, what fails or differs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the medians to NAME.png.")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, say what would be timed, and stop.")
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

    With --baseline everything is compared with eager PyTorch in fp32, and in speed also with eager PyTorch in the same
    precision; else with the first MODEL. A sampler graph runs at its own number of steps only.
    """
    options = Options(
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
    _check_outputs(json_file, plot, [*models, *([baseline] if baseline else [])])
    failures = Failures(options)
    contenders = open_contenders(options, failures)
    planned = (plan(contenders, n, b, keep_going=keep_going) for n in options.steps for b in options.batch)
    settings = [jobs for jobs in planned if jobs]
    check_all_run(contenders, settings, options)
    failures.check_some_are_left(settings)
    if dry_run:
        for jobs in settings:
            click.echo(f"{jobs[0].where}: {', '.join(job.contender.name for job in jobs)}")
        least = min(seconds * sum(map(len, settings)), budget or math.inf)
        click.echo(f"at least {least:,.0f} s of timing")
        return
    record = measure(contenders, settings, options, failures)
    show(record)
    if json_file is not None:
        from cmfast.files import write_text

        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if plot is not None:
        draw(record, plot)
        click.echo(f"the chart is in {plot}")
    if record["warning"]:
        click.echo(f"warning: {record['warning']}")
    click.echo(f"next: {_next_command(record, contenders, options)}")


def measure(
    contenders: list[Contender], settings: list[list[Job]], options: Options, failures: Failures
) -> dict[str, Any]:
    """Compare, probe, time, ask the devices; return the record."""
    from cmfast.bench import diagnosis as analysis
    from cmfast.bench import timing

    # A live progress bar would redraw on the core that is being timed, so there are lines instead.
    budget = Budget(options.budget)
    click.echo("comparing the images", err=True)
    agreed = [setting for jobs in settings if (setting := _compared(jobs, options, failures, budget))]
    # In place: nobody is to hold the memory of those that run nowhere.
    settings[:] = [[each.job for each in setting] for setting in agreed]
    contenders[:] = [c for c in contenders if any(job.contender is c for jobs in settings for job in jobs)]
    failures.check_some_are_left(settings)
    # Without a budget first: what does not start is not worth timing. With one last, in what is left.
    starts = [] if options.budget else _starts(contenders, settings, options, failures, budget)
    before = timing.cpu_ticks()
    times = Times()
    timed = []
    for i, setting in enumerate(agreed):
        seconds = budget.left() / (len(agreed) - i)
        if not seconds:
            failures.no_time([each.job for each in setting], options.budget or 0)
        elif left := time_setting(setting, options, failures, times, seconds):
            timed.append(left)
    load, steal = timing.load_average(), timing.steal_share(before, timing.cpu_ticks())
    failures.check_some_are_left(timed)
    costs = {c.name: cost for c, cost in zip(contenders, analysis.costs(contenders), strict=True)}
    dtypes = {c.dtype for c in contenders if costs[c.name]}
    ceilings = analysis.measure_ceilings(dtypes, options.device, options.threads) if budget.left() else {}
    if options.budget:
        starts = _starts(contenders, settings, options, failures, budget)
    rows = []
    for setting in timed:
        for each, row in zip(setting, _rows(setting, times), strict=True):
            name, contender = each.job.name, each.job.contender
            cost, ceiling = costs[contender.name], ceilings.get(contender.dtype)
            rows.append(row | analysis.explain(each.job, row["median_ms"], times.on_device.get(name), cost, ceiling))
    values = asdict(options) | {
        "models": [file.name for file in options.models],
        "baseline": options.baseline.name if options.baseline else None,
    }
    conditions = {
        "load_average": load,
        "steal": steal,
        "warning": timing.noise_warning(times.calls_ms, load=load, steal=steal),
    }
    return {
        "what": "sample",
        **timing.provenance(),
        "options": values,
        **conditions,
        "included": INCLUDED,
        "ceilings": [asdict(each) for each in ceilings.values()],
        "rows": rows,
        "starts": starts,
        "left_out": [asdict(each) for each in failures.left_out],
    }


def _compared(jobs: list[Job], options: Options, failures: Failures, budget: Budget) -> list[Agreed]:
    """Return the jobs of one setting that may be timed; none where --budget has been used up by the settings before."""
    if budget.left():
        return compare(jobs, options.tolerance, failures)
    failures.no_time(jobs, options.budget or 0)
    return []


def _starts(
    contenders: list[Contender], settings: list[list[Job]], options: Options, failures: Failures, budget: Budget
) -> list[dict[str, Any]]:
    """Return what each contender costs to start: none without --starts, and with --budget as many as it allows.

    With keep_going one that does not start there is timed all the same: a GPU's memory may be short in a second process
    because of what all contenders hold in this one. With --budget all have been timed already.
    """
    starts: list[dict[str, Any]] = []
    longest = 0.0
    for contender in contenders if options.starts else ():
        begun = budget.left()
        if begun <= longest:
            why = f"no time was left of --budget {options.budget:g} s"
            failures.note(LeftOut(contender=contender.name, what="start", why=why))
            continue
        click.echo(f"starting {contender.name} in a process of its own", err=True)
        job = next(job for jobs in settings for job in jobs if job.contender is contender)
        try:
            starts.append(_start(job, options))
        except EngineError as err:
            if not (options.keep_going or options.budget):
                raise
            failures.note(LeftOut(contender=contender.name, what="start", why=str(err)))
        if options.budget:
            longest = max(longest, begun - budget.left())
    return starts


def _rows(setting: list[Agreed], times: Times) -> Iterator[dict[str, Any]]:
    """Yield the rows of one setting, as far as they are about its times."""
    from cmfast.bench import timing

    jobs = [each.job for each in setting]
    medians = {job.name: timing.summarise(times.calls_ms[job.name]).median_ms for job in jobs}
    eager = {job.contender.dtype: job for job in jobs if job.contender.eager}
    for each in setting:
        job, dtype = each.job, each.job.contender.dtype
        median, same = medians[job.name], eager.get(dtype)
        yield {
            "contender": job.contender.name,
            "engine": job.contender.model.engine.name,
            "variant": job.contender.variant,
            "dtype": dtype,
            "steps": len(job.sigmas),
            "sigmas": list(job.sigmas),
            "batch": job.batch,
            **asdict(timing.summarise(times.calls_ms[job.name])),
            "images_per_s": 1000 * job.batch / median,
            "reference": jobs[0].contender.name,
            "times_as_fast": medians[jobs[0].name] / median,
            "reference_same_precision": same and same.contender.name,
            "times_as_fast_same_precision": same and medians[same.name] / median,
            "max_abs_diff": each.difference,
            "tolerance": each.allowed,
            "alone": job.name in times.alone,
        }


def _start(job: Job, options: Options) -> dict[str, Any]:
    from cmfast.formats.table import model_bytes

    contender = job.contender
    request = {
        "file": str(contender.file),
        "device": options.device,
        "threads": options.threads,
        "variant": contender.variant,
        "precision": contender.precision,
        "sigmas": list(job.sigmas),
        "batch": job.batch,
    }
    # Without this torch.compile would find what this process has just compiled, and its first call would look cheap.
    cold = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    program = [sys.executable, "-P", "-m", "cmfast.bench.probe", json.dumps(request)]
    done = subprocess.run(program, capture_output=True, text=True, env=cold)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EngineError(
            f"{contender.name} runs in this process, but not in one of its own: {reason}; --keep-going does without it"
        )
    return {
        "contender": contender.name,
        "file": contender.file.name,
        "file_mib": model_bytes(contender.file) / 2**20,
        "kind": contender.model.manifest.kind,
        "dtype": contender.model.manifest.dtype,
        "image": list(contender.model.spec.image),
        "source": dict(contender.model.manifest.source),
        "engine": contender.model.engine.name,
        "variant": contender.variant,
        "steps": len(job.sigmas),
        "batch": job.batch,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def _next_command(record: dict[str, Any], contenders: list[Contender], options: Options) -> str:
    exported = {c.name: c for c in contenders if c.file in options.models}
    rows = [row for row in record["rows"] if row["contender"] in exported]
    if not rows:
        return f"cmfast-export {options.baseline}"
    best = max(rows, key=lambda row: row["times_as_fast"])
    winner = exported[best["contender"]]
    how = " --device cuda" if options.device == "cuda" else ""
    how += f" --variant {winner.variant}" if winner.variant else ""
    return f"cmfast-sample {winner.file} --steps {best['steps']}{how} -n 64 -o samples.png"


def _check_outputs(json_file: Path | None, plot: Path | None, inputs: list[Path]) -> None:
    """Raise unless both can be written, before any work is done, and neither is what is read."""
    from cmfast.files import check_outputs

    check_outputs({"--json": json_file, "--plot": plot}, inputs=inputs)
    for path, suffix in ((json_file, ".json"), (plot, ".png")):
        if path is not None and path.suffix.lower() != suffix:
            raise CmfastError(f"{path}: need a name ending in {suffix}")
    if plot is not None:
        need_matplotlib()


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
