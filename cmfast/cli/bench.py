# SPDX-License-Identifier: MIT
"""cmfast-bench: how fast model files sample, against each other and against eager PyTorch, and why.

Everything is checked and opened first, then outputs are compared, then times are taken (`cmfast.timing`): a wrong
answer is not timed. After the timing, and not in it, a GPU's own times and the machine's ceilings (`cmfast.roofline`)
say what the time goes to. The method is described in benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cmfast.cli._bench_contenders import Contender, Job, check_all_run, compare, open_contenders, plan
from cmfast.cli._bench_options import Options
from cmfast.cli._bench_report import draw, need_matplotlib, show
from cmfast.cli._run import run_command
from cmfast.cli._types import INTS
from cmfast.errors import CmfastError, EngineError

EPILOG = """\b
Examples:
  cmfast-bench model.onnx --baseline model.pt
  cmfast-bench model.onnx sampler.onnx --baseline model.pt --steps 2 --batch 1,8,64 --json bench.json
  cmfast-bench --baseline model.pt --compile --threads 4 --plot bench.png
  cmfast-bench model.onnx --baseline cd_imagenet64 --diffusers     a folder, by our U-Net and by diffusers
  cmfast-bench sampler.engine fp16.onnx --baseline model.pt --device cuda --variants channels_last,cuda_graph
"""

MIN_CALLS = 20  # counted, of each contender at each setting


@click.command("cmfast-bench", epilog=EPILOG)
@click.argument("models", nargs=-1, metavar="MODEL...", type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), help="Checkpoint that PyTorch runs: plain, channels_last.")
@click.option("--diffusers", is_flag=True, help="Also diffusers' own pipeline; the baseline is its folder.")
@click.option("--steps", type=INTS, default="1,2", show_default=True, help="Network calls an image.")
@click.option("--batch", type=INTS, default="1,8", show_default=True, help="Images at a time.")
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile of the baseline (a minute or more each).")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Counted time of each at each setting.")
@click.option("--threads", type=int, help="CPU threads; default: each engine's choice.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--tolerance", type=float, default=1e-3, show_default=True, help="Largest difference, pixels in [-1, 1].")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the medians to NAME.png.")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, say what would be timed, and stop.")
def command(
    models: tuple[Path, ...],
    baseline: Path | None,
    diffusers: bool,
    steps: tuple[int, ...],
    batch: tuple[int, ...],
    compiled: bool,
    seconds: float,
    threads: int | None,
    device: str,
    tolerance: float,
    json_file: Path | None,
    plot: Path | None,
    dry_run: bool,
) -> None:
    """Time sampling from each MODEL on the same noise, interleaved, after comparing the images.

    With --baseline everything is compared with eager PyTorch, else with the first MODEL. A sampler graph runs at its
    own number of steps only.
    """
    options = Options(
        models=models,
        baseline=baseline,
        diffusers=diffusers,
        steps=steps,
        batch=batch,
        compiled=compiled,
        seconds=seconds,
        threads=threads,
        device=device,
        tolerance=tolerance,
    )
    _check_outputs(json_file, plot)
    contenders = open_contenders(options)
    settings = [jobs for n in options.steps for b in options.batch if (jobs := plan(contenders, n, b))]
    _check_all_run(contenders, settings, options)
    if dry_run:
        for jobs in settings:
            click.echo(f"{jobs[0].where}: {', '.join(job.contender.name for job in jobs)}")
        click.echo(f"at least {seconds * sum(map(len, settings)):,.0f} s of timing")
        return
    record = measure(contenders, settings, options)
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
    click.echo(f"next: {_next_command(record, options)}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time, and how."""

    models: tuple[Path, ...]
    baseline: Path | None = None  # a checkpoint
    diffusers: bool = False  # also diffusers' own pipeline of the baseline
    steps: tuple[int, ...] = (1, 2)  # network calls an image
    batch: tuple[int, ...] = (1, 8)  # images at a time
    compiled: bool = False  # also torch.compile of the baseline
    seconds: float = 3.0  # counted time, of each contender at each setting
    threads: int | None = None  # of the CPU; None: the engine's choice
    device: str = "cpu"
    tolerance: float = 1e-3  # largest difference from the reference, images in [-1, 1]

    def __post_init__(self) -> None:
        from cmfast.artifact import check_model

        files = [*([self.baseline] if self.baseline else []), *self.models]
        if not files:
            raise CmfastError("nothing to time: name a MODEL or a --baseline, for example cmfast-bench model.onnx")
        for i, file in enumerate(files):
            if file.resolve() in [other.resolve() for other in files[:i]]:
                raise CmfastError(f"{file} is named twice")
            check_model(file)
        if self.baseline is not None and self.baseline.suffix == ".onnx":
            raise CmfastError(
                f"--baseline takes a checkpoint that PyTorch runs, got {self.baseline}; name it as a MODEL"
            )
        if self.diffusers and (self.baseline is None or not self.baseline.is_dir()):
            raise CmfastError("--diffusers runs the folder of --baseline: cmfast-export model.pt --format diffusers")
        if self.compiled and self.baseline is None:
            raise CmfastError("--compile compiles the checkpoint of --baseline, and none was given")
        for name, values in (("steps", self.steps), ("batch", self.batch)):
            if min(values) < 1 or len(set(values)) != len(values):
                raise CmfastError(f"--{name} takes different whole numbers from 1, got {','.join(map(str, values))}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise CmfastError(f"--seconds must be greater than 0, got {self.seconds:g}")
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise CmfastError(f"--tolerance must be greater than 0, got {self.tolerance:g}")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model file, opened one way."""

    name: str
    file: Path
    variant: str  # cmfast.engines.VARIANTS
    model: Model


@dataclass(frozen=True, kw_only=True)
class Job:
    """A contender at one setting. `call` samples a batch: numpy noise in, numpy images [B, C, H, W] out."""

    contender: Contender
    sigmas: tuple[float, ...]
    batch: int
    call: Callable[[], Floats]

    @property
    def where(self) -> str:
        return f"{len(self.sigmas)} step(s), batch {self.batch}"

    @property
    def name(self) -> str:
        return f"{self.contender.name} at {self.where}"


def open_contenders(options: Options) -> list[Contender]:
    """Open every file; the first contender is the reference. All must draw the same kind of image."""
    from cmfast.engines import open_engine
    from cmfast.model import Model

    wanted: list[tuple[str, Path, str]] = []
    if options.baseline is not None:
        also = [("compiled", options.compiled), ("diffusers", options.diffusers)]
        variants = ("", "channels_last", *(variant for variant, wanted_too in also if wanted_too))
        wanted += [("", options.baseline, variant) for variant in variants]
    same = [file.name for file in options.models]
    wanted += [(file.name if same.count(file.name) == 1 else str(file), file, "") for file in options.models]
    contenders: list[Contender] = []
    for name, file, variant in wanted:
        model = Model(open_engine(file, options.device, options.threads, variant=variant))
        first = contenders[0] if contenders else None
        if first and (model.spec.image, model.spec.classes) != (first.model.spec.image, first.model.spec.classes):
            raise CmfastError(
                f"{file} draws images {list(model.spec.image)} of {model.spec.classes} classes, {first.file} "
                f"{list(first.model.spec.image)} of {first.model.spec.classes}; only the same model can be compared"
            )
        contenders.append(Contender(name=name or model.engine.name, file=file, variant=variant, model=model))
    return sorted(contenders, key=lambda c: c.model.manifest.kind != "denoiser")  # a denoiser runs at every setting


def plan(contenders: list[Contender], steps: int, batch: int) -> list[Job]:
    """Return the jobs of one setting, the reference first: the same noise, labels and noise levels for all."""
    import numpy as np

    from cmfast.noise import gaussian

    running = [c for c in contenders if _runs(c, steps, batch)]
    if not running:
        return []
    sigmas = _levels(running, steps)
    noise = np.stack([gaussian(0, range(batch), k, contenders[0].model.spec.image) for k in range(steps)])
    label = contenders[0].model.labels(batch)

    def sampling(model: Model) -> Callable[[], Floats]:
        return lambda: model.from_noise(noise, sigmas, label)

    return [Job(contender=c, sigmas=sigmas, batch=batch, call=sampling(c.model)) for c in running]


def measure(contenders: list[Contender], settings: list[list[Job]], options: Options) -> dict[str, Any]:
    """Compare, probe, time; return the record."""
    from cmfast import timing

    # A live progress bar would redraw on the core that is being timed, so there are lines instead.
    click.echo("comparing the images", err=True)
    different = {job.name: value for jobs in settings for job, value in _compare(jobs, options.tolerance)}
    starts = []
    for contender in contenders:
        click.echo(f"starting {contender.name} in a process of its own", err=True)
        job = next(job for jobs in settings for job in jobs if job.contender is contender)
        starts.append(_start(job, options))
    before = timing.cpu_ticks()
    times: dict[str, list[float]] = {}
    for jobs in settings:
        click.echo(f"timing {jobs[0].where}: {len(jobs)} contender(s)", err=True)
        calls = {job.name: job.call for job in jobs}
        times |= timing.interleave(calls, seconds=options.seconds, calls=MIN_CALLS)
    load, steal = timing.load_average(), timing.steal_share(before, timing.cpu_ticks())
    rows = []
    for jobs in settings:
        reference = timing.summarise(times[jobs[0].name])
        for job in jobs:
            summary = timing.summarise(times[job.name])
            rows.append(
                {
                    "contender": job.contender.name,
                    "engine": job.contender.model.engine.name,
                    "steps": len(job.sigmas),
                    "sigmas": list(job.sigmas),
                    "batch": job.batch,
                    **asdict(summary),
                    "images_per_s": 1000 * job.batch / summary.median_ms,
                    "reference": jobs[0].contender.name,
                    "times_as_fast": reference.median_ms / summary.median_ms,
                    "max_abs_diff": different[job.name],
                }
            )
    values = asdict(options) | {
        "models": [file.name for file in options.models],
        "baseline": options.baseline.name if options.baseline else None,
    }
    conditions = {"load_average": load, "steal": steal, "warning": timing.noise_warning(times, load=load, steal=steal)}
    return {"what": "sample", **timing.provenance(), "options": values, **conditions, "rows": rows, "starts": starts}


def _runs(contender: Contender, steps: int, batch: int) -> bool:
    """Whether it can: a sampler has one number of steps, a graph may have one batch size (padding is not timed)."""
    model = contender.model
    return (model.manifest.kind == "denoiser" or len(model.levels()) == steps) and model.engine.batch in (None, batch)


def _levels(running: list[Contender], steps: int) -> tuple[float, ...]:
    """Return the noise levels of a setting: those that its samplers were built with, else the model's own."""
    built = {c.model.levels(): c for c in running if c.model.manifest.kind == "sampler"}
    if len(built) > 1:
        files = " and ".join(str(c.file) for c in list(built.values())[:2])
        raise CmfastError(f"{files} are samplers of {steps} step(s) at different noise levels; time them one by one")
    if built:
        return next(iter(built))
    defaults = running[0].model.spec.sigmas
    if steps not in defaults:
        have = ",".join(str(k) for k in sorted(defaults))
        raise CmfastError(f"{running[0].file} has no default noise levels for {steps} step(s); use --steps {have}")
    return running[0].model.levels(steps)


def _check_all_run(contenders: list[Contender], settings: list[list[Job]], options: Options) -> None:
    for contender in contenders:
        if any(job.contender is contender for jobs in settings for job in jobs):
            continue
        model = contender.model
        steps = len(model.levels()) if model.manifest.kind == "sampler" else options.steps[0]
        batch = model.engine.batch or options.batch[0]
        raise CmfastError(f"{contender.file} runs at none of these settings; it needs --steps {steps} --batch {batch}")


def _compare(jobs: list[Job], tolerance: float) -> Iterator[tuple[Job, float]]:
    """Yield each job with the largest difference of its images from the first job's; above tolerance: CheckFailed."""
    import numpy as np

    reference = jobs[0].call()
    for job in jobs:
        images = reference if job is jobs[0] else job.call()
        difference = float(np.abs(images - reference).max())
        if not difference <= tolerance:  # also when it is not a number
            ours, theirs = (j.contender.model.manifest.source.get("sha256") for j in (job, jobs[0]))
            why = "; it was exported from other weights" if ours and theirs and ours != theirs else ""
            raise CheckFailed(
                f"{job.name} differs from {jobs[0].contender.name} by {difference:.2e} (allowed {tolerance:g}){why}; "
                "nothing was timed; export it again, or allow for its precision with --tolerance"
            )
        yield job, difference


def _start(job: Job, options: Options) -> dict[str, Any]:
    from cmfast.artifact import model_bytes

    contender = job.contender
    request = {
        "file": str(contender.file),
        "device": options.device,
        "threads": options.threads,
        "variant": contender.variant,
        "sigmas": list(job.sigmas),
        "batch": job.batch,
    }
    # Without this torch.compile would find what this process has just compiled, and its first call would look cheap.
    cold = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    program = [sys.executable, "-P", "-m", "cmfast.cli._probe", json.dumps(request)]
    done = subprocess.run(program, capture_output=True, text=True, env=cold)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EngineError(f"{contender.name} runs in this process, but not in one of its own: {reason}")
    return {
        "contender": contender.name,
        "file": contender.file.name,
        "file_mib": model_bytes(contender.file) / 2**20,
        "kind": contender.model.manifest.kind,
        "dtype": contender.model.manifest.dtype,
        "image": list(contender.model.spec.image),
        "source": dict(contender.model.manifest.source),
        "engine": contender.model.engine.name,
        "steps": len(job.sigmas),
        "batch": job.batch,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def _next_command(record: dict[str, Any], options: Options) -> str:
    files = {file.name: file for file in options.models} | {str(file): file for file in options.models}
    exported = [row for row in record["rows"] if row["contender"] in files]
    if not exported:
        return f"cmfast-export {options.baseline}"
    best = max(exported, key=lambda row: row["times_as_fast"])
    return f"cmfast-sample {files[best['contender']]} --steps {best['steps']} -n 64 -o samples.png"


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Raise unless both can be written, before any work is done."""
    from cmfast.files import check_target

    for path, suffix in ((json_file, ".json"), (plot, ".png")):
        if path is not None and check_target(path).suffix != suffix:
            raise CmfastError(f"{path}: need a name ending in {suffix}")
    if plot is not None:
        need_matplotlib()


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
