# SPDX-License-Identifier: MIT
"""cmfast-train: the command. torch is imported after the arguments have been understood."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from cmfast.cli.running import needs, run_command
from cmfast.errors import CmfastError
from cmfast_train.config.about import ABOUT, NOT_RUN, RECORDED, YOURS

EXAMPLES = """\b
Examples:
  cmfast-train digits --out runs/digits
  cmfast-train mnist --data DIR --out runs/mnist --set batch=256 --set ect.lr=1e-4
  cmfast-train folder --data photos --out runs/photos --set image_size=64 --set conditional=false
  cmfast-train digits --out runs/cd --set phases=edm:40000,cd:100000
  cmfast-train cifar10 --data DIR --out runs/ect --init edm.pkl --set conditional=false --set phases=ect:25600000
  cmfast-train --network policy:Policy --spec spec.json --data arrays.npz --out runs/policy
  accelerate launch --num_processes 8 -m cmfast_train.cli.train cifar10 --data DIR --out runs/cifar10
"""
MORE = "--help --all lists those that were not run as they stand"


class _TrainCommand(click.Command):
    """Its help has the presets that were run; with --all, wherever it stands, the others too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        shows_all = "--all" in args
        self.epilog = "\n".join([
            _presets("Presets", RECORDED),
            _presets("For images or data of your own", YOURS, "" if shows_all else f"  ({MORE})\n"),
            *([_presets("Not run as they stand", NOT_RUN)] if shows_all else []),
            EXAMPLES,
        ])  # fmt: skip
        return super().parse_args(ctx, args)


def _presets(title: str, about: Mapping[str, str], end: str = "") -> str:
    return f"\b\n{title}:\n" + "".join(f"  {name:<20} {text}\n" for name, text in about.items()) + end


def _list_methods(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from cmfast_train.methods.method import find, names  # not at the top: it would slow --help

    for name in names():
        row = find(name)
        click.echo(f"{name:<5} {'needs a teacher' if row.distils else 'no teacher':<16} {row.paper}")
    context.exit()


@click.command("cmfast-train", cls=_TrainCommand, epilog=EXAMPLES)
@click.argument("preset", required=False, metavar="[PRESET]", type=click.Choice(sorted(ABOUT)))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the run: model.pt, samples, log.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="CMFAST_DATA",
    help="Images: a folder, .zip, .npy or .npz; not needed for digits. Arrays: .npz. Also CMFAST_DATA.",
)
@click.option("--network", default="", metavar="MODULE:FACTORY", help="A network of your own: imported and called.")
@click.option("--spec", type=click.Path(path_type=Path), help="JSON: the conventions of that network.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a field of the configuration; METHOD.NAME=VALUE: of a phase.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    help="Start from this model, of any format that cmfast-export reads: its network, its conventions, its weights.",
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    help="Distil this model; default: the newest earlier model that the phase's method can distil.",
)
@click.option(
    "--methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods,
    help="List the training methods and stop.",
)  # fmt: skip
@click.option("--all", "all_presets", is_flag=True, help="With --help: list every preset.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and stop.")
def command(
    preset: str | None,
    out: Path,
    data: Path | None,
    network: str,
    spec: Path | None,
    assignments: tuple[str, ...],
    init: Path | None,
    teacher: Path | None,
    all_presets: bool,
    dry_run: bool,
) -> None:
    """Train a consistency model: the network of a PRESET, or your own. Run the same command again to resume.

    A run is a list of phases, METHOD:IMAGES, such as edm:40000,cd:100000: a diffusion model, then its distillation.
    --methods lists the methods.
    """
    from cmfast_train.config.custom_network import with_own_network
    from cmfast_train.config.overrides import check_set_once, lost_settings, override
    from cmfast_train.config.presets import PRESETS
    from cmfast_train.config.train_config import to_dict

    if all_presets:
        raise CmfastError("--all goes with --help: cmfast-train --help --all")
    models = {name: str(file) for name, file in (("init", init), ("teacher", teacher)) if file is not None}
    if preset is None and not network:
        raise CmfastError(
            f"name a preset, or pass a network of your own, --network; there are {', '.join(sorted(ABOUT))}"
        )
    if spec is not None and not network:
        raise CmfastError("--spec describes a network of your own: add --network package.module:factory")
    assignments = (*(f"{name}={file}" for name, file in models.items()), *assignments)
    check_set_once(assignments)
    base = PRESETS[preset or "arrays"]
    config = override(with_own_network(base) if network else base, assignments)
    if config.own and not network:
        raise CmfastError("a network of your own is named by --network package.module:factory, with --spec spec.json")
    if dry_run:
        if lost := lost_settings(base, assignments, config) if preset else []:
            method = lost[-1].partition(".")[0]
            click.echo(
                f"note: --set phases= takes the defaults of {', '.join(lost)}, not what the preset has; "
                f"--set {method}.images=N changes a length and keeps the preset's settings",
                err=True,
            )
        click.echo(json.dumps(to_dict(config), indent=1))
        return
    with _termination_as_interrupt():
        try:
            with needs("cmfast-train", "train"):
                from cmfast_train.from_factory import own_run
                from cmfast_train.training.trainer import train
            model = train(config, out, data, own_run(config, network, spec) if network else None)
        except KeyboardInterrupt as stopped:
            raise click.exceptions.Exit(_interrupted(out, saved=bool(stopped.args))) from None
    if int(os.environ.get("RANK", "0")) == 0:
        what = "samples" if config.data == "arrays" else "images"
        click.echo(f"{model} is trained on {config.images:,} {what}; samples are in {out / 'samples'}")
        click.echo(f"next: cmfast-export {model}{f' --network {network}' if network else ''}")


def _interrupted(out: Path, saved: bool) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        which = "a checkpoint of the last step" if saved else "a checkpoint"
        held = f"{out} holds {which}; the same command continues"
        what = held if (out / "state.pt").exists() else "before the first checkpoint; the same command begins again"
        click.echo(f"cmfast-train: stopped; {what}", err=True)
    return 130


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the block as SIGINT does, also before the first step and after the last."""
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second kills
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def main() -> None:
    """Run the command."""
    try:
        run_command(command)
    except (SystemExit, Exception) as end:
        if "cmfast_train.training.parallel" in sys.modules:  # not before torch is: --help does without
            from cmfast_train.training.parallel import leave

            leave(end)
        raise


if __name__ == "__main__":
    main()
