# SPDX-License-Identifier: MIT
"""cmfast-export: the command. torch is imported after the arguments have been understood."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmfast.cli._run import needs, run_command
from cmfast.cli._types import FLOATS
from cmfast.errors import CmfastError
from cmfast_export import DEFAULT_OPSET

if TYPE_CHECKING:
    from cmfast_export.export import Exported
    from cmfast_export.verify import Parity

EPILOG = """\b
Examples:
  cmfast-export model.pt                                        model.onnx: the denoiser, any noise level
  cmfast-export model.pt --kind sampler --steps 2 -o two.onnx   the whole loop in one graph
  cmfast-export model.pt --kind sampler --sigmas 80,1.2 --batch 1 -o edge.onnx
"""


@click.command("cmfast-export", epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="File to write; default: CHECKPOINT.onnx, or CHECKPOINT_sampler.onnx.",
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
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be written and stop.")
def command(
    checkpoint: Path,
    out: Path | None,
    kind: str,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    batch: str,
    opset: int,
    tolerance: float,
    dry_run: bool,
) -> None:
    """Export CHECKPOINT (model.pt, .safetensors) to one ONNX file and prove that it computes the same."""
    from cmfast.artifact import check_file

    check_file(checkpoint)
    if out is None:
        stem = checkpoint.stem if kind == "denoiser" else f"{checkpoint.stem}_sampler"
        out = checkpoint.with_name(f"{stem}.onnx")
    if out.suffix != ".onnx":
        raise CmfastError(f"-o {out}: the file must end in .onnx")
    if batch != "dynamic" and not (batch.isdigit() and int(batch)):
        raise CmfastError(f"--batch {batch}: a number from 1, or dynamic")
    if not tolerance > 0:
        raise CmfastError(f"--tolerance must be greater than 0, got {tolerance}")
    if dry_run:
        click.echo(f"would write {out}: {kind}, batch {batch}, opset {opset}")
        return
    with needs("cmfast-export", "export,cpu"):
        from cmfast_export.export import export_onnx
    start = time.perf_counter()
    exported = export_onnx(
        checkpoint,
        out,
        kind=kind,
        steps=steps,
        sigmas=sigmas,
        batch=None if batch == "dynamic" else int(batch),
        opset=opset,
        tolerance=tolerance,
    )
    _report(exported, tolerance, time.perf_counter() - start, checkpoint)


def _report(exported: Exported, tolerance: float, seconds: float, checkpoint: Path) -> None:
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
    click.echo("next:")
    click.echo(f"  cmfast-sample {exported.path} -n 16 -o samples.png")
    click.echo(f"  cmfast-bench {exported.path} --baseline {checkpoint}")


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
