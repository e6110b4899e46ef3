# SPDX-License-Identifier: MIT
"""cmfast-info: what a model file says about itself. Needs neither PyTorch nor an engine for exported files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cmfast.artifact import Manifest, check_file, read_onnx
from cmfast.cli._run import run_command

EPILOG = """\b
Examples:
  cmfast-info model.onnx
  cmfast-info model.onnx --json | jq .parity
"""


@click.command("cmfast-info", epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(model: Path, as_json: bool) -> None:
    """Say what MODEL is: kind, images, noise levels, conventions, versions, agreement with PyTorch."""
    file = check_file(model)
    versions: dict[str, int] = {}
    if file.suffix == ".onnx":
        manifest, versions = read_onnx(file)
    else:
        from cmfast.engines import open_engine

        manifest = open_engine(file).manifest
    if as_json:
        click.echo(manifest.to_json())
        return
    for name, value in _lines(file, manifest, versions):
        click.echo(f"{name:<12} {value}")


def _lines(file: Path, manifest: Manifest, versions: dict[str, int]) -> list[tuple[str, str]]:
    spec = manifest.spec
    steps = "; ".join(f"{k}: {', '.join(f'{s:g}' for s in v)}" for k, v in sorted(spec.sigmas.items()))
    lines = [
        ("file", f"{file}, {file.stat().st_size / 2**20:.1f} MiB"),
        ("kind", manifest.kind),
        ("image", " x ".join(map(str, spec.image)) + " (channels, height, width)"),
        ("classes", str(spec.classes) if spec.classes else "unconditional"),
        ("sigma", f"{spec.sigma_min:g} to {spec.sigma_max:g}, data {spec.sigma_data:g}"),
        ("steps", steps),
        (
            "conventions",
            f"scaling {spec.scaling}, c_noise {spec.c_noise}, renoise {spec.renoise}, clip {str(spec.clip).lower()}",
        ),
        ("dtype", manifest.dtype),
        ("source", json.dumps(dict(manifest.source))),
        ("made by", ", ".join(f"{k} {v}" for k, v in manifest.made_by.items())),
    ]
    if versions:
        lines.append(("onnx", f"IR {versions['ir']}, opset {versions['opset']}"))
    if manifest.parity:
        lines.append(("parity", ", ".join(f"{k} {v:g}" for k, v in manifest.parity.items())))
    return lines


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
