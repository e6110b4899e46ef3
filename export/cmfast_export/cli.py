# SPDX-License-Identifier: MIT
"""cmfast-export: the command. torch is imported after the arguments have been understood."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cmfast.checks import MAX_BATCH
from cmfast.cli.parameters import FLOATS, SET, SOURCE
from cmfast.cli.running import needs, run_command
from cmfast.errors import CmfastError
from cmfast.files import check_target, check_target_folder, temporary_folder
from cmfast.formats.manifest import PRECISIONS, check_model
from cmfast.formats.table import ENGINE, ONNX, all_suffixes, format_of
from cmfast_export import OPSETS, report
from cmfast_export._options import (
    check_steps,
    check_tolerance,
    parse_options,
    shorten,
    whole_number,
)
from cmfast_export._target import files_of, writing

EPILOG = """\b
Examples:
  cmfast-export model.pt                                        model.onnx: the denoiser, any noise level
  cmfast-export model.pt --kind sampler --steps 2 -o two.onnx   the whole loop in one graph
  cmfast-export model.pt --precision fp16                       model_fp16.onnx: half precision, for GPUs
  cmfast-export model.pt --format ort-cuda --precision fp16     for ONNX Runtime's CUDA provider
  cmfast-export model.pt --format engine --kind sampler --steps 2 --precision fp16      TensorRT
  cmfast-export model.onnx --format engine --build batch=1,16,256 --target 8.9,12.0     TensorRT-RTX, for other cards
  cmfast-export model.pt --format triton --steps 2 -o repository                        Triton Inference Server
  cmfast-export l4.engine h100.engine --format triton -o repository                     an engine a kind of card
  cmfast-export cd_imagenet64_l2.pt                             OpenAI's, known by its name
  cmfast-export ema.pt --source openai --set image_size=64 --set head_channels=64 --set scaling=boundary
  cmfast-export diffusers-ct_imagenet64                         a diffusers folder
  cmfast-export edm-cifar10-32x32-uncond-vp.pkl --format cmfast -o teacher.pt
  cmfast-export model.pt --format diffusers -o folder           and back
"""

SUFFIXES = {
    "onnx": ONNX.suffixes,
    "ort-cuda": ONNX.suffixes,
    "engine": ENGINE.suffixes,
    "triton": (),
    "cmfast": (".pt", ".safetensors"),
    "diffusers": (),  # a folder may be called anything
}
GRAPHS = ("onnx", "ort-cuda", "engine", "triton")
FLAVOURED = ("ort-cuda",)  # formats that are flavours of the graph


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    checkpoint: Path
    others: tuple[Path, ...]  # engines for other cards
    out: Path
    form: str
    graph: dict[str, Any]  # arguments of export_onnx: kind, steps, sigmas, batch, opset, tolerance, device, flavour
    precision: str
    build: tuple[str, ...]  # NAME=VALUE
    cache: Path | None
    serve: tuple[str, ...]
    source: str
    assignments: tuple[str, ...]

    @property
    def told(self) -> str:
        """What was said of a foreign file, as one would type it again."""
        words = [f"--source {self.source}"] * bool(self.source) + [f"--set {text}" for text in self.assignments]
        return " ".join(words)


@click.command("cmfast-export", epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("others", nargs=-1, metavar="[ENGINE]...", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="What to write; default: a name beside CHECKPOINT.")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(SUFFIXES)),
    default="onnx",
    show_default=True,
    help="onnx: a graph; ort-cuda: one for ONNX Runtime's CUDA provider; engine: TensorRT's; triton: a model "
    "repository; cmfast: a checkpoint; diffusers: its folder.",
)
@click.option(
    "--kind",
    type=click.Choice(["denoiser", "sampler", "server"]),
    help="One call of f(x, sigma); the whole few-step loop; the loop with the batch first, for servers.  [denoiser]",
)
@click.option("--steps", type=int, help="Sampler: network calls, at the model's default noise levels; default: 1.")
@click.option("--sigmas", type=FLOATS, help="Sampler: noise levels (data units), decreasing, instead of --steps.")
@click.option("--batch", default="dynamic", show_default=True, help="A number, or dynamic.")
@click.option("--opset", type=int, help="ONNX opset, 18 to 23; default: 18, for bf16 22.")
@click.option(
    "--precision",
    type=click.Choice([*PRECISIONS, "auto"]),
    default="fp32",
    show_default=True,
    help="Of the network's trunk; auto: the fastest inside --tolerance.",
)
@click.option(
    "--tolerance", type=float, help="Largest difference from float32 PyTorch; default: by precision and device."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the graph is run to check it, and timed for auto.",
)
@click.option("--target", help="Engine by TensorRT-RTX: compute capabilities, for example 8.9,12.0; default: all.")
@click.option(
    "--build", multiple=True, metavar="NAME=VALUE", help="Engine: batch=1,8,64, library, level, workspace_mib, ..."
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    envvar="CMFAST_CACHE",
    help="Engine: keep engines in this folder, found by content; default: $CMFAST_CACHE.",
)
@click.option(
    "--serve", multiple=True, metavar="NAME=VALUE", help="Triton: max_batch, queue_delay_us, instances, device, name."
)
@SOURCE
@SET
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be written and stop.")
def command(
    checkpoint: Path,
    others: tuple[Path, ...],
    out: Path | None,
    form: str,
    kind: str | None,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    batch: str,
    opset: int | None,
    precision: str,
    tolerance: float | None,
    device: str,
    target: str | None,
    build: tuple[str, ...],
    cache: Path | None,
    serve: tuple[str, ...],
    source: str,
    assignments: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Export CHECKPOINT and prove that what was written computes the same.

    CHECKPOINT is a cmfast model (.pt, .safetensors), OpenAI's, the first public implementation's or EDM's weights, or a
    diffusers folder; for engines and Triton also a verified .onnx file; for Triton also engines, one a kind of card.
    cmfast-info says what a file is.
    """
    check_model(checkpoint)
    if others and not (form == "triton" and format_of(checkpoint) is ENGINE):
        raise CmfastError(f"{others[0]}: one file at a time; several engines can be put into one --format triton")
    of_graph = (kind, steps, sigmas, opset)
    graph_asked = any(value is not None for value in of_graph) or (batch, precision) != ("dynamic", "fp32")
    if form not in GRAPHS and (graph_asked or tolerance is not None):
        raise CmfastError(
            f"--kind, --steps, --sigmas, --batch, --opset, --precision and --tolerance are for graphs, not for {form}"
        )
    ready = format_of(checkpoint) is not None  # a graph already
    if ready and form not in ("engine", "triton"):
        raise CmfastError(f"{checkpoint}: exported already; --format engine or --format triton takes it further")
    if ready and (graph_asked or source or assignments):
        raise CmfastError(f"{checkpoint}: exported already, so its kind and precision are in it; export the checkpoint")
    asks = click.get_current_context().get_parameter_source
    if (build or target is not None or asks("cache") is ParameterSource.COMMANDLINE) and form != "engine":
        raise CmfastError(f"--build, --target and --cache are for --format engine, not for {form}")
    if serve and form != "triton":
        raise CmfastError(f"--serve is for --format triton, not for {form}")
    if form == "triton" and kind not in (None, "server"):
        raise CmfastError(f"--format triton serves files of kind server, not {kind}; leave --kind out")
    if form in FLAVOURED and precision == "auto":
        raise CmfastError(f"--precision auto is not supported with --format {form}; pass --precision fp16")
    kind = kind or ("server" if form == "triton" else "denoiser")
    out = out or _default_out(checkpoint, form, kind, precision)
    for file in others:
        check_model(file)
    _check_out(out, (checkpoint, *others), form)
    size = _batch(batch)
    _check_numbers(steps, sigmas, opset)
    check_tolerance(tolerance)
    request = Request(
        checkpoint=checkpoint,
        others=others,
        out=out,
        form=form,
        graph={
            "kind": kind, "steps": steps, "sigmas": sigmas, "batch": size,
            "opset": opset, "tolerance": tolerance, "device": device,
            "flavour": form if form in FLAVOURED else "",
        },
        precision=precision,
        build=(*build, *([f"target={target}"] if target is not None else [])),
        cache=cache,
        serve=serve,
        source=source,
        assignments=assignments,
    )  # fmt: skip
    _check_options(request)
    if dry_run:
        what = f"{kind}, {precision}, batch {batch}" if form in GRAPHS and not ready else form
        click.echo(f"would write {out}: {what}")
        return
    with writing(out):
        _check_out(out, (checkpoint, *others), form)  # what another export wrote meanwhile
        WRITERS[form](request)


def _write_checkpoint(request: Request) -> None:
    model = _load(request)
    from cmfast_train.checkpoint import save_checkpoint

    save_checkpoint(model, request.out)
    click.echo(f"{request.out}: a cmfast checkpoint of {request.checkpoint}\nnext: cmfast-export {request.out}")


def _write_diffusers(request: Request) -> None:
    model = _load(request)
    from cmfast_export.targets.diffusers_folder import export_diffusers

    report.folder(export_diffusers(model, request.out), model.spec)


def _write_onnx(request: Request) -> None:
    start = time.perf_counter()
    exported = _export(request, request.out, timed=True)
    report.onnx(exported, time.perf_counter() - start, request.checkpoint, request.told)


def _write_engine(request: Request) -> None:
    from cmfast_export.targets.tensorrt_engine import build_engine
    from cmfast_export.targets.tensorrt_options import BuildOptions

    options = parse_options(BuildOptions, "--build", request.build)
    with _graph(request) as onnx:
        tolerance = request.graph["tolerance"]
        built = build_engine(onnx, request.out, options, cache=request.cache, tolerance=tolerance)
    report.engine(built, request.checkpoint, request.told)


def _write_triton(request: Request) -> None:
    from cmfast_export.targets.triton_config import ServeOptions
    from cmfast_export.targets.triton_repository import client_example, write_repository

    options = parse_options(ServeOptions, "--serve", request.serve)
    with _graph(request) as file:
        written = write_repository(request.out, [file, *request.others], options)
    report.repository(written, client_example(written))


def _check_options(request: Request) -> None:
    """Refuse what engines and repositories do not take, before the work of exporting."""
    with needs("cmfast-export", "export,cpu"):
        if request.form == "engine":
            from cmfast_export.targets.tensorrt_engine import check_build
            from cmfast_export.targets.tensorrt_options import BuildOptions

            options = parse_options(BuildOptions, "--build", request.build)
            check_build(options, request.out, request.cache, [request.checkpoint])
        elif request.form == "triton":
            from cmfast_export.targets.triton_config import ServeOptions
            from cmfast_export.targets.triton_repository import check_repository, model_name

            served = parse_options(ServeOptions, "--serve", request.serve)
            check_repository(request.out, model_name(_name(request.checkpoint), served))


WRITERS = {
    "onnx": _write_onnx,
    "ort-cuda": _write_onnx,
    "engine": _write_engine,
    "triton": _write_triton,
    "cmfast": _write_checkpoint,
    "diffusers": _write_diffusers,
}


@contextmanager
def _graph(request: Request) -> Iterator[Path]:
    """Give the verified graph that an engine or a repository is made from: the given file, or one exported for now."""
    if format_of(request.checkpoint) is not None:
        yield request.checkpoint
        return
    # Beside a repository, also where that is ".": Triton takes what is in it for models.
    with temporary_folder(os.path.realpath(request.out)) as folder:
        onnx = folder / f"{_name(request.checkpoint)}.onnx"  # a repository's model is called so
        exported = _export(request, onnx, timed=False)
        report.parity(exported, request.out)
        yield onnx


def _export(request: Request, out: Path, *, timed: bool) -> Any:
    """Return what export_onnx returns; `timed`: the graph is what will be run, so that auto may measure it."""
    model = _load(request)
    with needs("cmfast-export", "export,cpu"):
        from cmfast_export.pipeline import export_onnx
        from cmfast_export.precision_search import export_fastest
    if request.precision != "auto":
        return export_onnx(model, out, precision=request.precision, **request.graph)
    choice = export_fastest(model, out, timed=timed or request.graph["device"] == "cuda", **request.graph)
    report.choice(choice)
    return choice.exported


def _load(request: Request) -> Any:
    with needs("cmfast-export", "export,cpu"):
        from cmfast_train.importers import load_model
        from cmfast_train.importers.facts import Told
    return load_model(request.checkpoint, request.source, Told.parse(request.assignments))


def _default_out(checkpoint: Path, form: str, kind: str, precision: str) -> Path:
    checkpoint = checkpoint if checkpoint.name else checkpoint.resolve()  # "." has no name
    if not checkpoint.name:
        raise CmfastError(f"{checkpoint} has no name to call the file after; say it: -o NAME")
    name = _name(checkpoint)
    if form in ("diffusers", "triton"):
        return checkpoint.with_name(f"{name}_{form}")
    if form == "cmfast":
        return checkpoint.with_name(f"{name}_cmfast.pt")
    name += "" if kind == "denoiser" else f"_{kind}"
    name += "" if precision in ("fp32", "auto") else f"_{precision}"
    name += f"_{form.replace('-', '_')}" if form in FLAVOURED else ""
    return checkpoint.with_name(f"{name}{SUFFIXES[form][0]}")


def _name(checkpoint: Path) -> str:
    return checkpoint.resolve().name if checkpoint.is_dir() else checkpoint.stem


def _check_out(out: Path, inputs: Sequence[Path], form: str) -> None:
    """Raise CmfastError unless the target can be written: before the work, not after it."""
    need = SUFFIXES[form]
    if need and out.suffix not in need:
        raise CmfastError(f"-o {out}: for --format {form} the name must end in {' or '.join(need)}")
    if not need and out.suffix.lower() in (".pt", ".safetensors", *all_suffixes()):
        raise CmfastError(f"-o {out}: --format {form} writes a folder; give it a name without {out.suffix}")
    for read in inputs:
        if read.is_dir() and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(read)):
            raise CmfastError(f"-o {out}: {read} is the model that is read; name a place outside it")
    files = [file for read in inputs for file in files_of(read)]
    if need:
        check_target(out, need, files)
    elif form == "diffusers":  # of a repository: check_repository
        check_target_folder(out, files)


def _batch(text: str) -> int | None:
    """Return the fixed batch size of --batch, None for a dynamic one."""
    if text == "dynamic":
        return None
    try:
        size = whole_number(text)
    except ValueError:
        size = 0
    if not 1 <= size <= MAX_BATCH:
        raise CmfastError(f"--batch {shorten(text)}: a number from 1 to {MAX_BATCH:,}, or dynamic")
    return size


def _check_numbers(steps: int | None, sigmas: Sequence[float] | None, opset: int | None) -> None:
    """Refuse numbers that no graph can have, before the checkpoint is read."""
    if steps is not None and steps < 1:
        raise CmfastError(f"--steps must be at least 1, got {shorten(str(steps))}")
    check_steps(max(steps or 0, len(sigmas or ())))
    if sigmas is not None and not all(0 < after < before for before, after in pairwise((math.inf, *sigmas))):
        raise CmfastError(
            f"--sigmas must be finite noise levels above 0 that strictly decrease, for example 80,0.8, got "
            f"{shorten(','.join(f'{sigma:g}' for sigma in sigmas))}"
        )
    if opset is not None and opset not in OPSETS:
        raise CmfastError(f"opset must be from {OPSETS.start} to {OPSETS.stop - 1}, got {shorten(str(opset))}")


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
