# SPDX-License-Identifier: MIT
"""cmfast-eval: the command. torch is imported after the arguments have been understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cmfast.cli.parameters import FLOATS, INTS, MODEL
from cmfast.cli.running import needs, run_command
from cmfast.formats.manifest import check_model
from cmfast_train.config.presets import DATA_SETS
from cmfast_train.evaluation.config import METRICS, EvalConfig

EPILOG = """\b
Examples:
  cmfast-eval model.onnx --data-set digits --steps 1,2,4 --json eval.json
  cmfast-eval model.pt --data-set cifar10 --data DIR --steps 1,2 --heun 8,18 --plot quality.png
  cmfast-eval samples.npz --data-set cifar10 --data DIR --features pt_inception-2015-12-05-6726825d.pth
  cmfast-eval model.pt --data-set mnist --data DIR --search --write
  cmfast-eval model.onnx --data-set cifar10 --data DIR -n 50000 --ray local
\b
Metrics:
  fd   Frechet distance: FID, where the features are Inception's
  kid  squared maximum mean discrepancy: KID, likewise
  pr   precision and recall, within third neighbours
  is   Inception score, of features that are a classifier's
\b
Features:
  pixels                      the images themselves; default for digits
  mnist, fashion-mnist,
  cifar10, flowers32          small classifiers that are shipped; default for their data
  FILE.safetensors            one that benchmarks/train_classifier.py made
  FILE.pth                    Inception, pt_inception-2015-12-05-6726825d.pth; needs cmfast[fid]
"""


class _Metrics(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    name = "fd,kid,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(dict.fromkeys(value.split(",")))
        if not set(names) <= set(METRICS):
            self.fail(f"{value!r} is not a list of {', '.join(METRICS)}", param, ctx)
        return names


@click.command("cmfast-eval", epilog=EPILOG)
@click.argument("model", metavar="MODEL|SAMPLES", type=MODEL)
@click.option(
    "--data-set",
    type=click.Choice(sorted(DATA_SETS)),
    required=True,
    help="Data to compare with.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), envvar="CMFAST_DATA", help="Folder, .zip, .npy or .npz of the data."
)
@click.option("--features", metavar="NAME|FILE", help="Features to compare by, see below; default: by --data-set.")
@click.option("--metrics", type=_Metrics(), help="Default: fd,kid,pr and, of a classifier's features, is.")
@click.option("--steps", type=INTS, help="Network calls per image; default: all with default noise levels.")
@click.option("--heun", type=INTS, default=(), help="Heun steps of a teacher, 2 N - 1 calls each.")
@click.option("-n", "--number", type=int, help="Samples; default: 10000, at most as many as the data.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the samples and of all random subsets.")
@click.option("--batch", type=int, default=64, show_default=True, help="Samples drawn at a time.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda for an engine, else cpu.")
@click.option("--ray", "address", metavar="local|ADDRESS", help="Draw on a Ray cluster, as cmfast-sample does.")
@click.option("--search", is_flag=True, help="Search for the second of two noise levels that minimises fd.")
@click.option("--search-calls", type=int, default=12, show_default=True, help="Noise levels to try.")
@click.option(
    "--search-bounds", type=FLOATS, help="Range of noise levels to search; default: sigma_data times 0.1 and 20."
)
@click.option("--write", is_flag=True, help="Make the result the default of the checkpoint MODEL for 2 steps.")
@click.option(
    "--train-log", type=click.Path(path_type=Path), help="Folder of the run; its length goes into the record."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Plot quality and time against calls to this .png file.")
def command(**options: Any) -> None:
    """Compare the samples of MODEL, or SAMPLES drawn before, with a data set.

    MODEL is an exported file or a checkpoint; SAMPLES an .npz, or a folder of shards or images, as cmfast-sample writes
    them. Also measured: the time that an image takes, from noise to pixels, at each number of network calls.
    """
    config = EvalConfig(**options)
    check_model(config.model)
    with needs("cmfast-eval", "train"):
        from cmfast_train.evaluation.run import evaluate
    evaluate(config)


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
