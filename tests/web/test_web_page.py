# SPDX-License-Identifier: MIT
"""The target web: the folder that it writes, what it refuses, and the page in headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmfast import load
from cmfast.editing import interpolate
from cmfast.errors import CmfastError
from cmfast_export.cli import main
from cmfast_export.conversion import convert
from cmfast_export.request import make_request
from cmfast_export.targets.web import page as target
from cmfast_export.targets.web.page import LIMIT, Written
from cmfast_export.targets.web.runtime import VARIABLE, WASM, WEBGPU
from helpers.graphs import write_denoiser
from helpers.web import browser, decode, in_node, need_runtime, serving


def package(folder: Path, version: str = "1.30.0", files: tuple[str, ...] = WASM) -> Path:
    """Write what looks like the npm package, where only its files are looked at."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": version}))
    for name in files:
        (folder / "dist" / name).write_text(name)
    return folder


def page_of(model: Path, out: Path, *build: str) -> Written:
    written = convert(make_request(model=model, out=out, form="web", build=build))
    assert isinstance(written, Written)
    return written


@pytest.fixture(scope="module")
def site(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a network with random weights, its file in parts."""
    out = tmp_path_factory.mktemp("web") / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "PART", 500_000)
        page_of(tiny_checkpoint(), out, f"onnxruntime_web={need_runtime()}", "webgpu=true", "title=Tiny & small")
    return out


@pytest.fixture(scope="module")
def model(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that the page's parts make."""
    parts = json.loads((site / "site.json").read_text())["model"]
    assert len(parts) > 1
    file = tmp_path_factory.mktemp("model") / "model.onnx"
    file.write_bytes(b"".join((site / part).read_bytes() for part in parts))
    return file


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def test_every_file_of_a_page_is_small_and_the_licences_come_along(site: Path, model: Path) -> None:
    sizes = {path.relative_to(site).as_posix(): path.stat().st_size for path in site.rglob("*") if path.is_file()}
    assert max(sizes.values()) < LIMIT == 25_000_000
    runtime = {name.removeprefix("onnxruntime-web/") for name in sizes if name.startswith("onnxruntime-web/")}
    assert runtime == {*WASM, *WEBGPU, "LICENSE", "ThirdPartyNotices.txt"}
    assert "Microsoft" in (site / "onnxruntime-web" / "LICENSE").read_text()
    assert load(model).manifest.kind == "denoiser"


def test_the_exported_file_draws_what_python_draws_and_passes_its_selftest_and_another_fails(
    model: Path, tmp_path: Path
) -> None:
    tested = {"seed": 1, "conditions": {}, "at": [0], "values": [0.5], "atol": 1e-4}
    other = write_denoiser(tmp_path / "other.onnx", {"selftest": tested})
    calls = [("draw", {"file": str(model), "seed": "3", "steps": 2, "conditions": {"label": 7}})]
    calls += [("selftest", str(file)) for file in (model, other)]
    drawn, passed, failed = in_node(calls, need_runtime())
    wanted = load(model).sample_float(1, seed=3, steps=2, label=7)
    np.testing.assert_allclose(decode(drawn, np.float32), wanted.ravel(), atol=1e-4, rtol=0)
    assert passed["passed"]
    assert passed["maxAbs"] < 1e-4
    assert not failed["passed"]


def test_the_page_draws_the_images_that_python_draws(site: Path, model: Path, chromium: Any) -> None:
    requests, complaints = [], []
    with serving(site) as address:
        page = chromium.new_page()
        page.on("request", lambda request: requests.append(request.url))
        # that of "Canvas2D" is about this test, which reads what was drawn
        page.on("console", lambda m: complaints.append(m.text) if "Canvas2D" not in m.text else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#selftest[data-passed=true]", timeout=60_000)
        assert page.is_visible("#webgpu")
        assert page.title() == "Tiny & small"
        assert "1 thread, because the page is not cross-origin isolated" in page.inner_text("#backend")
        assert drawn(page, 1, 16) == pytest.approx(pixels(model, 16, seed=0), abs=1)

        # by the keyboard alone, from the field that stands first
        page.focus("#seed")
        page.keyboard.press("Control+A")
        page.keyboard.type("18446744073709551615")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")  # over the button for another seed
        page.keyboard.type("2")  # steps
        page.keyboard.press("Tab")
        page.keyboard.type("3")  # label
        page.keyboard.press("Tab")
        page.keyboard.type("4")  # samples
        page.keyboard.press("Enter")
        page.wait_for_selector("#canvas[data-drawn='18446744073709551615 2 4 0']")
        wanted = pixels(model, 4, seed=2**64 - 1, steps=2, label=3)
        assert np.mean(drawn(page, 1, 4) == wanted) >= 0.999
        assert page.inner_text("#time").endswith(" ms per image")

        # at the end of the way there is the other seed
        page.focus("#between")
        page.keyboard.press("End")
        page.wait_for_selector("#canvas[data-drawn='18446744073709551615 2 4 1']")
        assert np.mean(drawn(page, 1, 4) == pixels(model, 4, seed=1, steps=2, label=3)) >= 0.999

        for _ in range(5):  # each key stops what is drawn for the one before
            page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#canvas[data-drawn='18446744073709551615 2 4 0.95']")
        way = interpolate(load(model), [(2**64 - 1, 2), (1, 2)], n=21, steps=2, label=3)
        # sums of the noise's squares in another order: here and there a pixel is on the other side of a half
        assert np.abs(drawn(page, 1, 4)[2].astype(int) - way[19]).max() <= 1

        page.click("#webgpu")  # `check` would complain where the page takes it back at once
        page.wait_for_selector("#error:not(:empty)")
        assert not page.is_checked("#webgpu")
        assert "WebGPU" in page.inner_text("#error")
        assert page.inner_text("#backend").startswith("WebAssembly")
        page.close()
    assert complaints == []
    assert {url.startswith((address, "blob:" + address)) for url in requests} == {True}


def test_an_isolated_page_has_threads_and_arrays_are_plotted(chromium: Any, tmp_path: Path) -> None:
    conditions = [{"name": "state", "kind": "tensor", "shape": [3]}]
    changes = {"shape": [12, 2], "data": "array", "conditions": conditions}
    file = write_denoiser(tmp_path / "array.onnx", changes)
    page_of(file, tmp_path / "site", f"onnxruntime_web={need_runtime()}")
    with serving(tmp_path / "site", isolated=True) as address:
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("#canvas[data-drawn]", timeout=60_000)
        assert "isolated" not in page.inner_text("#backend")
        assert not page.is_visible("#webgpu")  # it was not brought along
        cores = page.evaluate("navigator.hardwareConcurrency")
        assert f"{min(4, cores)} thread" in page.inner_text("#backend")
        assert page.inner_text("#error") == ""
        colours = page.evaluate(
            "new Set(new Uint32Array(document.getElementById('canvas').getContext('2d')"
            ".getImageData(0, 0, 240, 160).data.buffer)).size"
        )
        assert colours > 2
        page.fill("#condition-state", "[1, 2]")
        page.click("#draw")
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error") == "condition state must be [3], got [2]"
        page.close()


@pytest.mark.slow
def test_webgpu_is_used_after_its_self_test_passed_and_only_then(site: Path, model: Path, tmp_path: Path) -> None:
    """By SwiftShader, which computes WebGPU on the CPU: Chromium has it behind these flags."""
    tested = {"seed": 1, "conditions": {}, "at": [0], "values": [0.5], "atol": 1e-4}
    other = write_denoiser(tmp_path / "other.onnx", {"selftest": tested})
    page_of(other, tmp_path / "other", f"onnxruntime_web={need_runtime()}", "webgpu=true")
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    with browser(*flags) as opened, serving(site) as address, serving(tmp_path / "other") as failing:
        page = opened.new_page()
        page.goto(address)
        page.wait_for_selector("#selftest[data-passed=true]", timeout=60_000)
        page.select_option("#count", "4")  # seconds an image
        page.wait_for_selector("#canvas[data-drawn='0 1 4 0']")
        page.click("#webgpu")
        page.wait_for_selector("#canvas[data-provider=webgpu]", timeout=90_000)
        assert page.inner_text("#backend").startswith("WebGPU; the model")
        assert page.inner_text("#selftest").startswith("Self-test passed: WebGPU differs by ")
        assert np.abs(drawn(page, 1, 4).astype(int) - pixels(model, 4, seed=0)).max() <= 1
        page.goto(failing)
        page.wait_for_selector("#selftest[data-passed=false]", timeout=60_000)
        page.click("#webgpu")
        page.wait_for_selector("#error:not(:empty)", timeout=60_000)
        assert not page.is_checked("#webgpu")
        assert page.inner_text("#error") == "WebGPU is not used on this machine: see the self-test"
        assert page.inner_text("#backend").startswith("WebAssembly")


def test_a_part_from_another_export_is_seen(site: Path, chromium: Any, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    part = tmp_path / "site" / "model.onnx.1"
    part.write_bytes(part.read_bytes()[::-1])
    with serving(tmp_path / "site") as address:
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error").startswith("the model differs from the one that was exported")
        page.close()


def drawn(page: Any, channels: int, count: int) -> np.ndarray[Any, Any]:
    """Return the images on the canvas, uint8 [count, 8, 8, channels]."""
    columns, gap = int(np.ceil(np.sqrt(count))), 1
    values = page.evaluate(
        "(() => { const c = document.getElementById('canvas');"
        " return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    sheet = np.array(values[2:], np.uint8).reshape(values[1], values[0], 4)[..., :channels]
    tops = [((8 + gap) * (i // columns), (8 + gap) * (i % columns)) for i in range(count)]
    return np.stack([sheet[top : top + 8, left : left + 8] for top, left in tops])


def pixels(model: Path, count: int, **options: Any) -> np.ndarray[Any, Any]:
    return load(model).sample(count, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [2, 4, 4]}, "a page shows images of 1, 3 or 4 channels, and these have 2"),
        ({"shape": [2, 4, 4], "data": "array"}, "a page plots arrays [T] and [T, A], and this model draws [2, 4, 4]"),
        ({"dtype": "bfloat16"}, "computes in bfloat16, and browsers in float32 and float16"),
        ({"kind": "server", "sigmas": {"1": [80.0]}}, "is of kind server; a page draws with a denoiser or a sampler"),
        (
            {"conditions": [{"name": "view", "kind": "tensor", "shape": [3, 64, 64]}]},
            "the condition view has more than 4,096 numbers",
        ),
    ],
)
def test_a_model_that_a_page_cannot_show_is_refused(changes: Any, words: str, tmp_path: Path) -> None:
    file = write_denoiser(tmp_path / "model.onnx", changes)
    package(tmp_path / "node_modules" / "onnxruntime-web")
    with pytest.raises(CmfastError) as caught:
        page_of(file, tmp_path / "site", f"onnxruntime_web={tmp_path}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    package(tmp_path / "p")
    with pytest.raises(CmfastError, match="its batch is fixed"):
        page_of(
            write_denoiser(tmp_path / "model.onnx", batch=2), tmp_path / "site", f"onnxruntime_web={tmp_path / 'p'}"
        )


def test_the_runtime_is_found_as_node_finds_it_and_a_wrong_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    file = write_denoiser(tmp_path / "model.onnx")
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inside")

    def asked(*build: str) -> Any:
        return call(main, file, "--format", "web", "-o", tmp_path / "site", *(f"--build={text}" for text in build))

    refused(asked(), "onnxruntime-web, which is not in node_modules", "npm install", "--build fetch=true")
    other = package(tmp_path / "other", files=WASM[:2])
    refused(asked(f"onnxruntime_web={other}"), "has no dist/ort-wasm-simd-threaded.wasm; npm install")
    refused(asked(f"onnxruntime_web={tmp_path}"), "is not the folder of onnxruntime-web")
    (other / "package.json").write_text('{"name": "react"}')
    refused(asked(f"onnxruntime_web={other}"), "its package.json names 'react'")
    refused(asked("fetch=true", f"onnxruntime_web={other}"), "exclude each other")
    monkeypatch.setenv("PATH", "")
    refused(asked("fetch=true"), "needs npm, which is not in PATH")
    large = package(tmp_path / "large", files=WASM[:2])
    with (large / "dist" / WASM[2]).open("wb") as opened:
        opened.truncate(LIMIT)
    refused(asked(f"onnxruntime_web={large}"), "has 25.0 MB, and hosts of static pages take less than 25 MB")
    assert not (tmp_path / "site").exists()
    package(tmp_path / "here" / "node_modules" / "onnxruntime-web")
    made = asked()
    assert made.returncode == 0, made.stderr
    assert "python -m http.server" in made.stdout
    assert not list(tmp_path.glob(".*"))
    refused(asked(), "exists and is not an empty folder")


def test_options_that_a_page_has_no_use_for_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    runtime = f"--build=onnxruntime_web={package(tmp_path / 'p')}"
    for options, words in (
        (("--precision", "bf16"), "browsers compute in fp32 and fp16"),
        (("--batch", "4"), "one sample at a time"),
        (("--kind", "server"), "leave --kind out"),
    ):
        out = tmp_path / "site"
        refused(call(main, tiny_checkpoint(), "--format", "web", "-o", out, runtime, *options), words)
