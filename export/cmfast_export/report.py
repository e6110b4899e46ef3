# SPDX-License-Identifier: MIT
"""What cmfast-export says at the end: how far the file is from PyTorch, and what to type next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmfast.conditions import in_words, sample_arguments
from cmfast.formats.table import ONNX, files_beside, format_of
from cmfast_export.targets.table import at

if TYPE_CHECKING:
    from cmfast.formats.manifest import Manifest
    from cmfast_export.encoder_files import EncoderFile
    from cmfast_export.pipeline import Exported
    from cmfast_export.precision_search import Choice
    from cmfast_export.request import Request
    from cmfast_export.targets.diffusers_folder import Written as Folder
    from cmfast_export.targets.ncnn.folder import Written as NcnnFolder
    from cmfast_export.targets.openvino_ir import Converted
    from cmfast_export.targets.ort_format import Converted as OrtConverted
    from cmfast_export.targets.tensorrt_engine import Built
    from cmfast_export.targets.triton_repository import Written as Repository
    from cmfast_export.targets.web.page import Written as Page


def finished(found: object, request: Request) -> None:
    """Print what a target's writer returned, as its row says."""
    if request.target.report:
        at(request.target.report)(found, request)
    else:
        click.echo(f"{request.out}: written, {request.target.name}")


def graph(found: Choice, request: Request) -> None:
    """Report the graph that a target is made from."""
    if found.tried:
        choice(found)
    parity(found.exported, request.out)


def onnx(found: Choice, request: Request) -> None:
    """Report an ONNX file."""
    exported, checkpoint, given = found.exported, request.model, request.given
    graph(found, request)
    if exported.int8:
        click.echo(exported.int8.in_words)
        if exported.int8.machine:
            click.echo(exported.int8.machine)
    if exported.left:
        many = ", ".join(f"{count} {name}" for name, count in exported.left.items())
        click.echo(f"in float32 inside the network: {many}")
    for note in exported.notes:
        click.echo(note)
    for encoder in exported.encoders:
        (made, about) = (encoder.manifest.encoded, encoder.manifest)
        assert made
        click.echo(
            f"{encoder.path}: encoder of {about.spec.conditions[0].name} to {in_words(made)}, {about.dtype}, at most "
            f"{encoder.parity.worst.max_abs:.1e} from PyTorch"
        )
    size = exported.path.stat().st_size / 2**20
    manifest = exported.manifest
    precision = "int8" if exported.int8 else manifest.dtype
    click.echo(
        f"{exported.path}: {manifest.kind}, {precision}, {size:.1f} MiB, exported and verified in "
        f"{exported.seconds:.1f} s"
    )
    if exported.data:
        click.echo(f"its weights, too many for one file, are in {exported.data}; keep the two together")
    if exported.rewritten:
        _ort_cuda(exported, checkpoint, given)
        return
    click.echo("next:")
    if manifest.dtype in ("tf32", "bfloat16"):  # nothing of a CPU runs these
        click.echo(f"  cmfast-export {exported.path} --format engine")
        return
    click.echo(_sample(exported.path, manifest, exported.encoders))
    if exported.int8:
        click.echo(f"  cmfast-sample {exported.path} --variant openvino --precision bf16 ...    # the rest in bfloat16")
    if not request.own:
        _bench(exported.path, checkpoint, given)


def _ort_cuda(exported: Exported, checkpoint: Path, given: str) -> None:
    made = exported.rewritten
    assert made
    found = f"{made.group_norms} GroupNorm, {made.attentions} MultiHeadAttention"
    kept = f"; {made.group_norms_left} norms stay, whose groups the kernel refuses" if made.group_norms_left else ""
    click.echo(f"for ONNX Runtime's CUDA provider alone: {found}{kept}")
    if "no CUDA kernel run" in exported.manifest.made_by["verified"]:
        click.echo("its CUDA kernels have not been run here; --device cuda verifies them where there is a GPU")
    click.echo("next, where there is one:")
    click.echo(f"  cmfast-sample {exported.path} -n 16 -o samples.png --device cuda --variant nhwc")
    _bench(exported.path, checkpoint, given, ' --device cuda --variants "nhwc,nhwc cuda_graph"')


def parity(exported: Exported, path: Path) -> None:
    """Print the table of differences from PyTorch; `path` is the requested file."""
    from rich.console import Console
    from rich.table import Table

    parts = [part for part in (exported.denoiser, exported.sampler) if part]
    columns = ["compared at", "float32 PyTorch"]
    if parts[0].same:
        columns.append(f"{exported.manifest.dtype} PyTorch")
    if parts[0].as_is:
        columns.append("as this CPU runs it")
    int8, images = exported.int8, exported.manifest.spec.data == "image"
    scaled = not int8 and any(row.factor > 1 for part in parts for row in part.parity.rows)
    if scaled:
        columns.append("allowed")
    if int8:
        columns += ["dB", *["grey levels"] * images]
    how = exported.manifest.made_by["verified"]
    allowed = f"{int8.allowed_db:g} dB needed" if int8 else f"{exported.tolerance:.0e} allowed"
    click.echo(f"{path.name} against PyTorch: largest difference, {allowed}, by {how}")
    table = Table(*columns)
    for part in parts:
        others = [each.rows for each in (part.same, part.as_is) if each]
        for index, row in enumerate(part.parity.rows):
            each = [rows[index] for rows in (part.parity.rows, *others)]
            far = [f"{one.largest if int8 else one.difference:.1e}" for one in each]
            more = [f"{exported.tolerance * row.factor:.1e}"] if scaled else []
            more += [f"{row.psnr_db:.1f}", f"{row.grey_levels:.2g}"] if int8 else []
            table.add_row(row.where, *far, *more[: len(columns) - 2])
        if part.parity.boundary is not None:
            table.add_row("boundary: f(x, sigma_min) against x", f"{part.parity.boundary:.1e}")
    if scaled:
        click.echo("more is allowed where the scaling multiplies what the network predicts: |c_out(sigma)|")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if int8 and images:
        click.echo("grey levels: root mean square, in steps of an 8-bit image")


def choice(chosen: Choice) -> None:
    """Say which precision auto took, and why."""
    for each in chosen.tried:
        time = "" if each.median_ms is None else f", {each.median_ms:.2f} ms an image"
        far = each.why if each.max_abs is None else f"{each.max_abs:.1e} from float32 PyTorch"
        click.echo(f"{each.precision}: {far}{time}")
    why = f"the fastest, by {chosen.timed}" if chosen.timed else "not timed here; first by the rates of matrix units"
    click.echo(f"precision {chosen.precision}: {why}")


def engine(built: Built, request: Request) -> None:
    """Report an engine file."""
    source, given = request.model, request.given
    about = built.manifest.engine
    cards = ", ".join(about["compute_capability"]) or "all cards that it supports"
    least, often, most = about["batch"]
    made = "copied from the cache" if built.cached else "built"
    size = built.path.stat().st_size / 2**20
    batch = f"batch {least} to {most}, best at {often}" if least < most else f"batch {most}"
    click.echo(
        f"{built.path}: {built.manifest.kind}, {built.manifest.dtype}, {size:.1f} MiB, {batch}\n"
        f"{made} in {built.seconds:.1f} s, by {about['library']} {about['version']} for {cards}"
    )
    if built.parity:
        worst = built.parity.worst
        click.echo(f"run here, at most {worst.max_abs:.1e} from its ONNX file, at {worst.where}")
    elif about["max_abs"][:1].isdigit():
        click.echo(f"not run here: {built.not_run}; where it was, it was {about['max_abs']} from its ONNX file")
    else:
        click.echo(f"not run: {built.not_run}; the ONNX file that it was built from is verified")
    click.echo(f"sha256 {built.sha256}")
    click.echo("An engine is native code: load only what you trust.")
    click.echo("next, where there is such a card:" if built.not_run else "next:")
    click.echo(f"  cmfast-info {built.path}")
    click.echo(_sample(built.path, built.manifest))
    if format_of(source) is not ONNX and not request.own:
        _bench(built.path, source, given, " --device cuda")


def openvino(converted: Converted, request: Request) -> None:
    """Report an IR: how far it is from PyTorch as this CPU runs it, at each noise level."""
    from rich.console import Console
    from rich.table import Table

    path, manifest = converted.path, converted.manifest
    images = manifest.spec.data == "image"
    how = manifest.made_by["verified"]
    click.echo(f"{path.name} against {converted.against} in float32: {converted.tolerance:.0e} allowed, by {how}")
    table = Table("compared at", "largest difference", "dB", *["grey levels"] * images)
    for row in converted.parity.rows:
        grey = [f"{row.grey_levels:.2g}"] * images
        table.add_row(row.where, f"{row.difference:.1e}", f"{row.psnr_db:.1f}", *grey)
    if converted.parity.boundary is not None:
        table.add_row("boundary: f(x, sigma_min) against x", f"{converted.parity.boundary:.1e}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if images:
        click.echo("grey levels: root mean square, in steps of an 8-bit image")
    size = sum(file.stat().st_size for file in (path, *files_beside(path))) / 2**20
    click.echo(
        f"{path} and {path.with_suffix('.bin').name}: {manifest.kind}, {manifest.dtype}, {size:.1f} MiB, exported and "
        f"verified in {converted.seconds:.1f} s"
    )
    click.echo("next:")
    click.echo(_sample(path, manifest))
    if format_of(request.model) is None and not request.own:
        _bench(path, request.model, request.given)


def _sample(path: Path, manifest: Manifest, encoders: Sequence[EncoderFile] = ()) -> str:
    """Return the command that draws from a file."""
    made = {each.manifest.output: each.manifest.spec.conditions[0].name for each in encoders}
    more = "".join(f" --encoder {each.path}" for each in encoders)
    return f"  cmfast-sample {path} -n 16{more}{sample_arguments(manifest.spec.conditions, manifest.spec.data, made)}"


def _bench(path: Path, checkpoint: Path, given: str, more: str = "") -> None:
    if given:  # cmfast-bench does not take what was passed about a foreign file
        baseline = path.with_suffix(".pt")
        click.echo(f"  cmfast-export {checkpoint} {given} --format cmfast -o {baseline}")
        checkpoint = baseline
    click.echo(f"  cmfast-bench {path} --baseline {checkpoint}{more}")


def repository(written: Repository, request: Request) -> None:
    """Report a model repository of Triton."""
    from cmfast_export.targets.triton_repository import client_example

    client = client_example(written)
    images = f"exactly {written.batch}" if written.batch else f"at most {written.max_batch}"
    about = f"{written.name}, {written.backend}, {images} images a request"
    click.echo(f"{written.path}: a model repository with {about}")
    if written.tensorrt:
        cards = ", ".join(written.capabilities) or "any card"
        click.echo(f"the server must have TensorRT {written.tensorrt}; its plans are for {cards}")
    click.echo("next:")
    click.echo(" ".join([f"  tritonserver --model-repository {written.path}", *written.arguments]))
    click.echo("and in Python:")
    click.echo("".join(f"  {line}\n" for line in client.splitlines()).rstrip())


def ort_format(made: OrtConverted, request: Request) -> None:
    """Report an .ort file."""
    size, worst = made.path.stat().st_size / 2**20, made.parity.worst
    click.echo(
        f"{made.path}: {made.manifest.kind}, {made.manifest.dtype}, {size:.1f} MiB, written by ONNX Runtime "
        f"{made.version} in {made.seconds:.1f} s\n"
        f"run here, at most {worst.max_abs:.1e} from its ONNX file, at {worst.where}\n"
        f"{made.operators}: the operators and types that a minimal build needs (--include_ops_by_config)"
    )
    click.echo("next:")
    click.echo(_sample(made.path, made.manifest))


def page(written: Page, request: Request) -> None:
    """Report a page."""
    click.echo(
        f"{written.path}: a page with onnxruntime-web {written.version}, {written.files} files, "
        f"{written.size / 1e6:.1f} MB in all, the largest {written.largest / 1e6:.1f} MB"
    )
    click.echo("next, then open http://localhost:8000 in a browser:")
    click.echo(f"  python -m http.server 8000 --bind 127.0.0.1 --directory {written.path}")


def ncnn(written: NcnnFolder, request: Request) -> None:
    """Report a folder for ncnn."""
    size = (written.path / "model.bin").stat().st_size / 2**20
    worst = written.parity.worst
    click.echo(
        f"{written.path}: model.param, model.bin ({size:.1f} MiB, float32) and manifest.json, converted by pnnx in "
        f"{written.seconds:.1f} s\n"
        f"run by ncnn {written.version} here, at most {worst.max_abs:.1e} from PyTorch, at {worst.where}"
    )
    click.echo("next:")
    click.echo(_sample(written.path, written.manifest))


def checkpoint(_: None, request: Request) -> None:
    """Report a cmfast checkpoint."""
    click.echo(f"{request.out}: a cmfast checkpoint of {request.model}\nnext: cmfast-export {request.out}")


def folder(written: Folder, request: Request) -> None:
    """Report a folder of diffusers."""
    click.echo(f"{written.path}: a folder of diffusers, read back and equal to the bit")
    if not written.trained_grid:
        click.echo(f"diffusers samples on a grid, and this model has none: it was given one of {written.grid} levels")
    if written.limits:
        click.echo(written.limits)
    more = ', output_type="np"' if "output_type" in written.limits else ""
    click.echo("next, in Python:")
    click.echo(f'  pipeline = diffusers.ConsistencyModelPipeline.from_pretrained("{written.path}")')
    for steps, timesteps in written.timesteps.items():
        sigmas = ", ".join(f"{sigma:g}" for sigma in timesteps.sigmas)
        click.echo(f"  pipeline(timesteps={list(timesteps.indices)}{more})    # {steps} step(s), at {sigmas}")
