# SPDX-License-Identifier: MIT
"""What examples/restore reaches: PSNR on held-out images against bicubic interpolation, and the picture of its page.

    python benchmarks/restore.py digits --work DIR --json benchmarks/results/restore.json
    python benchmarks/restore.py photographs --work DIR --data FOLDER --json benchmarks/results/restore.json
    python benchmarks/restore.py mnist --work DIR --data FOLDER --json benchmarks/results/restore.json

Each runs the example's own commands, in processes, and puts its part into the record. `--plot docs/restore.png` draws
the data sets that are in the work folder.
"""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cmfast.bench import timing
from cmfast.bench.chart import save_chart
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError
from cmfast.files import check_outputs, write_text

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "restore"
TRAINING = {  # what train.py is told
    "digits": "",
    "photographs": "--turn --precision bf16",
    "mnist": "--factor 4",
}
WAYS = {  # name: model, what restore.py is told
    "1 step": ("restore", ""),
    "2 steps": ("restore", "--steps 2"),
    "mean of 8 samples": ("restore", "--samples 8"),
    "teacher, 1 call": ("teacher", ""),
    "teacher, 18 Heun steps": ("teacher", "--heun 18"),
}
SHOWN = 12  # columns of the picture
Pixels = npt.NDArray[np.uint8]


@click.command("restore.py")
@click.argument("name", type=click.Choice(list(TRAINING)))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the images; the digits need none.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Put the part of this data set in here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the data sets in the work folder.")
def command(name: str, work: Path, data: Path | None, json_file: Path | None, plot: Path | None) -> None:
    """Train the example on a data set, restore its held-out images, and record PSNR."""
    if (data is None) != (name == "digits"):
        raise CmfastError(f"{name}: {'leave out --data' if data else 'pass its folder, --data DIR'}")
    check_outputs({"--json": json_file, "--plot": plot})
    out = work.resolve() / name
    arguments = shlex.split(TRAINING[name])
    told = ["train.py", *(["--data", str(data.resolve())] if data else []), *arguments, "--out", str(out)]
    wall, cpu = run(told)
    for way, (model, options) in WAYS.items():
        run(["restore.py", f"{out}/{model}.onnx", f"{out}/low", *shlex.split(options), "-o", str(folder(out, way))])
    found = {"training": TRAINING[name], "wall_s": wall, "cpu_s": cpu} | measured(out)
    for row in found["rows"]:
        click.echo(f"{name}, {row['way']}: {row['psnr']:.2f} dB, {row['gain']:+.2f}; sharpness {row['sharpness']:.2f}")
    if json_file is not None:
        before = json.loads(json_file.read_text(encoding="utf-8"))["data"] if json_file.exists() else {}
        parts = before | {name: found | timing.provenance() | {"load_average": timing.load_average()}}
        record = {"what": "restore", "data": {each: parts[each] for each in TRAINING if each in parts}}
        write_text(json_file, json.dumps(record, indent=1) + "\n")
    if plot is not None:
        draw({each: work / each for each in TRAINING if (work / each / "restore.onnx").exists()}, plot)


def run(words: list[str]) -> tuple[float, float]:
    """Run a script of the example; return its wall-clock time and its CPU time, s."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=EXAMPLE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise CmfastError(f"{' '.join(words[:1])} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def folder(out: Path, way: str) -> Path:
    """Return where the images of a way of restoring are."""
    return out / way.replace(",", "").replace(" ", "_")


def measured(out: Path) -> dict[str, Any]:
    """Return PSNR and sharpness of each way, means over the held-out images."""
    sys.path.insert(0, str(EXAMPLE))
    from compare import sharpness
    from images import bicubic, png_files, psnr, read_images

    low, original = (read_images(png_files(out / name)) for name in ("low", "original"))
    ways = {"bicubic": bicubic(low, original.shape[1] // low.shape[1])}
    ways |= {way: read_images(png_files(folder(out, way))) for way in WAYS}
    base = psnr(ways["bicubic"], original)
    rows = [
        {
            "way": way,
            "psnr": float(psnr(images, original).mean()),
            "gain": float((psnr(images, original) - base).mean()),
            "better": float((psnr(images, original) > base).mean()),
            "sharpness": sharpness(images) / sharpness(original),
        }
        for way, images in ways.items()
    ]
    return {"images": len(original), "low": list(low.shape[1:]), "shape": list(original.shape[1:]), "rows": rows}


def draw(runs: dict[str, Path], path: Path) -> None:
    """Draw held-out images of each run: low, bicubic, restored, original."""
    from images import bicubic, png_files, read_images
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(runs)), layout="constrained", dpi=110)
    for axes, out in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs.values(), strict=True):
        low, original = (read_images(png_files(out / name)) for name in ("low", "original"))
        factor = original.shape[1] // low.shape[1]
        strips = {
            f"{low.shape[1]} x {low.shape[2]}": low.repeat(factor, axis=1).repeat(factor, axis=2),
            "bicubic": bicubic(low, factor),
            "1 step": read_images(png_files(folder(out, "1 step"))),
            "mean of 8": read_images(png_files(folder(out, "mean of 8 samples"))),
            "original": original,
        }
        gap = max(1, original.shape[1] // 16)  # pixels
        cells = [
            [np.pad(image, ((0, gap), (0, gap), (0, 0)), constant_values=255) for image in some]
            for some in (images[:: len(images) // SHOWN][:SHOWN] for images in strips.values())
        ]
        sheet = np.concatenate([np.concatenate(row, axis=1) for row in cells])
        axes.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        pitch = original.shape[1] + gap
        axes.set_yticks([pitch * i + original.shape[1] / 2 for i in range(len(strips))], list(strips), fontsize=10)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.get_layout_engine().set(w_pad=0.2)  # inches; the longest label needs it
    save_chart(figure, path)


def table(record: dict[str, Any]) -> list[str]:
    """Return the lines of the table of docs/restore.md."""
    names = list(record["data"])
    rows = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for i, way in enumerate(["bicubic", *WAYS]):
        cells = []
        for name in names:
            row = record["data"][name]["rows"][i]
            gain = "" if way == "bicubic" else f" ({row['gain']:+.2f})"
            cells.append(f"{row['psnr']:.2f}{gain}; {row['sharpness']:.2f}")
        rows.append(f"| {way} | {' | '.join(cells)} |")
    training = [f"{record['data'][name]['cpu_s']:.0f}" for name in names]
    return [*rows, f"| CPU seconds of `train.py` | {' | '.join(training)} |"]


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
