# SPDX-License-Identifier: MIT
"""cmfast-info: what a model file is. Exported files need neither PyTorch nor a backend."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmfast.cli.parameters import MODEL, SET, SOURCE
from cmfast.cli.running import needs, run_command
from cmfast.conditions import in_words
from cmfast.errors import CheckFailed, CmfastError, CmfastWarning, printable
from cmfast.formats.manifest import INT8, Manifest, as_verified, check_model, file_sha256, read_onnx
from cmfast.formats.table import ONNX, format_of, model_bytes, read_manifest

if TYPE_CHECKING:
    from cmfast.bench.fastest import Choice

NAMES = 20  # of classes that are shown
CHANGED = "its graph or its weights were changed since they were verified"

EPILOG = """\b
Examples:
  cmfast-info model.onnx
  cmfast-info model.onnx --json | jq .parity
  cmfast-info model.onnx --selftest               does this machine compute the same?
  cmfast-info model.engine                        TensorRT's, without TensorRT and without a GPU
  cmfast-info cd_imagenet64_l2.pt                 a foreign file: what it is, and how that is known
  cmfast-info model000100.pt --source openai      what you still have to specify
"""


@click.command("cmfast-info", epilog=EPILOG)
@click.argument("model", type=MODEL)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("--selftest", "tested", is_flag=True, help="Run the file on this machine and compare: its self-test.")
@SOURCE
@SET
def command(model: Path, as_json: bool, tested: bool, source: str, assignments: tuple[str, ...]) -> None:
    """Describe MODEL: kind, images, noise levels, conventions, versions, agreement with PyTorch.

    MODEL is an exported file, a checkpoint, a foreign file of weights or a diffusers folder.
    """
    file = check_model(model)
    if tested:
        click.echo(_selftest(file))
        return
    if known := format_of(file):
        if source or assignments:
            raise CmfastError(f"{file}: an exported file already holds these facts; remove --source and --set")
        manifest, versions = read_onnx(file) if known is ONNX else (read_manifest(file), {})
        verified = as_verified(file, manifest) if known is ONNX else True
        if as_json and verified is False:
            warnings.warn(f"{file}: {CHANGED}; its parity and cost are left out", CmfastWarning, stacklevel=1)
            manifest = replace(manifest, parity={}, cost={})
        click.echo(manifest.to_json(0) if as_json else _table(lines_of(file, manifest, versions, verified)))
        return
    from importlib.metadata import entry_points  # slow to import, and .onnx does without

    found = entry_points(group="cmfast.describe", name="folder" if file.is_dir() else file.suffix.removeprefix("."))
    if not found:
        from cmfast.backends import open_backend

        manifest = open_backend(file).manifest
        click.echo(manifest.to_json(0) if as_json else _table(lines_of(file, manifest, {})))
        return
    with needs(f"reading {'a model folder' if file.is_dir() else f'a {file.suffix} file'}", "train"):
        describe = next(iter(found)).load()
    own, lines = describe(file, source, assignments, as_json)
    if as_json:
        click.echo(own.to_json(0))
    else:
        click.echo(_table(lines_of(file, own, {}) if own else [("file", str(file)), *lines]))


def _selftest(file: Path) -> str:
    """Return one line about how far this machine is from what the exporter recorded; beyond what is allowed, raise."""
    if format_of(file) is None:
        raise CmfastError(f"{file}: only exported files have a self-test")
    from cmfast.formats.selftest import run_selftest
    from cmfast.model import load

    opened = load(file)
    result = run_selftest(opened, opened.manifest.selftest)
    said = f"differs by {result.max_abs:.3g} from what was recorded, and {result.atol:g} is allowed"
    if not result.passed:
        raise CheckFailed(f"{file}: self-test failed: {opened.backend.name} {said}")
    return f"self-test passed: {opened.backend.name} {said}"


def _table(lines: list[tuple[str, str]]) -> str:
    width = max(12, *(len(name) for name, _ in lines))
    return "\n".join(f"{printable(name):<{width}} {printable(value)}" for name, value in lines)


def lines_of(
    file: Path, manifest: Manifest, versions: dict[str, int], verified: bool | None = True
) -> list[tuple[str, str]]:
    """Return lines (name, value); `verified`: the file computes what its manifest says, None: that is not recorded."""
    spec = manifest.spec
    steps = "; ".join(f"{k}: {', '.join(f'{s:g}' for s in v)}" for k, v in sorted(spec.sigmas.items()))
    sampling = [
        ("sigma", f"{spec.sigma_min:g} to {spec.sigma_max:g}, data {spec.sigma_data:g}"),
        ("steps", steps),
        (
            "conventions",
            f"scaling {spec.scaling}, c_noise {spec.c_noise}, renoise {spec.renoise}, clip {str(spec.clip).lower()}"
            + (f", grid of {spec.grid} levels" if spec.grid else ""),
        ),
    ]
    lines = [
        ("file", f"{file}, {model_bytes(file) / 2**20:.1f} MiB"),
        ("kind", manifest.kind),
        *_data_lines(manifest),
        *(() if manifest.encoded else sampling),
        (
            "dtype",
            manifest.dtype
            + (", int8 products" if INT8 in manifest.made_by else "")
            + (" when it was exported" if verified is False else ""),
        ),
        ("source", json.dumps(dict(manifest.source))),
        (
            "made by",
            ", ".join(f"{k} {v}" for k, v in manifest.made_by.items() if verified is not False or k != "verified"),
        ),
    ]
    if versions:
        lines.append(("onnx", f"IR {versions['ir']}, opset {versions['opset']}"))
    if verified is False:
        return [*lines, ("verified", f"no: {CHANGED}; export the model again")]
    if manifest.parity and verified is None:
        lines.append(("unchecked", "its manifest has no digest, so a change after its verification would not show"))
    if manifest.parity:
        lines.append(("parity", ", ".join(f"{k} {v:g}" for k, v in manifest.parity.items())))
    if manifest.cost:
        one = "an image" if spec.data == "image" else "a sample"
        lines.append((one, ", ".join(f"{k.replace('_', ' ')} {v:,.0f}" for k, v in manifest.cost.items())))
    lines += [("auto", f"{choice}, as remembered in $CMFAST_CACHE") for choice in _remembered(file)]
    return [*lines, *_engine_lines(file, manifest)] if manifest.engine else lines


def _remembered(file: Path) -> list[Choice]:
    """Return what the variant "auto" chose for a file on this machine."""
    if not os.environ.get("CMFAST_CACHE"):
        return []
    from cmfast.bench.fastest import remembered

    return remembered(file)


def _data_lines(manifest: Manifest) -> list[tuple[str, str]]:
    """Return what the model draws, and from what."""
    spec, image = manifest.spec, manifest.spec.data == "image"
    if manifest.encoded:
        (taken,) = spec.conditions
        return [(each.name, in_words(each)) for each in (taken, manifest.encoded)]
    sides = " x ".join(map(str, spec.shape))
    lines = [("image", f"{sides} (channels, height, width)") if image else ("shape", f"{sides} (array)")]
    if image or spec.label:
        lines.append(("classes", _classes(manifest)))
    others = [each for each in spec.conditions if each is not spec.label]
    lines += [("condition", f"{each.name}: {in_words(each)}") for each in others]
    lines += [("encoder", f"of {name}, in a file of its own: --encoder FILE") for name in manifest.encoders]
    return [*lines, ("second time", "sigma_next: a flow map")] if spec.second_time else lines


def _classes(manifest: Manifest) -> str:
    spec = manifest.spec
    if not spec.class_names:
        return str(spec.classes) if spec.classes else "unconditional"
    names = list(spec.class_names)
    if len(names) > NAMES:
        names[NAMES - 1 : -1] = ["..."]
    return f"{spec.classes}: {', '.join(names)}"


def _engine_lines(file: Path, manifest: Manifest) -> list[tuple[str, str]]:
    about = manifest.engine
    least, often, most = about.get("batch", ("?", "?", "?"))
    cards = ", ".join(about.get("compute_capability", ())) or "every card that the library supports"
    ran = str(about.get("max_abs", "")).strip()
    return [
        ("engine", f"{about.get('library')} {about.get('version')}, {about.get('platform')}"),
        ("for", f"compute capability {cards}" if about.get("compute_capability") else cards),
        ("batch", f"{least} to {most}, best at {often}"),
        ("onnx sha256", str(about.get("onnx_sha256"))),
        ("run", f"{ran} from its ONNX file" if ran[:1].isdigit() else "not run where it was built"),
        ("sha256", file_sha256(file)),
    ]


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
