# SPDX-License-Identifier: MIT
"""cmfast-export: the command. torch is imported after the arguments have been understood."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmfast.cli._run import needs, run_command
from cmfast.cli._types import FLOATS, SET, SOURCE
from cmfast.errors import CmfastError
from cmfast_export import DEFAULT_OPSET

if TYPE_CHECKING:
    from cmfast.spec import ModelSpec
    from cmfast_export.export import Exported
    from cmfast_export.to_diffusers import Written
    from cmfast_export.verify import Parity

EPILOG = """\b
Examples:
  cmfast-export model.pt                                        model.onnx: the denoiser, any noise level
  cmfast-export model.pt --kind sampler --steps 2 -o two.onnx   the whole loop in one graph
  cmfast-export model.pt --kind sampler --sigmas 80,1.2 --batch 1 -o edge.onnx
  cmfast-export cd_imagenet64_l2.pt                             OpenAI's, known by its name
  cmfast-export ema.pt --source openai --set image_size=64 --set head_channels=64 --set scaling=boundary
  cmfast-export diffusers-ct_imagenet64                         a diffusers folder
  cmfast-export edm-cifar10-32x32-uncond-vp.pkl --format cmfast -o teacher.pt
  cmfast-export model.pt --format diffusers -o folder           and back
"""

SUFFIXES = {"onnx": (".onnx",), "cmfast": (".pt", ".safetensors"), "diffusers": ()}  # a folder may be called anything


@click.command("cmfast-export", epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="What to write; default: beside CHECKPOINT, NAME.onnx, NAME_sampler.onnx, NAME_cmfast.pt, NAME_diffusers.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(list(SUFFIXES)),
    default="onnx",
    show_default=True,
    help="onnx: a graph; cmfast: a checkpoint; diffusers: a ConsistencyModelPipeline folder.",
)
@click.option(
    "--kind",
    type=click.Choice(["denoiser", "sampler"]),
    default="denoiser",
    show_default=True,
    help="One call of f(x, sigma), or the whole few-step loop.",
)
@click.option("--steps", type=int, help="Sampler: network calls, at the model's default noise levels; default: 1.")
@click.option("--sigmas", type=FLOATS, help="Sampler: noise levels (data units), decreasing, instead of --steps.")
@click.option("--batch", default="dynamic", show_default=True, help="A number, or dynamic.")
@click.option("--opset", type=int, default=DEFAULT_OPSET, show_default=True, help="ONNX opset, 18 to 23.")
@click.option(
    "--tolerance", type=float, default=1e-4, show_default=True, help="Largest difference from PyTorch (data units)."
)
@SOURCE
@SET
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be written and stop.")
def command(
    checkpoint: Path,
    out: Path | None,
    form: str,
    kind: str,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    batch: str,
    opset: int,
    tolerance: float,
    source: str,
    assignments: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Export CHECKPOINT and prove that what was written computes the same.

    CHECKPOINT is a cmfast model (.pt, .safetensors), OpenAI's, the first public implementation's or EDM's weights, or a
    diffusers folder. cmfast-info says what a file is.
    """
    from cmfast.artifact import check_model

    check_model(checkpoint)
    out = out or _default_out(checkpoint, form, kind)
    need = SUFFIXES[form]
    if need and out.suffix not in need:
        raise CmfastError(f"-o {out}: for --format {form} the name must end in {' or '.join(need)}")
    if not need and out.suffix in (".onnx", ".pt", ".safetensors"):
        raise CmfastError(f"-o {out}: --format {form} writes a folder; give it a name without {out.suffix}")
    if out.exists() and out.samefile(checkpoint):
        raise CmfastError(f"-o {out}: that is the file that is read; name another")
    of_onnx = (kind, steps, sigmas, batch, opset, tolerance)
    if form != "onnx" and of_onnx != ("denoiser", None, None, "dynamic", DEFAULT_OPSET, 1e-4):
        raise CmfastError(
            f"--kind, --steps, --sigmas, --batch, --opset and --tolerance are for --format onnx, not for {form}"
        )
    if batch != "dynamic" and not (batch.isdigit() and int(batch)):
        raise CmfastError(f"--batch {batch}: a number from 1, or dynamic")
    if not tolerance > 0:
        raise CmfastError(f"--tolerance must be greater than 0, got {tolerance}")
    if dry_run:
        click.echo(f"would write {out}: " + (f"{kind}, batch {batch}, opset {opset}" if form == "onnx" else form))
        return
    start = time.perf_counter()
    with needs("cmfast-export", "export,cpu"):
        from cmfast_train.importers import load_model
        from cmfast_train.importers.facts import Told
    model = load_model(checkpoint, source, Told.parse(assignments))
    if form == "cmfast":
        from cmfast_train.checkpoint import save_checkpoint

        save_checkpoint(model, out)
        click.echo(f"{out}: a cmfast checkpoint of {checkpoint}\nnext: cmfast-export {out}")
        return
    if form == "diffusers":
        from cmfast_export.to_diffusers import export_diffusers

        _report_folder(export_diffusers(model, out), model.spec)
        return
    with needs("cmfast-export", "export,cpu"):
        from cmfast_export.export import export_onnx
    exported = export_onnx(
        model,
        out,
        kind=kind,
        steps=steps,
        sigmas=sigmas,
        batch=None if batch == "dynamic" else int(batch),
        opset=opset,
        tolerance=tolerance,
    )
    told = [f"--source {source}"] * bool(source) + [f"--set {assignment}" for assignment in assignments]
    _report(exported, tolerance, time.perf_counter() - start, checkpoint, " ".join(told))


def _default_out(checkpoint: Path, form: str, kind: str) -> Path:
    checkpoint = checkpoint if checkpoint.name else checkpoint.resolve()  # "." has no name
    if not checkpoint.name:
        raise CmfastError(f"{checkpoint} has no name to call the file after; say it: -o NAME")
    name = checkpoint.name if checkpoint.is_dir() else checkpoint.stem
    if form == "diffusers":
        return checkpoint.with_name(f"{name}_diffusers")
    if form == "cmfast":
        return checkpoint.with_name(f"{name}_cmfast.pt")
    return checkpoint.with_name(f"{name}{'' if kind == 'denoiser' else '_sampler'}.onnx")


def _report_folder(written: Written, spec: ModelSpec) -> None:
    click.echo(f"{written.path}: a folder of diffusers, read back and equal to the bit")
    if not spec.grid:
        click.echo(f"diffusers samples on a grid, and this model has none: it was given one of {written.grid} levels")
    click.echo("next, in Python:")
    click.echo(f'  pipeline = diffusers.ConsistencyModelPipeline.from_pretrained("{written.path}")')
    for steps, timesteps in written.timesteps.items():
        levels = ", ".join(f"{sigma:g}" for sigma in timesteps.sigmas)
        click.echo(f"  pipeline(timesteps={list(timesteps.indices)})    # {steps} step(s), at {levels}")


def _report(exported: Exported, tolerance: float, seconds: float, checkpoint: Path, told: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        "compared at", "largest difference", title=f"{exported.path} against PyTorch (allowed {tolerance:.0e})"
    )

    def add(parity: Parity) -> None:
        for row in parity.rows:
            table.add_row(row.where, f"{row.max_abs:.1e}")

    add(exported.denoiser)
    if exported.denoiser.boundary is not None:
        table.add_row("boundary: f(x, sigma_min) against x", f"{exported.denoiser.boundary:.1e}")
    if exported.sampler:
        add(exported.sampler)
    console.print(table)
    size = exported.path.stat().st_size / 2**20
    click.echo(f"{exported.path}: {exported.manifest.kind}, {size:.1f} MiB, exported and verified in {seconds:.1f} s")
    if exported.data:
        click.echo(f"its weights, too many for one file, are in {exported.data}; keep the two together")
    click.echo("next:")
    click.echo(f"  cmfast-sample {exported.path} -n 16 -o samples.png")
    if told:  # cmfast-bench does not take what was said of a foreign file
        baseline = exported.path.with_suffix(".pt")
        click.echo(f"  cmfast-export {checkpoint} {told} --format cmfast -o {baseline}")
        checkpoint = baseline
    click.echo(f"  cmfast-bench {exported.path} --baseline {checkpoint}")


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
