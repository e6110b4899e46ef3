# SPDX-License-Identifier: MIT
"""cmfast-export: the command. It parses and prints; `request` checks the request, `conversion` fulfils it.

torch is imported after the arguments have been understood.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from cmfast.cli.parameters import FLOATS, SET, SOURCE
from cmfast.cli.running import needs, run_command
from cmfast.formats.values import PRECISIONS
from cmfast_export import AUTO, INT8
from cmfast_export.graphs.garbage import uncollected
from cmfast_export.targets.table import NAMES

EPILOG = """\b
Examples:
  cmfast-export model.pt                                        model.onnx: the denoiser, any noise level
  cmfast-export model.pt --kind sampler --steps 2 -o two.onnx   the whole loop in one graph
  cmfast-export model.pt --precision fp16                       model_fp16.onnx: half precision, for GPUs
  cmfast-export model.pt --precision int8                       model_int8.onnx: for CPUs
  cmfast-export model.pt --format ort-cuda --precision fp16     for ONNX Runtime's CUDA provider
  cmfast-export model.pt --format engine --kind sampler --steps 2 --precision fp16      TensorRT
  cmfast-export model.onnx --format engine --build batch=1,16,256 --target 8.9,12.0     TensorRT-RTX, for other cards
  cmfast-export model.pt --format openvino --precision bf16                             model_bf16.xml and .bin: CPUs
  cmfast-export model.pt --format ort                           model.ort: ONNX Runtime's minimal builds
  cmfast-export model.pt --format triton --steps 2 -o repository                        Triton Inference Server
  cmfast-export model.pt --format web --build fetch=true -o site                        a page that draws in the browser
  cmfast-export l4.engine h100.engine --format triton -o repository                     one engine per kind of card
  cmfast-export cd_imagenet64_l2.pt                             OpenAI's, known by its name
  cmfast-export ema.pt --source openai --set image_size=64 --set head_channels=64 --set scaling=boundary
  cmfast-export diffusers-ct_imagenet64                         a diffusers folder
  cmfast-export edm-cifar10-32x32-uncond-vp.pkl --format cmfast -o teacher.pt
  cmfast-export model.pt --format diffusers -o folder           and back
  cmfast-export weights.pt --network policy.net:make --spec spec.json --kind sampler    a network of your own
"""


@click.command("cmfast-export", epilog=EPILOG)
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.argument("others", nargs=-1, metavar="[ENGINE]...", type=click.Path(path_type=Path))
@click.option("--network", default="", metavar="MODULE:FACTORY", help="A network of your own: imported and called.")
@click.option("--spec", type=click.Path(path_type=Path), help="JSON: the conventions of that network.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="What to write; default: a name beside CHECKPOINT.")
@click.option(
    "--format",
    "form",
    metavar=f"[{'|'.join(NAMES)}]",
    default="onnx",
    show_default=True,
    help="onnx: a graph; ort-cuda: one for ONNX Runtime's CUDA provider; engine: TensorRT's; openvino: its IR; "
    "ort: ONNX Runtime's own format; ncnn: a folder for ncnn; triton: a model repository; web: a page for "
    "browsers; cmfast: a checkpoint; diffusers: its folder.",
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
    type=click.Choice([*PRECISIONS, INT8, AUTO]),
    default="fp32",
    show_default=True,
    help="What the network computes in; int8: for CPUs; auto: the fastest within --tolerance.",
)
@click.option(
    "--encoder", multiple=True, metavar="[NAME=]FILE", help="Write the encoder of a condition apart, into FILE."
)
@click.option("--weights", type=click.Choice(["fp16"]), help="Store float16 weights: half the file.")
@click.option("--guidance", type=float, help="Sampler: weight of classifier-free guidance, two evaluations per step.")
@click.option("--null", multiple=True, metavar="NAME=NUMBER", help="With guidance: what stands for no condition.")
@click.option(
    "--tolerance", type=float, help="Largest difference from float32 PyTorch; default: by precision and device."
)
@click.option("--tolerance-db", type=float, help="Int8: least PSNR from float32 PyTorch, dB; default: 40.")
@click.option(
    "--calibration", multiple=True, metavar="NAME=VALUE", help="Int8: samples=32, seed=0, data=CONDITIONS.npz."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device for verifying, and for timing with auto.",
)
@click.option("--target", help="Engine by TensorRT-RTX: compute capabilities, for example 8.9,12.0; default: all.")
@click.option(
    "--build", multiple=True, metavar="NAME=VALUE", help="Engine: batch=1,8,64, library, level, ...; web: fetch, ..."
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    envvar="CMFAST_CACHE",
    help="Engine: cache engines by content in this folder; default: $CMFAST_CACHE.",
)
@click.option(
    "--serve", multiple=True, metavar="NAME=VALUE", help="Triton: max_batch, queue_delay_us, instances, device, name."
)
@SOURCE
@SET
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be written and stop.")
def command(
    checkpoint: Path | None,
    others: tuple[Path, ...],
    network: str,
    spec: Path | None,
    out: Path | None,
    form: str,
    kind: str | None,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    batch: str,
    opset: int | None,
    precision: str,
    encoder: tuple[str, ...],
    weights: str | None,
    guidance: float | None,
    null: tuple[str, ...],
    tolerance: float | None,
    tolerance_db: float | None,
    calibration: tuple[str, ...],
    device: str,
    target: str | None,
    build: tuple[str, ...],
    cache: Path | None,
    serve: tuple[str, ...],
    source: str,
    assignments: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Export CHECKPOINT and verify the file against PyTorch.

    CHECKPOINT is a cmfast model (.pt, .safetensors), OpenAI's, the first public implementation's or EDM's weights, or a
    diffusers folder; for engines and Triton also a verified .onnx file; for Triton also engines, one per kind of card.
    cmfast-info says what a file is. With --network it is the weights of a network of your own, or left out.
    """
    asks = click.get_current_context().get_parameter_source
    with needs("cmfast-export", "export,cpu"), uncollected():
        from cmfast_export.request import make_request

        request = make_request(
            model=checkpoint,
            engines=others,
            network=network,
            spec=spec,
            out=out,
            form=form,
            kind=kind,
            steps=steps,
            sigmas=sigmas,
            batch=batch,
            opset=opset,
            precision=precision,
            encoder=encoder,
            weights=weights or "",
            guidance=guidance,
            null=null,
            tolerance=tolerance,
            tolerance_db=tolerance_db,
            calibration=calibration,
            device=device,
            build=(*build, *([f"target={target}"] if target is not None else [])),
            serve=serve,
            cache=cache,
            cache_given=asks("cache") is ParameterSource.COMMANDLINE,
            source=source,
            assignments=assignments,
        )
    if dry_run:
        click.echo(f"would write {request.out}: {request.what}")
        return
    with needs("cmfast-export", "export,cpu"), uncollected():
        from cmfast_export import report
        from cmfast_export.conversion import convert
    report.finished(convert(request, seen=lambda found: report.graph(found, request)), request)


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
