# SPDX-License-Identifier: MIT
"""What int8 costs a trained model: the Fréchet distance of its samples beside that of float32's, the same noise.

    python benchmarks/int8.py digits runs/digits/model.pt --json benchmarks/results/int8_digits.json

Both files are exported, verified and run by ONNX Runtime. Int8 is refused, and the script fails, where the distance
is more than 5 % larger at any number of steps.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

import cmfast
from cmfast.bench.timing import provenance
from cmfast.cli.parameters import INTS
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed
from cmfast.files import check_outputs, write_text
from cmfast_export.int8.options import TOLERANCE_DB
from cmfast_export.pipeline import export_onnx
from cmfast_train.config.presets import DATA_SETS
from cmfast_train.evaluation.config import EvalConfig
from cmfast_train.evaluation.run import evaluate

MOST_WORSE = 1.05  # Fréchet distance of int8 over that of float32
COMPARED = 64  # samples whose pixels are compared


@click.command("int8.py")
@click.argument("name", type=click.Choice(DATA_SETS))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--steps", type=INTS, help="Network calls an image; default: all that the model has levels for.")
@click.option("-n", "number", type=int, help="Samples; default: as many as there are data, at most 10,000.")
@click.option("--tolerance-db", type=float, default=TOLERANCE_DB, show_default=True, help="Of the int8 file.")
@click.option("--data", type=click.Path(path_type=Path), envvar="CMFAST_DATA", help="Folder of the data.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(
    name: str,
    model: Path,
    steps: tuple[int, ...] | None,
    number: int | None,
    tolerance_db: float,
    data: Path | None,
    json_file: Path | None,
) -> None:
    """Compare samples of MODEL in int8 and in float32 with the data set NAME."""
    check_outputs({"--json": json_file}, [model])
    with tempfile.TemporaryDirectory() as folder:
        files = {"float32": Path(folder) / "float32.onnx", "int8": Path(folder) / "int8.onnx"}
        export_onnx(model, files["float32"])
        exported = export_onnx(model, files["int8"], precision="int8", tolerance_db=tolerance_db)
        steps = steps or tuple(sorted(exported.manifest.spec.sigmas))
        config = {"data_set": name, "data": data, "steps": steps, "number": number, "metrics": ("fd",)}
        found = {precision: evaluate(EvalConfig(model=file, **config)) for precision, file in files.items()}
        rows = [_row(a, b, files) for a, b in zip(*(each["rows"] for each in found.values()), strict=True)]
        size = {precision: file.stat().st_size for precision, file in files.items()}
    assert exported.int8
    record: dict[str, Any] = {"what": "int8", **provenance(), "name": name, "source": dict(exported.manifest.source)}
    record |= {"features": found["int8"]["features"], "products": exported.int8.in_words, "bytes": size}
    record |= {"parity": dict(exported.manifest.parity), "tolerance_db": tolerance_db, "rows": rows}
    for row in rows:
        click.echo(
            f"{row['steps']} step(s): fd {row['fd_float32']:.4g} in float32, {row['fd_int8']:.4g} in int8, "
            f"{row['ratio']:.3f}x; images {row['psnr_db']:.1f} dB apart"
        )
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if (worst := max(row["ratio"] for row in rows)) > MOST_WORSE:
        raise CheckFailed(
            f"int8 is refused for {model}: its Fréchet distance is {worst:.2f} times float32's, and {MOST_WORSE:g} "
            "times are allowed; pass a higher --tolerance-db"
        )


def _row(plain: dict[str, Any], int8: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """Return one number of steps."""
    steps = plain["steps"]
    images = [cmfast.load(file).sample_float(COMPARED, steps=steps, seed=3) for file in files.values()]
    error = float(np.square(images[0].astype(np.float64) - images[1]).mean())
    row = {"steps": steps, "n": plain["n"], "fd_float32": plain["fd"], "fd_int8": int8["fd"]}
    row |= {"ratio": int8["fd"] / plain["fd"], "psnr_db": round(10 * float(np.log10(4 / error)), 1)}
    return row | {"ms_float32": plain["ms_per_image"], "ms_int8": int8["ms_per_image"]}


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
