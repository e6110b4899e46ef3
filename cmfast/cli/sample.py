# SPDX-License-Identifier: MIT
"""cmfast-sample: images from a model file."""

from __future__ import annotations

from pathlib import Path

import click

from cmfast.checks import check_threads, shown
from cmfast.cli.parameters import FLOATS, INTS
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError
from cmfast.formats.manifest import PRECISIONS

EPILOG = """\b
Examples:
  cmfast-sample model.onnx -n 64 --steps 2 -o grid.png
  cmfast-sample model.onnx -n 10 --label 7 --seed 3 -o sevens.png
  cmfast-sample model.onnx -n 2 --label cat,dog -o pair.png        names, where the model has them
  cmfast-sample model.onnx -n 50000 --batch 256 -o samples.npz     arr_0 images, arr_1 labels
  cmfast-sample cd_imagenet64_l2.onnx --indices 22,0 -o two_steps.png
  cmfast-sample model.onnx -n 1000 --sigmas 80,1.2 -o folder       one PNG an image
  cmfast-sample teacher.onnx --heun 18 -o grid.png                 a diffusion model: EDM's sampler, 35 calls
  cmfast-sample model.engine -n 64 -o grid.png                     TensorRT, on an NVIDIA GPU
  cmfast-sample sampler.onnx --device cuda --variant cuda_graph
"""


@click.command("cmfast-sample", epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("samples.png"),
    show_default=True,
    help="NAME.png: a grid; NAME.npz: arrays; else a folder of PNGs.",
)
@click.option("-n", "--number", type=int, default=16, show_default=True, help="Images.")
@click.option("--steps", type=int, help="Network calls an image, with the model's own noise levels.")
@click.option("--sigmas", type=FLOATS, help="Noise levels (data units), decreasing, instead of --steps.")
@click.option(
    "--indices", type=INTS, help="Noise levels as indices into the model's grid (OpenAI's ts, diffusers' timesteps)."
)
@click.option("--heun", type=int, metavar="N", help="Heun steps, for a diffusion model: 2N - 1 network calls an image.")
@click.option("--churn", type=FLOATS, metavar="S", help="Of --heun: S_churn, or S_churn,S_tmin,S_tmax,S_noise.")
@click.option("--seed", type=int, default=0, show_default=True, help="Image i of a seed is always the same image.")
@click.option(
    "--label", metavar="CLASS,..", help="Class by number or name, or one for each image; default: drawn from the seed."
)
@click.option("--first", type=int, default=0, show_default=True, help="Index of the first image.")
@click.option("--batch", type=int, default=64, show_default=True, help="Images at a time; does not change them.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda for an engine, else cpu.")
@click.option("--variant", default="", metavar="NAME", help="A way to run it: cuda_graph, tensorrt, compiled, ...")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="Of a checkpoint that PyTorch runs.")
@click.option("--sha256", help="Refuse MODEL unless it hashes to this.")
@click.option("--threads", type=int, help="CPU threads; default: the engine's choice.")
def command(
    model: Path,
    out: Path,
    number: int,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    indices: tuple[int, ...] | None,
    heun: int | None,
    churn: tuple[float, ...] | None,
    seed: int,
    label: str | None,
    first: int,
    batch: int,
    device: str | None,
    variant: str,
    precision: str | None,
    sha256: str | None,
    threads: int | None,
) -> None:
    """Draw images from MODEL and write them to --out.

    MODEL is an exported file, .onnx or .engine; where PyTorch is installed also a checkpoint of any kind.
    """
    import cmfast
    from cmfast.heun import Churn, heun_calls
    from cmfast.images import check_images, check_output

    check_output(out, inputs=[model])
    if number < 1:
        raise CmfastError(f"-n: the number of images must be at least 1, got {shown(number)}")
    check_threads(threads)
    if heun is not None and (steps, sigmas, indices) != (None, None, None):
        raise CmfastError("--heun has noise levels of its own; leave out --steps, --sigmas and --indices, or --heun")
    if churn is not None and heun is None:
        raise CmfastError("--churn is of Heun's steps; say how many: --heun 18")
    if churn is not None and len(churn) > 4:
        raise CmfastError(f"--churn takes S_churn,S_tmin,S_tmax,S_noise, at most four numbers, got {len(churn)}")
    stochastic = Churn(**dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), churn or (), strict=False)))
    loaded = cmfast.load(model, device, threads, variant=variant, precision=precision or "", sha256=sha256)
    check_images(out, number, loaded.spec.image)
    classes = None if label is None else _classes(label, loaded.spec.class_names)
    if indices is not None:
        if steps is not None or sigmas is not None:
            raise CmfastError("--indices, --steps and --sigmas say the same thing; give one of them")
        sigmas = loaded.spec.levels_at(indices)
    bar = number > batch
    if heun is not None:
        how = f"{heun} Heun step(s), {heun_calls(heun)} network call(s) an image"
        images = loaded.sample_heun(
            number, steps=heun, churn=stochastic, seed=seed, label=classes, batch=batch, first=first, progress=bar
        )
    else:
        levels = loaded.levels(steps, sigmas)
        some = ", ".join(f"{sigma:g}" for sigma in levels[:20]) + (", .." if len(levels) > 20 else "")
        how = f"{len(levels)} step(s) at {some}"
        images = loaded.sample(number, sigmas=levels, seed=seed, label=classes, batch=batch, first=first, progress=bar)
    labels = loaded.labels(number, seed=seed, label=classes, first=first)
    cmfast.save_images(out, images, labels)
    click.echo(f"{out}: {number} image(s), {how}, {loaded.backend.name}")


def _classes(text: str, names: tuple[str, ...]) -> str | list[str]:
    """Return the class or classes of --label. A whole text that is a name is one, commas in it included."""
    parts = [text] if text in names else [part if part in names else part.strip() for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
