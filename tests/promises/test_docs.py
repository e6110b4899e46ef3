# SPDX-License-Identifier: MIT
"""The site: it builds without warnings, its generated page is up to date, its examples run, figures have records."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.cli import sample as sample_command
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from helpers import ROOT
from helpers.graphs import write_denoiser
from helpers.runs import TINY, log_of

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("cmfast", "cmfast.bench", "cmfast.editing", "cmfast.shards", "cmfast_train", "cmfast_export")

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="needs the repository")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def examples(page: str, language: str = "python") -> list[tuple[str, str]]:
    """Return (title or "", text) of each fenced block of a language."""
    found = re.findall(rf'^```{language}(?: title="([^"]+)")?\n(.*?)^```', read(page), re.DOTALL | re.MULTILINE)
    return [(str(title), str(text)) for title, text in found]


def public_names() -> set[str]:
    packages = ((name, importlib.import_module(name)) for name in PACKAGES)
    return {f"{package}.{name}" for package, module in packages for name in getattr(module, "__all__", [])}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if not find_spec(package):
            pytest.skip(f"needs {package}: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_builds_without_warnings_and_has_every_page_of_its_menu(site: Path) -> None:
    menu = read("mkdocs.yml").partition("\nnav:")[2].partition("\n\n")[0]
    pages = re.findall(r"([\w-]+)\.md$", menu, re.MULTILINE)
    assert len(pages) >= 13
    assert {f"{page}.html" for page in pages} <= {path.name for path in site.glob("*.html")}
    assert not list(site.glob("*.py"))


def test_the_site_documents_every_public_name(site: Path) -> None:
    html = (site / "api.html").read_text(encoding="utf-8")
    assert {name for name in public_names() if f'id="{name}"' not in html} == set()
    assert 'id="cmfast.no_such_name"' not in html
    text = " ".join(re.sub("<[^>]+>", " ", html).split())
    assert (
        "noise level, data units; the model is the identity here" in text
    )  # from the comment behind ModelSpec.sigma_min
    assert "Parameters:" in text


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pattern = re.compile(r'<(?:script|img|link)\b[^>]*?(?:src|href)="(https?://[^"]+)"')
    assert pattern.findall('<link rel="stylesheet" href="https://example.org/font.css">')
    loaded = {page.name: pattern.findall(page.read_text(encoding="utf-8")) for page in site.glob("*.html")}
    assert {name: urls for name, urls in loaded.items() if urls} == {}


def test_the_reference_lists_the_public_names_that_there_are() -> None:
    listed = set(re.findall(r"^::: (\S+)$", read("docs/api.md"), re.MULTILINE))
    assert listed == public_names()


def test_the_gallery_is_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gallery import page

    assert read("docs/gallery.md") == page(), "docs/gallery.md differs: python benchmarks/gallery.py --data DIR"


def test_the_page_of_commands_is_what_help_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import make_cli

    scripts = tomllib.loads(read("pyproject.toml"))["project"]["scripts"]
    page = make_cli.page()
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == list(scripts)
    assert page.count("Examples:") == len(scripts)
    assert read("docs/cli.md") == page, "docs/cli.md differs from --help: python docs/make_cli.py"


def test_hyperparameters_are_those_of_the_methods_and_distances_those_of_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import make_methods

    assert "| `q` | ect 2.0 | each stage divides the gap t - r by this |" in make_methods.table()
    cells = [{"calls": 1, "fd": 0.5, "fd_of_seeds": [0.4, 0.5, 0.6]}, {"calls": 35, "fd": 0.25, "fd_of_seeds": [0.25]}]
    assert [make_methods.distance(cell) for cell in cells] == ["0.50 ± 0.10", "0.25"]
    assert read("docs/training.md") == make_methods.page(), "docs/training.md differs: python docs/make_methods.py"


def test_the_recipe_of_the_preset_is_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from methods import RECIPES, Recipe, is_of

    recipe, preset = RECIPES["preset"], PRESETS["digits"]
    assert override(preset, [f"phases={recipe.phases}", *recipe.settings]) == preset
    assert recipe.batch == preset.batch
    usual = [text for text in recipe.settings if ".beta2=" not in text]
    assert list(RECIPES["preset, usual beta2"].settings) == usual != list(recipe.settings)
    row = {"phases": "edm:64", "settings": ["edm.lr=1"]}
    assert is_of(row, Recipe(phases="edm:64", settings=("edm.lr=1",)))
    assert not is_of(row, Recipe(phases="edm:64", settings=("edm.lr=1",), batch=32))
    assert not is_of(row | {"settings": []}, Recipe(phases="edm:64", settings=("edm.lr=1",)))


def test_the_rows_of_beta2_are_those_of_the_table_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from methods import PRESETS_OWN, RECIPES, Recipe, is_of, with_beta2

    pair = Recipe(phases="pd/4:64,pd/2:64,ect:64,cd:64", settings=("scaling=edm", "pd.lr=1", "ect.lr=1", "pd.ema=0.5"))
    assert with_beta2(pair, 0.9).settings == (
        "scaling=edm", "pd.beta2=0.9", "pd.lr=1", "ect.beta2=0.9", "ect.lr=1", "pd.ema=0.5", "cd.beta2=0.9",
    )  # fmt: skip
    usual = {row["name"]: row for row in result("methods_digits.json")["rows"]}
    assert all(is_of(row, RECIPES[name]) for name, row in usual.items())
    quick = result("methods_digits_beta2.json")["rows"]
    assert [row["name"] for row in quick] == [name for name in RECIPES if name not in PRESETS_OWN]
    for row in quick:
        same = usual[row["name"]]
        assert is_of(row, with_beta2(RECIPES[row["name"]], 0.99))
        assert row["seeds"] == same["seeds"]
        assert [cell["calls"] for cell in row["rows"]] == [cell["calls"] for cell in same["rows"]]


def test_the_readme_fits_three_screens_and_links_every_page() -> None:
    page = read("README.md")
    assert page.count("\n") <= 130
    linked = set(re.findall(r"\]\(docs/(\w+)\.md", page))
    assert linked >= {path.stem for path in DOCS.glob("*.md")} - {"index", "benchmarks"}


def test_the_times_of_the_page_in_the_browser_are_in_their_record() -> None:
    record = result("browser.json")
    one, two = ({key: row[key] for key in ("first_image", "per_image", "equal_pixels")} for row in record["rows"])
    page = " ".join(read("docs/browser.md").split())
    assert f"is there {one['first_image']['median_ms'] / 1000:.1f} s after" in page
    each = [f"{row['per_image']['median_ms']:.0f} ms with {name}" for row, name in ((one, "one thread"), (two, "two"))]
    assert " and ".join(each) in page
    assert max(row["first_image"]["max_ms"] for row in (one, two)) < 3000
    assert min(row["equal_pixels"] for row in (one, two)) >= 0.9999


def test_the_headline_of_the_readme_is_in_its_record() -> None:
    rows = {
        (line["network"], line["batch"], line["way"]): line
        for line in result("gpu_h200.json")["lines"]
        if line["kind"] == "row" and (line["precision"], line["steps"]) == ("bf16", 1)
    }
    fast, eager = (rows["mnist", 1, way]["wall"]["median_ms"] for way in ("fused cuda_graph", "eager"))
    large = rows["imagenet64", 256, "fused cuda_graph"]
    ratio = rows["imagenet64", 256, "eager"]["wall"]["median_ms"] / large["wall"]["median_ms"]
    page = " ".join(read("README.md").split())
    assert f"**{eager / fast:.0f} times as fast as eager PyTorch**" in page
    assert f"takes {fast:.2f} ms instead of {eager:.1f} ms" in page
    assert f"{ratio:.1f} times as fast on 256 images" in page
    assert f"at {large['of_roofline']:.0%}".replace("%", " %") in page


def test_times_of_starting_are_those_of_the_record() -> None:
    rows = result("startup.json")["rows"]
    cells = [f"{row['median_ms']:.0f} ({row['p10_ms']:.0f} to {row['p90_ms']:.0f})" for row in rows]
    assert f"| {' | '.join(cells)} |" in read("benchmarks/README.md")
    onnx, pt, openvino, ncnn = (row["median_ms"] / 1000 for row in rows[2:])
    for page in ("docs/edge.md", "docs/results.md"):
        words = " ".join(read(page).split())
        assert re.search(rf"{onnx:.2f} s from ONNX(,| and) {pt:.1f} s through PyTorch", words), page
        assert f"{openvino:.2f} s by OpenVINO with its cache, {ncnn:.2f} s by ncnn" in words, page


def test_times_of_exports_are_those_of_the_record() -> None:
    rows = result("export_time.json")["rows"]
    page = read("benchmarks/README.md")
    for part in dict.fromkeys(name for row in rows for name in row["parts"]):
        each = [row["parts"].get(part) for row in rows]
        cells = [f"{found['wall_s']:.1f} ({found['cpu_s']:.1f})" if found else "" for found in each]
        assert f"| {part} | {' | '.join(cells)} |" in page, part
    whole = {(row["network"], row["way"]): row["parts"]["whole process"]["wall_s"] for row in rows}
    ours, torchs = ([f"{whole[network, way]:.1f}" for network in ("mnist", "cifar10")] for way in ("cmfast", "torch"))
    line = f"{ours[0]} s (7.7M), {ours[1]} s (43M); plain `torch.onnx.export`, which verifies nothing, "
    assert line + " and ".join(torchs) + " s" in read("docs/results.md")


@pytest.mark.parametrize("picture", [path.name for path in sorted(DOCS.glob("*.svg"))])
def test_drawings_are_wellformed_and_have_a_title_for_those_who_do_not_see_them(picture: str) -> None:
    root = ElementTree.parse(DOCS / picture).getroot()
    assert root.find("{http://www.w3.org/2000/svg}title") is not None


def test_every_python_block_of_the_documentation_is_run_by_a_test() -> None:
    """Here, in test_readme, test_comparison (api), test_own_training, test_importers_lerobot and test_to_ncnn."""
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))]
    found = {page: len(examples(page)) for page in pages if examples(page)}
    assert found == {
        "README.md": 1,
        "docs/api.md": 1,
        "docs/edge.md": 2,
        "docs/editing.md": 1,
        "docs/extending.md": 9,
        "docs/gallery.md": 1,
        "docs/importing.md": 1,
        "docs/quickstart.md": 1,
        "docs/training.md": 1,
    }


def test_the_example_of_the_edge_page_gives_the_shape_of_its_comment() -> None:
    (_, text), _ = examples("docs/edge.md")
    names: dict[str, Any] = {}
    exec(compile(text, "edge.md", "exec"), names)
    assert (names["x0"].dtype, names["x0"].shape) == (np.float32, (4, 1, 8, 8))


def test_the_example_of_the_gallery_gives_the_shape_of_its_comment() -> None:
    ((_, text),), names = examples("docs/gallery.md"), dict[str, Any]()
    exec(compile(text, "gallery.md", "exec"), names)
    assert (names["images"].dtype, names["images"].shape) == (np.uint8, (64, 28, 28, 1))


def test_the_example_of_the_editing_page_gives_the_shapes_of_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    label = {"name": "label", "kind": "class", "classes": 10}
    model = write_denoiser(tmp_path / "model.onnx", {"shape": [1, 8, 8], "conditions": [label]})
    ((_, text),) = examples("docs/editing.md")
    names: dict[str, Any] = {}
    exec(compile(text.replace("runs/digits/model.onnx", model.name), "editing.md", "exec"), names)
    assert (names["images"].dtype, names["images"].shape) == (np.uint8, (10, 8, 8, 1))
    assert (tmp_path / "compare.png").exists()


def untitled() -> list[str]:
    """Return the examples of the page that are no files."""
    return [text for title, text in examples("docs/extending.md") if not title]


def test_a_denoiser_of_ones_own_is_sampled() -> None:
    text = untitled()[0]
    names: dict[str, Any] = {}
    exec(compile(text, "extending.md", "exec"), names)
    x0 = names["x0"]
    assert (x0.dtype, x0.shape) == (np.float32, (4, 1, 8, 8))
    # Two steps by hand: 80 z0 shrunk, raised to 0.8 by sqrt(0.8^2 - 0.002^2) z1, shrunk again.
    z0, z1 = names["noise"]
    first = 80 * z0 * 0.25 / (0.25 + 80**2)
    second = (first + (0.8**2 - 0.002**2) ** 0.5 * z1) * 0.25 / (0.25 + 0.8**2)
    np.testing.assert_allclose(x0, np.clip(second, -1, 1), rtol=1e-5, atol=1e-6)  # float32 in another order


def test_the_example_of_an_algorithm_keeps_the_known_pixels(handmade_onnx: Callable[..., Path]) -> None:
    text = untitled()[1]
    names: dict[str, Any] = {}
    exec(compile(text, "extending.md", "exec"), names)
    model = cmfast.load(handmade_onnx(8))
    known = np.full((2, 1, 8, 8), 0.5, np.float32)
    mask = np.zeros((2, 1, 8, 8), np.float32)
    mask[..., :4] = 1
    drawn = names["inpaint"](model, known, mask, [80.0, 0.8])
    assert (drawn.dtype, drawn.shape) == (np.float32, known.shape)
    assert (drawn[..., :4] == 0.5).all()
    assert not (drawn[..., 4:] == 0.5).any()


def install(folder: Path, module: str, group: str) -> None:
    """Install a module of the page as pip would: the file and the entry points of one group."""
    (text,) = [text for title, text in examples("docs/extending.md") if title == module]
    (folder / module).write_text(text, encoding="utf-8")
    projects = [tomllib.loads(text)["project"]["entry-points"] for _, text in examples("docs/extending.md", "toml")]
    (entries,) = [project[group] for project in projects if group in project]
    name = module.removesuffix(".py")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")


def test_the_backend_of_the_page_runs_its_files_in_python_and_in_commands(tmp_path: Path) -> None:
    install(tmp_path, "shrink_backend.py", "cmfast.backends")
    model = tmp_path / "data.shrink"
    model.write_text('{"variance": 0.25}')
    paths = [str(tmp_path), *(str(ROOT / part) for part in (".", "train", "export"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    code = (
        "import cmfast, sys\n"
        "model = cmfast.load('data.shrink')\n"
        "images = model.sample(4, steps=2)\n"
        "assert (images.shape, str(images.dtype)) == ((4, 8, 8, 1), 'uint8'), images.shape\n"
        "assert images.std() > 1\n"
        "try:\n"
        "    cmfast.load('data.shrink', variant='cuda_graph')\n"
        "except cmfast.BackendError as error:\n"
        "    print(error)\n"
        "from cmfast.cli.commands import sample\n"
        "sys.argv = ['cmfast-sample', 'data.shrink', '-n', '4', '--steps', '2', '-o', 'grid.png']\n"
        "sample()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "runs on the CPU only" in ran.stdout
    assert (tmp_path / "grid.png").exists()


def test_the_target_of_the_page_is_written_by_the_command(
    tiny_checkpoint: Callable[..., Path], call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("onnx")
    from cmfast_export import cli

    install(tmp_path, "weights_target.py", "cmfast.targets")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = call(cli.main, tiny_checkpoint(10), "--format", "weights", "-o", "a.npz", "--precision", "fp16")
    assert made.returncode == 0, made.stderr
    assert "largest difference" in made.stdout, "the graph that it is made from was verified"
    with np.load("a.npz") as arrays:
        assert any(array.dtype == np.float16 and array.ndim == 4 for array in arrays.values())
    wrong: list[tuple[list[str], str]] = [
        (["-o", "a.onnx"], "for --format weights the name must end in .npz"),
        (["--kind", "sampler"], "--format weights is made from files of kind denoiser, not sampler"),
        (["--build", "level=1"], "not for weights"),
        (["--serve", "name=a"], "not for weights"),
    ]
    for arguments, words in wrong:
        refused(call(cli.main, tiny_checkpoint(0), "--format", "weights", *arguments), words)


def test_the_method_of_the_page_trains_by_the_command(
    call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmfast_train.cli import train
    from cmfast_train.methods.method import ROWS

    install(tmp_path, "flow_matching.py", "cmfast.methods")

    def words(*settings: str) -> list[str]:
        return ["digits", "--out", "run", *(word for text in (*TINY, *settings) for word in ("--set", text))]

    settings = ("phases=fm:800,cd:16", "fm.p_std=1.0", "fm.lr=1e-2")
    paths = [str(tmp_path), *(str(ROOT / part) for part in (".", "train", "export"))]
    ran = subprocess.run(
        [sys.executable, "-m", "cmfast_train.cli.train", *words(*settings)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    first, *_, last = [line["loss"] for line in log_of(tmp_path / "run") if line["phase"] == "fm" and "loss" in line]
    assert last < 0.8 * first
    (fm, _) = json.loads((tmp_path / "run/config.json").read_text())["phases"]
    assert (fm["method"], fm["p_mean"], fm["p_std"], fm["lr"]) == ("fm", 0.0, 1.0, 1e-2)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        again = call(train.main, *words(*settings))  # which reads the configuration back
        assert again.returncode == 0, again.stderr
        for wrong, said in (
            (("phases=fm:800", "fm.p_std=0"), "fm.p_std must be greater than 0, got 0.0"),
            (("phases=fm:800", "fm.q=2"), "--set fm.q=2: fm has no such field; there are beta2, clip_norm, ema, "),
            (("phases=fm:800", "scaling=edm"), "fm needs scaling flow, got scaling edm and c_noise trig"),
            (("phases=gm:800",), "no method 'gm'; there are edm, ct, cd, cmt, ict, ect, sid, pd, sct, scd, mf, fm"),
        ):
            refused(call(train.main, *words(*wrong)), said)
    finally:
        ROWS.pop("fm", None)  # of this process, whose later tests know our methods only
        sys.modules.pop("flow_matching", None)


def test_the_source_format_of_the_page_is_read_by_the_commands(
    tiny_checkpoint: Callable[..., Path], call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import torch

    from cmfast.cli import info, sample
    from cmfast_train.checkpoint import load_checkpoint

    install(tmp_path, "studio_source.py", "cmfast.sources")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    own = load_checkpoint(tiny_checkpoint(0))
    content = {"studio:size": torch.tensor(8.0), "studio:channels": torch.tensor(1.0)}
    torch.save({**content, **{f"net:{name}": tensor for name, tensor in own.weights.items()}}, "model.pt")
    said = call(info.main, "model.pt")
    assert said.returncode == 0, said.stderr
    assert "a checkpoint of the studio's trainer" in said.stdout
    assert call(sample.main, "model.pt", "-n", 4, "-o", "a.npz").returncode == 0
    assert call(sample.main, tiny_checkpoint(0), "-n", 4, "-o", "b.npz").returncode == 0
    with np.load("a.npz") as ours, np.load("b.npz") as want:
        np.testing.assert_array_equal(ours["arr_0"], want["arr_0"])
    refused(call(info.main, "model.pt", "--source", "openai"), "but its tensors are named as in studio")
    refused(
        call(info.main, "model.pt", "--source", "film"),
        "unknown; there are cmfast, diffusers, lerobot, openai, ",
        "studio",
    )


def test_an_unknown_target_is_named_with_those_that_there_are(
    tiny_checkpoint: Callable[..., Path], call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    pytest.importorskip("onnx")
    from cmfast_export import cli

    refused(call(cli.main, tiny_checkpoint(0), "--format", "tflite"), "--format must be one of onnx, ", "'tflite'")


def test_the_model_of_the_page_is_exported_in_python_and_by_the_command(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    import torch

    from cmfast_export import cli

    files = dict(examples("docs/extending.md")) | dict(examples("docs/extending.md", "json"))
    for name in ("policy.py", "spec.json"):
        (tmp_path / name).write_text(files[name])
    lines = [line for line in files["export_policy.py"].splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 10, "what one writes beside the network"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(files["export_policy.py"], "export_policy.py", "exec"), names)
    assert (names["actions"].dtype, names["actions"].shape) == (np.float32, (4, 16, 7))
    torch.save(names["denoiser"].network.state_dict(), "weights.pt")
    (command,) = re.findall(r"^    (cmfast-export weights.pt .*)$", read("docs/extending.md"), re.MULTILINE)
    made = call(cli.main, *command.replace("policy.onnx", "again.onnx").split()[1:])
    assert made.returncode == 0, made.stderr
    same = cmfast.load("again.onnx").sample(4, conditions={"state": np.zeros(14)})
    np.testing.assert_array_equal(same, names["actions"])
    np.save("state.npy", np.zeros((4, 14)))
    (command,) = re.findall(r"^    (cmfast-sample policy.onnx .*)$", read("docs/extending.md"), re.MULTILINE)
    assert call(sample_command.main, *command.split()[1:]).returncode == 0
    np.testing.assert_array_equal(np.load("actions.npy"), same)
    sys.modules.pop("policy", None)


def test_the_encoder_of_the_page_is_exported_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    files = dict(examples("docs/extending.md"))
    (tmp_path / "policy.py").write_text(files["policy.py"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(files["export_camera.py"], "export_camera.py", "exec"), names)
    assert (names["actions"].shape, names["encoded"]["state_encoded"].shape) == ((4, 16, 7), (14,))
    assert np.abs(names["actions"] - names["more"]).max() > 0.1, "another seed"
    sys.modules.pop("policy", None)
