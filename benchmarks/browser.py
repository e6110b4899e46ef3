# SPDX-License-Identifier: MIT
"""The page of `cmfast-export --format web` in headless Chromium: the first image, and milliseconds per image.

    python benchmarks/browser.py --onnxruntime-web FOLDER --json benchmarks/results/browser.json

The model is the one of startup.py, 7.7 million random weights, 32 x 32. Every run opens the page in a new context,
whose cache is empty, from a server on this machine. What the page draws is compared with Python before times count.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import startup
from cmfast import load
from cmfast.bench import timing
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text
from cmfast_export.conversion import convert
from cmfast_export.request import make_request
from cmfast_export.targets.web.page import Written

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
FLAGS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")
SIDE, COUNT = 32, 16  # of the images that the page draws first, and how many
EQUAL = 0.999  # of the uint8 pixels


@click.command("browser.py")
@click.option("--onnxruntime-web", "runtime", required=True, help="Folder of the npm package.")
@click.option("--runs", type=int, default=11, show_default=True, help="Counted openings of each page.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(runtime: str, runs: int, json_file: Path | None) -> None:
    """Time the page in headless Chromium."""
    if runs < 1:
        raise CmfastError(f"--runs must be at least 1, got {runs}")
    check_outputs({"--json": json_file}, ())
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise CmfastError("this needs Chromium or Chrome, and neither is in PATH")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        file = startup.export(startup.random_model(Path(name) / "model.pt"), Path(name) / "model.onnx")
        out = Path(name) / "site"
        written = convert(make_request(model=file, out=out, form="web", build=[f"onnxruntime_web={runtime}"]))
        assert isinstance(written, Written)
        wanted = load(file).sample(COUNT)[..., 0]
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        before = timing.cpu_ticks()
        found: dict[str, list[dict[str, Any]]] = {"1 thread": [], "isolated": []}
        with serving(out, {}) as plain, serving(out, ISOLATION) as isolated:
            for run in range(runs + 1):  # the first of each is not counted: it fills the disk cache
                for row, address in zip(found, (plain, isolated), strict=True):
                    result = opened(browser, address, wanted)
                    found[row] += [result] if run else []
        steal = timing.steal_share(before, timing.cpu_ticks())
        version = browser.version
    rows = [{"page": page, **summary(results)} for page, results in found.items()]
    for row in rows:
        first, each = row["first_image"], row["per_image"]
        click.echo(
            f"{row['page']:<10} first image {first['median_ms']:6.0f} ms (p10 {first['p10_ms']:.0f}, p90 "
            f"{first['p90_ms']:.0f}), then {each['median_ms']:.0f} ms per image; {row['backend']}"
        )
    if json_file is None:
        return
    load_average = timing.load_average()
    record: dict[str, Any] = {"what": "browser", **timing.provenance(), "load_average": load_average, "steal": steal}
    record |= {
        "chromium": version,
        "onnxruntime_web": written.version,
        "size": written.size,
        "largest": written.largest,
    }
    record |= {"network": "mnist-large preset, random weights", "images": COUNT, "steps": 1, "rows": rows}
    write_text(json_file, json.dumps(record, indent=1) + "\n")
    click.echo(f"the record is in {json_file}")


def opened(browser: Browser, address: str, wanted: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Open the page once; return its times, ms, and what it says of its backend."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#selftest[data-passed=true]", timeout=120_000)
    first = float(page.get_attribute("#canvas", "data-first") or "nan")
    each = re.search(r"[\d.]+", page.inner_text("#time"))
    equal = float(np.mean(pixels(page) == wanted))
    if each is None or equal < EQUAL:
        raise CheckFailed(f"{equal:.4%} of the pixels are equal to Python's, and {EQUAL:.1%} must be")
    backend = page.inner_text("#backend")
    context.close()
    return {"first": first, "each": float(each[0]), "equal": equal, "backend": backend}


def pixels(page: Page) -> np.ndarray[Any, Any]:
    """Return the images of one channel on the canvas, uint8 [COUNT, SIDE, SIDE]."""
    values = page.evaluate(
        "(() => { const c = document.getElementById('canvas');"
        " return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    sheet = np.array(values[2:], np.uint8).reshape(values[1], values[0], 4)[..., 0]
    columns = round(COUNT**0.5)
    gap = (values[0] - columns * SIDE) // (columns - 1)
    tops = [divmod(i, columns) for i in range(COUNT)]
    return np.stack([sheet[(SIDE + gap) * y :, (SIDE + gap) * x :][:SIDE, :SIDE] for y, x in tops])


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "first_image": dataclasses.asdict(timing.summarise([each["first"] for each in results])),
        "per_image": dataclasses.asdict(timing.summarise([each["each"] for each in results])),
        "equal_pixels": min(each["equal"] for each in results),
        "backend": results[-1]["backend"].partition(";")[0],
    }


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder with more headers, quietly."""

    headers_added: dict[str, str] = {}  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def end_headers(self) -> None:
        """End the headers, after ours."""
        for name, value in self.headers_added.items():
            self.send_header(name, value)
        super().end_headers()


@contextmanager
def serving(folder: Path, headers: dict[str, str]) -> Iterator[str]:
    """Serve a folder on this machine while the block runs, and give its address."""
    handler = type("With", (Handler,), {"headers_added": headers})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    run_command(command)
