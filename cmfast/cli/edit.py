# SPDX-License-Identifier: MIT
"""cmfast-edit: inpainting, colours, super-resolution, strokes, denoising and interpolation with a model file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmfast.checks import check_threads
from cmfast.cli.parameters import BACKEND, CONDITIONS, FLOATS, MODEL
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cmfast.model import Model

# What each task takes of the options that are not for all, and what its input is.
TASKS = {
    "inpaint": {"INPUT", "--mask", "--invert-mask", "--sigmas", "--seed", "--first", "--compare"},
    "colorize": {"INPUT", "--sigmas", "--seed", "--first", "--compare"},
    "upscale": {"INPUT", "--sigmas", "--seed", "--first", "--compare"},
    "sdedit": {"INPUT", "--sigma", "--seed", "--first", "--compare"},
    "denoise": {"INPUT", "--sigma", "--seed", "--first", "--compare"},
    "interpolate": {"--between", "--sigmas"},
}
NEEDS = {
    "INPUT": "what to edit: NAME.png, a folder of them, NAME.npy or NAME.npz",
    "--mask": "--mask FILE, white or 1 where the input is kept",
    "--sigma": "--sigma S, a noise level in data units, such as 5 for strokes",
    "--between": "--between A,B, two seeds, or A:I,B:J, two samples of seeds",
}

EPILOG = """\b
Examples:
  cmfast-edit inpaint model.onnx digit.png --mask mask.png -n 4 -o four.png
  cmfast-edit inpaint model.onnx samples.npz --mask left.npy --label 7 --compare before_after.png
  cmfast-edit inpaint policy.onnx ends.npy --mask known.npy --condition state=state.npy -o way.npy
  cmfast-edit colorize model.onnx grey.png -o colours.png
  cmfast-edit upscale model.onnx small.png --steps 40 -o large.png
  cmfast-edit sdedit model.onnx strokes.png --sigma 5 -n 8 -o drawn.png
  cmfast-edit denoise model.onnx noisy.npy --sigma 0.5 -o clean.png
  cmfast-edit interpolate model.onnx --between 0:3,0:7 -n 10 -o way.png
"""


@click.command("cmfast-edit", epilog=EPILOG)
@click.argument("task", metavar="TASK", type=click.Choice(list(TASKS)))
@click.argument("model", type=MODEL)
@click.argument("given", metavar="[INPUT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="NAME.png: the image, or a grid of several; NAME.npz, NAME.npy: arrays; else a folder of PNGs.  "
    "[default: edited.png or edited.npz]",
)
@click.option("-n", "--number", type=int, help="Samples; default: as many as inputs, 8 of interpolate.")
@click.option("--mask", type=click.Path(path_type=Path), help="inpaint: white or 1 where INPUT is kept.")
@click.option("--invert-mask", is_flag=True, help="inpaint: black or 0 is kept, as in masks of diffusers.")
@click.option(
    "--sigma", type=float, help="sdedit: noise added, the more the freer; denoise: noise of INPUT (data units)."
)
@click.option("--between", metavar="SEED[:I],..", help="interpolate: seeds, or samples I of seeds.")
@click.option(
    "--steps",
    type=int,
    help="Network calls per sample.  [default: 18; sdedit 2; denoise 1; interpolate: the model's fewest]",
)
@click.option("--sigmas", type=FLOATS, help="Noise levels (data units), decreasing, instead of --steps.")
@click.option("--seed", type=int, default=0, show_default=True, help="Sample i of a seed is always the same.")
@click.option("--label", metavar="CLASS,..", help="Class by number or name, or one per sample.")
@CONDITIONS
@click.option(
    "--compare", type=click.Path(path_type=Path), help="Also write inputs and results side by side: NAME.png."
)
@BACKEND
def command(
    task: str,
    model: Path,
    given: Path | None,
    out: Path | None,
    number: int | None,
    mask: Path | None,
    invert_mask: bool,
    sigma: float | None,
    between: str | None,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    seed: int,
    label: str | None,
    conditions: tuple[str, ...],
    encoder: tuple[Path, ...],
    compare: Path | None,
    first: int,
    batch: int,
    device: str | None,
    variant: str,
    tolerance_db: float | None,
    precision: str | None,
    sha256: str | None,
    threads: int | None,
) -> None:
    """Edit INPUT with the denoiser in MODEL: images, or arrays such as trajectories.

    \b
    inpaint      keep INPUT where the mask is white, draw the rest
    colorize     draw the colours of a grey image
    upscale      draw a sample whose block averages are INPUT
    sdedit       draw a sample that looks like INPUT: strokes, a rough trajectory
    denoise      remove noise of a known level
    interpolate  draw the way between samples; no INPUT
    """
    import cmfast
    from cmfast import editing
    from cmfast.cli.conditions import read_conditions
    from cmfast.editing.files import read_input, read_mask, write_image
    from cmfast.images import check_fits, check_output, save_samples

    passed: dict[str, object] = {
        "INPUT": given, "--mask": mask, "--invert-mask": invert_mask or None, "--sigma": sigma, "--between": between,
        "--sigmas": sigmas, "--seed": seed or None, "--first": first or None, "--compare": compare,
    }  # fmt: skip
    _check_options(task, passed)
    check_threads(threads)
    inputs = [each for each in (model, given, mask) if each is not None]
    for each in (out, compare):
        if each is not None:
            check_output(each, inputs=inputs, arrays=each is out)
    read = None if given is None else read_input(given)
    kept = None if mask is None else read_mask(mask)
    loaded = cmfast.load(
        model, device, threads, variant=variant, precision=precision or "", sha256=sha256, encoder=encoder,
        tolerance_db=tolerance_db,
    )  # fmt: skip
    if out is None:
        out = Path("edited.png" if loaded.spec.data == "image" else "edited.npz")
        check_output(out, inputs=inputs)
    check_fits(out, number or 1, loaded.spec)
    if compare is not None and (loaded.spec.data != "image" or compare.suffix.lower() != ".png"):
        raise CmfastError(f"{compare}: --compare writes images side by side, to NAME.png")
    named = read_conditions(loaded.conditions, conditions, label)

    def drawn(edit: Any, *arguments: Any, **levels: Any) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = edit(
            loaded, *arguments, n=number, steps=steps, seed=seed, conditions=named, batch=batch, first=first,
            progress=True, **levels,
        )  # fmt: skip
        return result

    if task == "inpaint":
        kept = _inverted(kept) if invert_mask else kept
        results = drawn(editing.inpaint, read, kept, sigmas=sigmas)
    elif task == "colorize":
        results = drawn(editing.colorize, read, sigmas=sigmas)
    elif task == "upscale":
        results = drawn(editing.upscale, read, sigmas=sigmas)
    elif task == "sdedit":
        results = drawn(editing.sdedit, read, sigma)
    elif task == "denoise":
        results = drawn(editing.denoise, read, sigma)
    else:
        results = editing.interpolate(
            loaded, _points(between or ""), n=8 if number is None else number, steps=steps, sigmas=sigmas,
            conditions=named, batch=batch,
        )  # fmt: skip
    if out.suffix.lower() == ".png" and len(results) == 1:
        write_image(out, results[0])
    else:
        save_samples(out, results)
    click.echo(f"{out}: {len(results)} {loaded.noun.removesuffix('s')}(s), {task}, {loaded.backend.name}")
    if compare is not None:
        editing.save_comparison(compare, _before(loaded, task, read, kept), results)
        click.echo(f"{compare}: inputs and results side by side")


def _check_options(task: str, passed: dict[str, object]) -> None:
    """Raise CmfastError if an option is for another task, or one of this task is missing."""
    for name, value in passed.items():
        if value is not None and name not in TASKS[task]:
            raise CmfastError(f"{name} is not for {task}; remove it")
        if value is None and name in NEEDS and name in TASKS[task]:
            raise CmfastError(f"{task} needs {NEEDS[name]}")


def _points(text: str) -> list[tuple[int, int]]:
    """Return seeds and indices of samples from a text such as 0:3,0:7."""
    points = []
    for part in text.split(","):
        seed, colon, index = part.partition(":")
        try:
            points.append((int(seed), int(index) if colon else 0))
        except ValueError:
            raise CmfastError(
                f"--between {text!r}: need seeds such as 0,1 or samples of seeds such as 0:3,0:7"
            ) from None
    return points


def _inverted(mask: Any) -> Any:
    """Return a mask with true and false, or white and black, exchanged."""
    import numpy as np

    return mask if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1, 255)).all() else mask == 0


def _before(model: Model, task: str, given: Any, mask: Any) -> npt.NDArray[np.uint8]:
    """Return the inputs as pixels, uint8 [N, H, W, C]: what is not kept is grey."""
    from cmfast.editing import constrained, inputs
    from cmfast.sampling import to_uint8

    if task == "inpaint":
        return to_uint8(constrained.of_known(model, given, mask, None)[1].before)
    if task == "colorize":
        return to_uint8(constrained.of_grey(model, given, None)[1].before)
    if task == "upscale":
        return to_uint8(constrained.of_averages(model, given, None)[1].before)
    return to_uint8(inputs.samples(model.spec, "INPUT", given, inside=False))


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
