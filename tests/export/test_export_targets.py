# SPDX-License-Identifier: MIT
"""Where cmfast-export writes: checked before its work, one writer at a time; numbers have limits; full disks."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmfast.errors import CmfastError
from cmfast.files.locks import lock_beside
from cmfast_export import _target, cli, conversion
from cmfast_export._target import files_of, writing
from cmfast_export.targets.tensorrt_engine import build_engine
from cmfast_export.targets.tensorrt_options import BuildOptions
from cmfast_train.checkpoint import load_checkpoint
from helpers.plans import plan

Make = Callable[..., Path]
Call = Callable[..., "subprocess.CompletedProcess[str]"]
Refused = Callable[..., None]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="FIFOs, permissions and limits of POSIX")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every way of working fail: what is refused is refused before."""
    monkeypatch.setattr(conversion, "at", None)


@pytest.mark.parametrize("form", ["onnx", "cmfast", "engine"])
@pytest.mark.parametrize("kind", ["fifo", "device", "proc", "folder", "nowhere"])
def test_only_a_regular_file_is_replaced(
    kind: str, form: str, no_work: None, tiny_checkpoint: Make, call: Call, refused: Refused, tmp_path: Path
) -> None:
    suffix = {"cmfast": ".pt", "onnx": ".onnx", "engine": ".engine"}[form]
    out = tmp_path / f"out{suffix}"
    if kind == "fifo":
        os.mkfifo(out)
    elif kind == "device":
        out.symlink_to("/dev/null")
    elif kind == "proc":
        out.symlink_to("/proc/self/comm")
    elif kind == "folder":
        out.mkdir()
    else:
        out = tmp_path / "nowhere" / out.name
    before = os.lstat(out).st_ino if kind != "nowhere" else None
    words = {"fifo": "is a FIFO", "device": "is a device", "folder": "is a folder", "nowhere": "does not exist"}
    refused(call(cli.main, tiny_checkpoint(0), "--format", form, "-o", out), words.get(kind, "/proc"))
    assert before is None or os.lstat(out).st_ino == before


def test_what_is_read_is_not_overwritten_under_any_of_its_names(
    no_work: None, tiny_checkpoint: Make, call: Call, refused: Refused, tmp_path: Path
) -> None:
    model = tmp_path / "model.pt"
    shutil.copyfile(tiny_checkpoint(0), model)
    (tmp_path / "hard.pt").hardlink_to(model)
    (tmp_path / "link.pt").symlink_to(model)
    (tmp_path / "link.onnx").symlink_to(model)
    for name, form in (("model.pt", "cmfast"), ("hard.pt", "cmfast"), ("link.pt", "cmfast"), ("link.onnx", "onnx")):
        refused(call(cli.main, model, "--format", form, "-o", tmp_path / name), "is read by this command")


def test_the_weights_beside_an_onnx_file_are_among_what_is_read(
    handmade_onnx: Make, call: Call, refused: Refused, tmp_path: Path
) -> None:
    import onnx

    model, data = tmp_path / "model.onnx", tmp_path / "weights.engine"
    made = onnx.load(handmade_onnx(8))
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(8, np.float32), "unused"))
    onnx.save(made, model, save_as_external_data=True, location=data.name, size_threshold=0)
    content = data.read_bytes()
    assert files_of(handmade_onnx(8)) == [handmade_onnx(8)]
    assert files_of(model) == [model, data]
    assert set(files_of(tmp_path)) >= {tmp_path, model, data}
    refused(
        call(cli.main, model, "--format", "engine", "-o", data),
        "weights.engine is read by this command, so it is not overwritten",
    )
    with pytest.raises(CmfastError, match="is read by this command"):
        build_engine(model, data, BuildOptions())
    assert data.read_bytes() == content


@pytest.mark.parametrize("form", ["onnx", "cmfast", "diffusers", "triton"])
def test_nothing_is_written_into_the_folder_that_is_read(
    form: str, no_work: None, call: Call, refused: Refused, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    name = {"onnx": "out.onnx", "cmfast": "out.pt"}.get(form, "out")
    for out in (folder / name, folder / "unet" / name):
        refused(call(cli.main, folder, "--format", form, "-o", out), "is the model that is read; name a place outside")
    assert os.listdir(folder) == ["unet"]


@pytest.mark.parametrize("form", ["diffusers", "triton"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    form: str, no_work: None, tiny_checkpoint: Make, call: Call, refused: Refused, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def export(*arguments: object) -> Any:
        return call(cli.main, tiny_checkpoint(0), "--format", form, *arguments)

    (tmp_path / "file").touch()
    refused(export("-o", tmp_path / "file"), "file exists and is not a")
    refused(export("-o", "/proc/out"), "not a place for files")
    parent = tmp_path / "parent"
    (parent / "out").mkdir(parents=True)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != parent and real(path, mode))  # to root all is
    refused(export("-o", parent / "out"), "parent")
    monkeypatch.setattr(os, "access", real)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == parent / "out")
    refused(export("-o", parent / "out"), "out is a ")
    monkeypatch.undo()
    if form == "diffusers":
        monkeypatch.setattr(conversion, "at", None)
        monkeypatch.chdir(parent / "out")
        refused(export("-o", "."), "a folder in use")


# One writer.


@pytest.mark.parametrize("form", ["onnx", "cmfast", "diffusers", "triton", "engine"])
def test_a_second_export_to_one_target_is_refused_before_its_work(
    form: str, no_work: None, tiny_checkpoint: Make, call: Call, refused: Refused, tmp_path: Path
) -> None:
    if form == "engine":
        pytest.importorskip("tensorrt_rtx")
    out = tmp_path / {"onnx": "m.onnx", "cmfast": "m.pt", "engine": "m.engine"}.get(form, "m")
    script = f"""
import sys
from cmfast.files.locks import exclusive, lock_beside
with exclusive(lock_beside({str(out)!r}), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        refused(
            call(cli.main, tiny_checkpoint(0), "--format", form, "-o", out),
            f"{out} is being written (pid {other.pid})",
        )
        other.communicate()


def test_functions_lock_their_target_and_one_inside_the_other_is_one_writer(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from cmfast_export.targets import diffusers_folder

    out, checkpoint = tmp_path / "out", load_checkpoint(tiny_checkpoint(0))
    with writing(out):
        assert lock_beside(out).exists()
        with ThreadPoolExecutor() as pool, pytest.raises(CmfastError, match=f"out is being written .pid {os.getpid()}"):
            pool.submit(diffusers_folder.export_diffusers, checkpoint, out).result()
        diffusers_folder.export_diffusers(checkpoint, out)
    assert os.listdir(tmp_path) == ["out"]
    assert _target._ours.get() == frozenset()


# Numbers.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "²"], "--batch ²: a number from 1 to 65,536, or dynamic"),
        (["--batch", "１"], "a number from 1 to"),
        (["--batch", "1" + "0" * 5000], "a number from 1 to"),
        (["--batch", "1000000000000"], "a number from 1 to"),
        (["--opset", "1000000000"], "opset must be from 18 to 23, got 1000000000"),
        (["--tolerance", "nan"], "the tolerance must be a finite number greater than 0"),
        (["--tolerance", "inf"], "got inf"),
        (["--kind", "sampler", "--steps", "0", "--dry-run"], "steps must be at least 1, got 0"),
        (["--kind", "sampler", "--sigmas", "nan", "--dry-run"], "sigmas must be finite noise levels above 0"),
        (["--kind", "sampler", "--sigmas", "0.8,80", "--dry-run"], "that strictly decrease, for example 80,0.8, got"),
        (["--kind", "sampler", "--sigmas", "inf", "--dry-run"], "sigmas must be finite noise levels above 0"),
        (["--kind", "sampler", "--sigmas", "80,0", "--dry-run"], "sigmas must be finite noise levels above 0"),
        (["--kind", "sampler", "--steps", "1000000000"], "a sampler graph has at most 64 steps, got 1000000000"),
        (
            ["--kind", "sampler", "--sigmas", ",".join(["1"] * 1_000_000)],
            "a sampler graph has at most 64 steps, got 1000000",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_absurd_number_is_one_line_before_the_checkpoint_is_read(
    arguments: list[str], words: str, no_work: None, tiny_checkpoint: Make, call: Call, refused: Refused,
    tmp_path: Path,
) -> None:  # fmt: skip
    refused(call(cli.main, tiny_checkpoint(0), "-o", tmp_path / "m.onnx", *arguments), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--build", "batch=1,1000000000000"], "batch must be the smallest"),
        (["--build", "batch=1,8,1000000000000"], "the largest batch must be at least 1 and at most 65,536 images"),
        (["--build", "batch=²"], "'²' is not a valid value for batch (whole numbers"),
        (["--build", "batch=1" + "0" * 5000], "is not a valid value for batch"),
        (["--build", "workspace_mib=99999999999999"], "workspace_mib must be at least 0 and at most 1,048,576 MiB"),
        (["--build", "level=100000000000000000000"], "level must be from 0 to 5"),
        (["--build", "level=²"], "is not a valid value for level (a whole number)"),
        (["--build", "level"], "expected NAME=VALUE"),
        (["--build", "level=1", "--build", "level=1"], "level is given twice"),
        (["--target", "8.9", "--build", "target=8.9"], "target is given twice"),
        (["--target", "8.９"], "target takes different compute capabilities"),
        (["--target", "8.9,,12.0"], "is not a valid value for target"),
        (["--target", ""], "is not a valid value for target"),
        (["--target", ",".join(f"{n}.0" for n in range(100, 9999))], "target takes different|this version builds for"),
        (["--target", "99999.9"], "target 99999.9: this version builds for"),
        (["--build", "timing_cache=/dev/null"], "timing_cache"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_absurd_option_of_an_engine_is_one_line_before_the_work(
    arguments: list[str], words: str, no_work: None, handmade_onnx: Make, call: Call, refused: Refused, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = call(cli.main, handmade_onnx(8), "--format", "engine", "-o", tmp_path / "m.engine", *arguments)
    refused(result)
    assert any(word in result.stderr for word in words.split("|"))
    assert len(result.stderr) < 600


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("instances=1" + "0" * 23, "instances must be at least 1 and at most 1,000"),
        ("instances=1" + "0" * 5000, "is not a valid value for instances"),
        ("max_batch=1000000", "max_batch must be at least 1 and at most 4,096 images, got 1000000"),
        ("queue_delay_us=18446744073709551616", "queue_delay_us must be at least 0 and at most 60,000,000 microsec"),
        ("name=" + "a" * 300, "at most 200 characters"),
        ("max_batch=³", "is not a valid value for max_batch (a whole number)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_absurd_option_of_a_server_is_one_line_before_the_work(
    option: str, words: str, no_work: None, tiny_checkpoint: Make, call: Call, refused: Refused, tmp_path: Path
) -> None:
    refused(call(cli.main, tiny_checkpoint(0), "--format", "triton", "-o", tmp_path / "r", "--serve", option), words)


def test_a_timing_cache_must_not_be_what_is_read_or_written(handmade_onnx: Make, tmp_path: Path) -> None:
    from cmfast_export.targets import tensorrt_engine
    from cmfast_export.targets.tensorrt_engine import check_build
    from cmfast_export.targets.tensorrt_options import BuildOptions

    onnx, out = tmp_path / "model.onnx", tmp_path / "model.engine"
    shutil.copyfile(handmade_onnx(8), onnx)
    os.mkfifo(tmp_path / "fifo")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tensorrt_engine, "import_library", lambda name, what: None)
        for file, words in ((onnx, "is read by"), (out, "name the same file"), (tmp_path / "fifo", "is a FIFO")):
            options = BuildOptions(library="tensorrt", timing_cache=str(file))
            with pytest.raises(CmfastError, match=words):
                check_build(options, out, None, [onnx])


# Full disks.


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writing past so many bytes fail, as on a full disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("form", ["diffusers", "cmfast", "safetensors", "triton", "engine"])
def test_a_full_disk_is_one_line_with_the_target_and_leaves_nothing(
    form: str, tiny_checkpoint: Make, handmade_onnx: Make, call: Call, refused: Refused, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    if form == "engine":
        pytest.importorskip("tensorrt_rtx")
    model = handmade_onnx(8) if form == "engine" else tiny_checkpoint(0)
    if form == "triton":  # a file of kind server that costs no export
        model = plan(tmp_path_factory.mktemp("plan") / "a.plan")
    out = tmp_path / {"cmfast": "m.pt", "safetensors": "m.safetensors", "engine": "m.engine"}.get(form, "m")
    with files_of_at_most(1024 if form == "triton" else 8192):
        result = call(cli.main, model, "--format", "cmfast" if form == "safetensors" else form, "-o", out)
    refused(result, f"cannot write {tmp_path}", "the file would be larger than this process may write")
    assert not list(tmp_path.iterdir())
