# SPDX-License-Identifier: MIT
"""cmfast-ema: the command. torch is imported after the arguments have been understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmfast.cli.running import needs, run_command
from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import check_target

if TYPE_CHECKING:
    from cmfast_train.checkpoint import Checkpoint

EPILOG = """\b
Examples:
  cmfast-ema runs/photos --std 0.12                     runs/photos/model_std0.12.pt, at the end of training
  cmfast-ema runs/photos --std 0.07 --images 6400000    as if training had ended there
  cmfast-ema runs/photos --std 0.2 --dry-run            print how close the snapshots come
"""

LIMIT = 0.2  # error of the profile above which the result is not the requested average


@click.command("cmfast-ema", epilog=EPILOG)
@click.argument("run", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--std", type=float, required=True, help="Width of the average, a fraction of the run, 0.03 to 0.25.")
@click.option("--images", type=int, help="Images of the phase at which the average ends; default: the last snapshot.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Checkpoint to write, .pt or .safetensors; default: in DIR."
)
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be written and stop.")
def command(run: Path, std: float, images: int | None, out: Path | None, dry_run: bool) -> None:
    """Reconstruct the weight average that training would have kept with another width.

    DIR is the folder of a run that kept snapshots of power-function averages (EDM2, arXiv:2312.02696), DIR/ema/*.pt.
    Those of its last phase are combined, least squares over the averages' profiles, into the average of width --std.
    """
    files = _files(run)
    out = check_target(out or run / f"model_std{std:g}{'' if images is None else f'-{images:012d}'}.pt")
    if out.suffix.lower() not in (".pt", ".safetensors"):
        raise CmfastError(f"-o {out}: a checkpoint's name ends in .pt or .safetensors")
    if out.exists() and any(out.samefile(file) for file in files):
        raise CmfastError(f"-o {out}: that is a snapshot; name another file")
    if out.exists() and any(file.exists() and out.samefile(file) for file in _other_files(run)):
        raise CmfastError(f"-o {out}: that is a file of the run, which its training writes; name another file")
    with needs("cmfast-ema", "train"):
        from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
        from cmfast_train.networks.custom import network_option
        from cmfast_train.training.ema import Snapshot, gamma_of_std, posthoc_coefficients, posthoc_error, reconstruct
    gamma = gamma_of_std(std)
    checkpoints = _last_phase({file: load_checkpoint(file) for file in files})
    _check_same_model(checkpoints)
    snapshots = {
        file: Snapshot(**_when(file, checkpoint.source), weights=checkpoint.weights)
        for file, checkpoint in checkpoints.items()
    }
    step = _step(run, images, {snapshot.step for snapshot in snapshots.values()})
    until = [snapshot for snapshot in snapshots.values() if snapshot.step <= step]
    stored = [(snapshot.step, gamma_of_std(snapshot.std)) for snapshot in until]
    if len(set(stored)) < len(stored):
        raise ArtifactError(f"{run / 'ema'} holds two snapshots of one width and step: are they of one phase?")
    error = posthoc_error(stored, posthoc_coefficients(stored, step, gamma), step, gamma)
    widths = ", ".join(f"{width:g}" for width in sorted({snapshot.std for snapshot in until}))
    what = f"std {std:g} at step {step:,}, of {len(until)} snapshots of std {widths}; profile error {100 * error:.2g} %"
    if error > LIMIT:
        raise CmfastError(
            f"{what}, and {100 * LIMIT:.0f} % are allowed: a width nearer to theirs works, as would more snapshots"
        )
    if dry_run:
        click.echo(f"would write {out}: {what}")
        return
    first = next(iter(checkpoints.values()))
    source = {"format": "cmfast", "ema_std": std, "ema_step": step}
    weights = reconstruct(until, std, step)
    save_checkpoint(Checkpoint(spec=first.spec, network=first.network, weights=weights, source=source), out)
    click.echo(f"{out}: {what}\nnext: cmfast-export {out}{network_option(first.network)}")


def _files(run: Path) -> list[Path]:
    if not run.is_dir():
        raise CmfastError(f"{run}: no such folder; name the folder of a run, cmfast-train's --out")
    if files := sorted((run / "ema").glob("std*-*.pt")):
        return files
    raise CmfastError(f"{run} holds no snapshots ema/std*-*.pt: its training kept no power-function averages")


def _other_files(run: Path) -> list[Path]:
    """Return what training writes in the folder of a run, beside snapshots."""
    return [run / "model.pt", run / "state.pt", *(run / "phases").glob("*.pt"), *(run / "ema").glob("*.pt")]


def _last_phase(checkpoints: dict[Path, Checkpoint]) -> dict[Path, Checkpoint]:
    """Return the snapshots of the last phase: their steps are counted from its beginning."""
    phases = {file: checkpoint.source.get("ema_phase", 0) for file, checkpoint in checkpoints.items()}
    for file, phase in phases.items():
        if not _is_count(phase, 0):
            raise ArtifactError(f"{file}: its ema_phase is {_short(phase)}, not a number")
    last = max(phases.values())
    return {file: checkpoint for file, checkpoint in checkpoints.items() if phases[file] == last}


def _check_same_model(checkpoints: dict[Path, Checkpoint]) -> None:
    first_file, first = next(iter(checkpoints.items()))
    shapes = {name: tensor.shape for name, tensor in first.weights.items()}
    for file, other in checkpoints.items():
        specs = [each.spec.with_class_names(()) for each in (first, other)]  # older snapshots have no names
        same = specs[0] == specs[1] and other.network == first.network
        if not same or {name: tensor.shape for name, tensor in other.weights.items()} != shapes:
            raise ArtifactError(f"{file}: another model than {first_file.name}; snapshots of one phase belong together")


def _when(file: Path, source: Any) -> dict[str, Any]:
    """Return the std and the step that a snapshot says of itself."""
    std, step = source.get("ema_std"), source.get("ema_step")
    if not isinstance(std, (int, float)) or not 0 < std < 1 or not _is_count(step, 1):
        raise ArtifactError(f"{file}: a checkpoint, but no snapshot of a power-function average")
    return {"std": float(std), "step": step}


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**53


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


def _step(run: Path, images: int | None, have: set[int]) -> int:
    """Return the step at which the average ends: the last, or the one after so many images of the phase."""
    if images is None:
        return max(have)
    try:
        batch = json.loads((run / "config.json").read_text(encoding="utf-8"))["batch"]
        if not _is_count(batch, 1):
            raise ValueError(batch)
    except Exception:  # whatever is wrong with it
        raise ArtifactError(f"{run / 'config.json'} does not say the batch, so --images means nothing") from None
    steps = {step * batch: step for step in sorted(have)}
    if images not in steps:
        raise CmfastError(
            f"--images {images}: no snapshot was taken there; there are {', '.join(str(count) for count in steps)}"
        )
    return steps[images]


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
