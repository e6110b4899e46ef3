# SPDX-License-Identifier: MIT
"""cmfast-sample: samples from a model file."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from cmfast.checks import check_threads, shown
from cmfast.cli.parameters import BACKEND, CONDITIONS, FLOATS, INTS, MODEL
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError

EPILOG = """\b
Examples:
  cmfast-sample model.onnx -n 64 --steps 2 -o grid.png
  cmfast-sample model.onnx -n 10 --label 7 --seed 3 -o sevens.png
  cmfast-sample model.onnx -n 2 --label cat,dog -o pair.png        names, where the model has them
  cmfast-sample model.onnx -n 50000 --batch 256 -o samples.npz     arr_0 images, arr_1 labels
  cmfast-sample cd_imagenet64_l2.onnx --indices 22,0 -o two_steps.png
  cmfast-sample model.onnx -n 1000 --sigmas 80,1.2 -o folder       one PNG an image
  cmfast-sample teacher.onnx --heun 18 -o grid.png                 a diffusion model: EDM's sampler, 35 calls
  cmfast-sample policy.onnx -n 1 --condition state=state.npy -o actions.npy
  cmfast-sample policy.onnx --encoder policy_encoder.onnx --condition image=frame.npy -o actions.npy
  cmfast-sample model.engine -n 64 -o grid.png                     TensorRT, on an NVIDIA GPU
  cmfast-sample model.onnx --variant openvino --precision bf16     OpenVINO, in a precision of your choice
  cmfast-sample model.onnx --variant auto --tolerance-db 50        the fastest that is installed, within 50 dB
  cmfast-sample sampler.onnx --device cuda --variant cuda_graph
  cmfast-sample model.onnx -n 1000000 --shard 10240 -o samples     .npz files; again: what is missing
  cmfast-sample model.onnx -n 1000000 --ray local -o samples       the same on all cores, or a Ray cluster
"""


@click.command("cmfast-sample", epilog=EPILOG)
@click.argument("model", type=MODEL)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="NAME.png: a grid; NAME.npz, NAME.npy: arrays; else a folder of PNGs.  [default: samples.png or samples.npz]",
)
@click.option("-n", "--number", type=int, default=16, show_default=True, help="Number of samples.")
@click.option("--steps", type=int, help="Network calls per sample, with the model's own noise levels.")
@click.option("--sigmas", type=FLOATS, help="Noise levels (data units), decreasing, instead of --steps.")
@click.option(
    "--indices", type=INTS, help="Noise levels as indices into the model's grid (OpenAI's ts, diffusers' timesteps)."
)
@click.option(
    "--heun", type=int, metavar="N", help="Heun steps, for a diffusion model: 2N - 1 network calls per sample."
)
@click.option("--churn", type=FLOATS, metavar="S", help="Stochastic --heun: S_churn, or S_churn,S_tmin,S_tmax,S_noise.")
@click.option("--seed", type=int, default=0, show_default=True, help="Sample i of a seed is always the same.")
@click.option(
    "--label", metavar="CLASS,..", help="Class by number or name, or one per sample; default: drawn from the seed."
)
@click.option(
    "--shard", type=int, metavar="N", help="Write .npz files of N samples to the folder --out, and continue it."
)
@click.option(
    "--ray",
    "address",
    metavar="local|ADDRESS",
    help="Draw shards on this machine's cores or on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT.",
)
@CONDITIONS
@BACKEND
def command(
    model: Path,
    out: Path | None,
    number: int,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    indices: tuple[int, ...] | None,
    heun: int | None,
    churn: tuple[float, ...] | None,
    seed: int,
    label: str | None,
    shard: int | None,
    address: str | None,
    conditions: tuple[str, ...],
    encoder: tuple[Path, ...],
    first: int,
    batch: int,
    device: str | None,
    variant: str,
    tolerance_db: float | None,
    precision: str | None,
    sha256: str | None,
    threads: int | None,
) -> None:
    """Draw samples from MODEL and write them to --out: images, or arrays where the model draws other data.

    MODEL is an exported file, .onnx, .xml or .engine; where PyTorch is installed also a checkpoint of any kind.
    """
    import cmfast
    from cmfast.cli.conditions import read_conditions
    from cmfast.formats.table import model_sha256
    from cmfast.images import check_fits, check_output, save_samples
    from cmfast.sampling import Churn, heun_calls
    from cmfast.shards.drawing import SHARD, Drawer, Here, ShardRequest, draw_shards
    from cmfast.shards.files import check_shard_folder
    from cmfast.shards.on_ray import OnRay
    from cmfast.shards.sent import How, described, files_sha256, read_model

    shards = shard is not None or address is not None
    if shards:
        out = Path("samples") if out is None else out
        check_shard_folder(out, inputs=[model])
        if variant == "auto" or tolerance_db is not None:
            raise CmfastError("shards must not depend on the machine that draws them: name the backend instead of auto")
    elif out is not None:
        check_output(out, inputs=[model], arrays=True)
    if number < 1:
        raise CmfastError(f"-n: the number of samples must be at least 1, got {shown(number)}")
    check_threads(threads)
    if heun is not None and (steps, sigmas, indices) != (None, None, None):
        raise CmfastError("--heun has noise levels of its own; remove --steps, --sigmas and --indices, or --heun")
    if churn is not None and heun is None:
        raise CmfastError("--churn requires --heun N, such as --heun 18")
    if churn is not None and len(churn) > 4:
        raise CmfastError(f"--churn takes S_churn,S_tmin,S_tmax,S_noise, at most four numbers, got {len(churn)}")
    stochastic = Churn(**dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), churn or (), strict=False)))
    drawer: Drawer | None = None
    if address is not None:
        files = read_model(model, sha256)
        drawer = OnRay(address, files, How.of(model, device, threads, variant, precision or "", sha256))
        loaded, digest = described(files, model, encoder), files_sha256(files)
    else:
        digest = model_sha256(model) if shards else ""
        loaded = cmfast.load(
            model, device, threads, variant=variant, precision=precision or "", sha256=sha256, encoder=encoder,
            tolerance_db=tolerance_db,
        )  # fmt: skip
    if out is None:
        out = Path("samples.png" if loaded.spec.data == "image" else "samples.npz")
        check_output(out, inputs=[model])
    if not shards:
        check_fits(out, number, loaded.spec)
    given = read_conditions(loaded.conditions, conditions, label)
    if indices is not None:
        if steps is not None or sigmas is not None:
            raise CmfastError("--indices, --steps and --sigmas exclude each other; pass one of them")
        sigmas = loaded.spec.sigmas_at(indices)
    if heun is not None:
        how = f"{heun} Heun step(s), {heun_calls(heun)} network call(s) per sample"
    else:
        sigmas = loaded.sigmas_for(steps, sigmas)
        some = ", ".join(f"{sigma:g}" for sigma in sigmas[:20]) + (", .." if len(sigmas) > 20 else "")
        how = f"{len(sigmas)} step(s) at {some}"
    if shards:
        request = ShardRequest(
            n=number, first=first, shard=SHARD if shard is None else shard, sigmas=sigmas or (), heun=heun,
            churn=stochastic, seed=seed, batch=batch, precision=precision or "", conditions=given,
        )  # fmt: skip
        drawer = drawer or Here(loaded)
        with redirect_stdout(sys.stderr):  # what Ray says about lost workers goes to stdout, and so does the result
            drawn, before = draw_shards(loaded, digest, request, out, drawer, show=True)
        by = f", {drawer.name}" if drawn else ""
        click.echo(f"{out}: {drawn} shard(s) drawn, {before} there before: {how}{by}")
        return
    bar = number > batch
    if heun is not None:
        samples = loaded.sample_heun(
            number, steps=heun, churn=stochastic, seed=seed, conditions=given, batch=batch, first=first, progress=bar
        )
    else:
        samples = loaded.sample(
            number, sigmas=sigmas, seed=seed, conditions=given, batch=batch, first=first, progress=bar
        )
    classes = loaded.labels(number, seed=seed, label=given.get("label"), first=first) if loaded.spec.classes else None
    save_samples(out, samples, classes)
    click.echo(f"{out}: {number} {loaded.noun.removesuffix('s')}(s), {how}, {loaded.backend.name}")
    for choice in getattr(loaded.backend, "choices", {}).values():
        click.echo(f"auto: {choice}")


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
