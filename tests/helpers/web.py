# SPDX-License-Identifier: MIT
"""The page's modules in Node.js, and where onnxruntime-web and Chromium are; tests are skipped by a tool's name."""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cmfast_export.targets.web.page import ASSETS
from cmfast_export.targets.web.runtime import VARIABLE, WASM
from helpers import ROOT, TESTS

DRIVER = TESTS / "web" / "driver.mjs"


def need_runtime() -> Path:
    """Return the folder of onnxruntime-web, or skip."""
    places = [Path(os.environ.get(VARIABLE) or "."), ROOT / "build" / "web" / "onnxruntime-web"]
    for place in places:
        if (place / "dist" / WASM[0]).is_file():
            return place.resolve()
    pytest.skip("needs onnxruntime-web: sh tests/web/tools.sh")


def in_node(calls: Sequence[tuple[str, Any]], runtime: Path | None = None) -> list[Any]:
    """Return the results of calls of `driver.mjs`, made in one process of Node.js; of a failed one {"error": ..}."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    command = [node, str(DRIVER), str(ASSETS), str(runtime / "dist") if runtime else ""]
    done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def encode(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def decode(text: str, dtype: type) -> npt.NDArray[Any]:
    assert isinstance(text, str), text  # else an error
    return np.frombuffer(base64.b64decode(text), dtype)


def need_chromium() -> str:
    """Return Chromium or Chrome, which Playwright drives, or skip."""
    if find_spec("playwright") is None:
        pytest.skip("needs playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium: sh tests/web/tools.sh")
    return found


class _Handler(SimpleHTTPRequestHandler):
    isolated = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@contextmanager
def serving(folder: Path, *, isolated: bool = False) -> Iterator[str]:
    """Serve a folder on this machine while the block runs, and give its address; isolated: see docs/browser.md."""
    handler = type("Handler", (_Handler,), {"isolated": isolated})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def browser(*flags: str) -> Iterator[Any]:
    """Give Playwright's Chromium, headless, which asks nothing but this machine."""
    executable = need_chromium()
    from playwright.sync_api import sync_playwright

    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", *quiet, *flags])
        yield opened
        opened.close()
