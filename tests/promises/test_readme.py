# SPDX-License-Identifier: MIT
"""What the documentation tells people to type, open and expect: all of it exists."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from onnx import helper

import cmfast
from cmfast.cli.bench import command as bench
from cmfast.cli.edit import command as edit
from cmfast.cli.info import command as info
from cmfast.cli.sample import command as sample
from cmfast.conditions import class_label
from cmfast.formats.manifest import SCHEMA, Manifest
from cmfast_export._options import parse_options
from cmfast_export.cli import command as export
from cmfast_export.targets.tensorrt_engine import BuildOptions
from cmfast_export.targets.triton_config import ServeOptions
from cmfast_export.targets.web.runtime import WebOptions
from cmfast_train.cli.evaluate import command as evaluate
from cmfast_train.cli.train import command as train
from cmfast_train.config.overrides import override
from cmfast_train.config.phase import types_of
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.importers.facts import Given
from cmfast_train.methods import method, register
from helpers import ROOT

SITE = tuple(  # cli.md is --help itself, which test_docs.py compares; benchmarks.md includes benchmarks/README.md
    f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in ("cli", "benchmarks")
)
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", *SITE)
COMMANDS = {str(command.name): command for command in (train, export, sample, edit, info, bench, evaluate)}

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the repository")


def blocks(page: str) -> Iterator[str]:
    """Yield the lines of a page's indented and shell blocks."""
    language: str | None = None
    for line in page.splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language in ("sh", "bash", "console", "") or (language is None and line.startswith("    ")):
            yield line.strip().removeprefix("$ ")


def spans(page: str) -> Iterator[str]:
    """Yield what stands between backticks in running text, which may go over the end of a line."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        yield " ".join(span.split())


def command_line(text: str) -> list[str] | None:
    """Return the words of a line that starts one of our programs, without comment and pipe; else None."""
    words = shlex.split(re.split(r"\s#\s|\s{3,}|\s\|\s", text)[0].replace("[", "").replace("]", ""))
    words = [word.removesuffix("...") for word in words if word != "..."]
    if "-m" in words and "cmfast_train.cli.train" in words:
        return ["cmfast-train", *words[words.index("cmfast_train.cli.train") + 1 :]]
    if words and words[0].removeprefix("$(BIN)/") in COMMANDS and len(words) > 1:
        return [words[0].removeprefix("$(BIN)/"), *words[1:]]
    if words[:1] in (["python"], ["$(BIN)/python"]) and words[1:2] and words[1].startswith("benchmarks/"):
        return words[1:]
    return None


def command_lines() -> list[tuple[str, str]]:
    """Return (where, line) of every command line in the pages, the Makefile and the epilogs."""
    found = []
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8") if (ROOT / name).exists() else ""
        found += [(name, line) for line in (*blocks(page), *spans(page))]
    if (ROOT / "Makefile").exists():
        makefile = (ROOT / "Makefile").read_text()
        for name, value in re.findall(r"^(\w+) \?= (\S+)", makefile, re.MULTILINE):
            makefile = makefile.replace(f"$({name})", value)
        found += [("Makefile", line.strip()) for line in makefile.splitlines() if line[:1] == "\t"]
    for name, command in COMMANDS.items():
        found += [(f"{name} --help", line.strip()) for line in (command.epilog or "").splitlines()]
    # Synopses that stop before a required option say so with three dots.
    return [(where, line) for where, line in dict.fromkeys(found) if command_line(line) and " ..." not in line]


def parse(words: list[str]) -> dict[str, Any]:
    """Return what a command understands, or raise click's UsageError. Nothing is executed."""
    name, *arguments = words
    command = COMMANDS.get(name)
    if command is None:
        command = importlib.import_module(Path(name).stem).command
    arguments = ["digits" if word == "PRESET" else word for word in arguments]
    return command.make_context(name, arguments).params


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize(("where", "line"), command_lines(), ids=lambda value: re.sub(r"\W+", " ", value)[:60])
def test_a_command_line_of_the_documentation_is_understood(
    where: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if where == "docs/extending.md":  # whose reader has installed the method of the page
        monkeypatch.setattr(method, "ROWS", dict(method.ROWS))
        (module,) = re.findall(r"title=.flow_matching.py.\n(.*?)^```", (ROOT / where).read_text(), re.M | re.S)
        (tmp_path / "flow_matching.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path)
        register(importlib.import_module("flow_matching").ROW)
    words = command_line(line)
    assert words
    params = parse(words)
    if words[0] == "cmfast-train" and "NAME=VALUE" not in line:
        models = [f"{name}={params[name]}" for name in ("init", "teacher") if params[name]]
        assert override(PRESETS[params["preset"] or "arrays"], [*models, *params["assignments"]])
    if words[0] in ("cmfast-export", "cmfast-info"):
        assert Given.parse(params["assignments"])


@pytest.mark.parametrize(
    "line",
    [
        "cmfast-sample model.onnx --fast -o a.png",
        "cmfast-bench model.onnx --device tpu",
        "cmfast-train imagenet --out runs/imagenet",
        "cmfast-export model.pt --kind picture",
        "cmfast-info a.onnx b.onnx",
        "cmfast-eval model.onnx --data-set faces",
    ],
)
def test_the_check_above_can_fail(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(command_line(line) or [line])


def test_every_page_and_every_command_has_lines_to_check() -> None:
    """Else a change of layout would leave nothing to find, and nothing to fail."""
    lines = command_lines()
    assert {"README.md", "benchmarks/README.md", "Makefile"} <= {where for where, _ in lines}
    assert {f"{name} --help" for name in COMMANDS} <= {where for where, _ in lines}
    quick_start = {words[0] for where, line in lines if where == "README.md" and (words := command_line(line))}
    assert quick_start >= set(COMMANDS)
    for where, line in lines:
        assert where != "cmfast-train --help" or (command_line(line) or [""])[0] == "cmfast-train"


def test_settings_that_the_pages_name_are_fields_of_the_configuration() -> None:
    """Those of whole command lines are checked with their command, above. importing.md names those of foreign files."""
    training, foreign = 0, 0
    for name in PAGES:
        loose = [span for span in spans((ROOT / name).read_text(encoding="utf-8")) if not command_line(span)]
        for text in (text for span in loose for text in re.findall(r"--set (\S+=\S+)", span)):
            if "NAME=VALUE" in text:
                continue
            if name == "docs/importing.md":
                foreign += bool(Given.parse([text]))
            else:
                labelled = "label_dropout" in text  # which needs classes; other settings are of models without
                training += bool(override(PRESETS["mnist"], [text if labelled else "conditional=false", text]))
    assert training >= 3
    assert foreign >= 1


def test_fields_of_the_table_of_the_configuration_exist() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = page[page.index("| field | meaning |") :].split("\n\n")[0]
    named = [text for row in table.splitlines()[2:] for text in re.findall("`([^`]+)`", row.split("|")[1])]
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert len(named) > 20
    assert {text for text in named if "." not in text} <= fields
    of_phases = {text.removeprefix("METHOD.") for text in named if "." in text}
    assert of_phases <= types_of("ect").keys()


def test_options_of_pages_in_the_table_are_those_that_there_are() -> None:
    table = (ROOT / "docs" / "browser.md").read_text(encoding="utf-8").partition("| `--build` |")[2].split("\n\n")[0]
    named = re.findall(r"^\| `(\w+=[^`]+)`", table, re.MULTILINE)
    assert parse_options(WebOptions, "--build", named)
    assert {text.partition("=")[0] for text in named} == {field.name for field in dataclasses.fields(WebOptions)}


def test_options_of_engines_and_of_servers_in_the_tables_exist() -> None:
    found: dict[str, list[str]] = {}
    for name, start in (("docs/gpu.md", "| `--build` |"), ("docs/serving.md", "| option |")):
        page = (ROOT / name).read_text(encoding="utf-8")
        table = page[page.index(start) :].split("\n\n")[0]
        found[name] = re.findall(r"^\| `(?:--serve )?(\w+=[^`]+)`", table, re.MULTILINE)
    build, serve = found["docs/gpu.md"], found["docs/serving.md"]
    for text in build:  # one at a time: some are of one library only
        assert parse_options(BuildOptions, "--build", [text])
    assert parse_options(ServeOptions, "--serve", serve)
    assert {text.partition("=")[0] for text in build} == {f.name for f in dataclasses.fields(BuildOptions)} - {"target"}
    assert {text.partition("=")[0] for text in serve} == {f.name for f in dataclasses.fields(ServeOptions)}


def test_presets_of_the_table_are_those_that_there_are() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = page[page.index("| preset |") :].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == list(PRESETS)


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w.-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named: set[str] = set()
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        for line in (*blocks(page), *spans(page)):
            words = line.split()
            named |= set(words[1:2]) if words[:1] == ["make"] else set()
    assert named >= {"demo", "test"}
    assert named <= targets


def test_extras_that_pip_is_told_to_install_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named: set[str] = set()
    for name in PAGES:
        for match in re.findall(r"pip install [^`\n]*'\.\[([\w,]+)\]'", (ROOT / name).read_text(encoding="utf-8")):
            named |= set(match.split(","))
    assert named >= {"cpu", "gpu", "export", "dev"}
    assert named <= set(extras)


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_are_files_of_the_repository(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page)]
    links = [link for link in links if link and not re.match(r"https?:|mailto:", link)]
    assert name != "README.md" or len(links) >= 5
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert missing == []
    assert all(((ROOT / name).parent / link).resolve().is_relative_to(ROOT) for link in links)


def test_modules_and_folders_of_the_map_exist() -> None:
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    where = page[page.index("## Where things are") :]
    folders = re.findall(r"(?:^    |\s{3,})(\w+)/ ", where, re.MULTILINE)
    assert {"cmfast", "train", "export", "benchmarks", "tests", "docs"} == set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)
    modules = set(re.findall(r"\b(\w+\.py)\b", where))
    assert modules <= {path.name for folder in ("cmfast", "train", "export") for path in (ROOT / folder).rglob("*.py")}


def conditional_denoiser(unconditional: Path, path: Path) -> None:
    """Write the handmade denoiser with ten classes, which it does not look at."""
    model = onnx.load(unconditional)
    model.graph.input.append(helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["B"]))
    values = json.loads(model.metadata_props[0].value) | {"conditions": [class_label(10).to_dict()]}
    helper.set_model_props(model, {"cmfast": json.dumps(values)})
    onnx.save(model, path)


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_python_of_the_first_pages_runs_and_gives_the_shapes_of_its_comments(
    name: str, handmade_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    (path,) = re.findall(r'load\("([^"]+)"\)', source)
    monkeypatch.chdir(tmp_path)
    if path not in cmfast.models():
        Path(path).parent.mkdir(parents=True)
        conditional_denoiser(handmade_onnx(8), Path(path))
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    assert (names["images"].dtype, names["images"].shape) == (np.uint8, (16, 8, 8, 1))
    assert (names["x0"].dtype, names["x0"].shape) == (np.float32, (16, 1, 8, 8))
    if path not in cmfast.models():
        np.testing.assert_allclose(names["x0"], 0.8 * names["noise"], rtol=1e-5)  # 0.01 x
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_the_manifest_of_the_format_page_is_one_that_this_version_writes_and_reads() -> None:
    page = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    start = page.index('{"schema"')
    text = page[start : page.index("\n\n", start)].replace("{...}", "{}")
    manifest = Manifest.from_json(text, "format.md")
    assert json.loads(manifest.to_json()) == json.loads(text)
    assert json.loads(text)["schema"] == SCHEMA
