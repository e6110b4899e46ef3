# SPDX-License-Identifier: MIT
"""cmfast-info: what a model file is. Needs neither PyTorch nor an engine for exported files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cmfast.artifact import Manifest, check_model, model_bytes, read_onnx
from cmfast.cli._run import needs, run_command
from cmfast.cli._types import SET, SOURCE
from cmfast.errors import CmfastError

EPILOG = """\b
Examples:
  cmfast-info model.onnx
  cmfast-info model.onnx --json | jq .parity
  cmfast-info cd_imagenet64_l2.pt                 a foreign file: what it is, and what says so
  cmfast-info model000100.pt --source openai      what still has to be told
"""


@click.command("cmfast-info", epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@SOURCE
@SET
def command(model: Path, as_json: bool, source: str, assignments: tuple[str, ...]) -> None:
    """Say what MODEL is: kind, images, noise levels, conventions, versions, agreement with PyTorch.

    MODEL is an exported file, a checkpoint, a foreign file of weights or a diffusers folder.
    """
    file = check_model(model)
    if file.suffix == ".onnx":
        if source or assignments:
            raise CmfastError(f"{file}: an exported file says everything itself; leave --source and --set out")
        manifest, versions = read_onnx(file)
        click.echo(manifest.to_json() if as_json else _table(_lines(file, manifest, versions)))
        return
    from importlib.metadata import entry_points  # slow to import, and .onnx does without

    found = entry_points(group="cmfast.describe", name="folder" if file.is_dir() else file.suffix.removeprefix("."))
    if not found:
        from cmfast.engines import open_engine

        manifest = open_engine(file).manifest
        click.echo(manifest.to_json() if as_json else _table(_lines(file, manifest, {})))
        return
    with needs(f"reading {'a model folder' if file.is_dir() else f'a {file.suffix} file'}", "train"):
        describe = next(iter(found)).load()
    own, lines = describe(file, source, assignments, as_json)
    if as_json:
        click.echo(own.to_json())
    else:
        click.echo(_table(_lines(file, own, {}) if own else [("file", str(file)), *lines]))


def _table(lines: list[tuple[str, str]]) -> str:
    width = max(12, *(len(name) for name, _ in lines))
    return "\n".join(f"{name:<{width}} {value}" for name, value in lines)


def _lines(file: Path, manifest: Manifest, versions: dict[str, int]) -> list[tuple[str, str]]:
    spec = manifest.spec
    steps = "; ".join(f"{k}: {', '.join(f'{s:g}' for s in v)}" for k, v in sorted(spec.sigmas.items()))
    lines = [
        ("file", f"{file}, {model_bytes(file) / 2**20:.1f} MiB"),
        ("kind", manifest.kind),
        ("image", " x ".join(map(str, spec.image)) + " (channels, height, width)"),
        ("classes", str(spec.classes) if spec.classes else "unconditional"),
        ("sigma", f"{spec.sigma_min:g} to {spec.sigma_max:g}, data {spec.sigma_data:g}"),
        ("steps", steps),
        (
            "conventions",
            f"scaling {spec.scaling}, c_noise {spec.c_noise}, renoise {spec.renoise}, clip {str(spec.clip).lower()}"
            + (f", grid of {spec.grid} levels" if spec.grid else ""),
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
