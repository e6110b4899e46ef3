# SPDX-License-Identifier: MIT
"""Writing files: an exception, a kill and a full disk leave the old file or the new one, and nothing half."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cmfast.errors import CmfastError
from cmfast.files import atomic_file, atomic_folder, write_text

HALF_WRITTEN = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
from cmfast.files import atomic_file, atomic_folder
kind, path = sys.argv[1:]
make = {"file": atomic_file, "folder": atomic_folder, "plainly": nullcontext}[kind]
with make(Path(path)) as temporary:
    (temporary / "a" if kind == "folder" else temporary).write_text("half of the ne")
    print("half", flush=True)
    time.sleep(60)
"""
# Runs the command line after it where the disk holds one page; "what is left" is listed from inside.
FULL_DISK = 'mount -t tmpfs -o size=4k full "$0" && cd "$0" && "$@"; code=$?; ls -A >&3; exit $code'


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_the_new_file_appears_whole_and_the_temporary_one_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_text("old")
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent  # a rename across file systems is a copy
        assert temporary.suffix == ".bin"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_the_new_file_takes_the_place_of_the_old_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_text("old")
    with target.open() as reader:
        with atomic_file(target) as temporary:
            temporary.write_text("new")
            inode = temporary.stat().st_ino
        assert reader.read() == "old"  # who has the old file open goes on reading it
    assert target.stat().st_ino == inode  # a rename, not a copy


def test_the_new_folder_appears_whole(tmp_path: Path) -> None:
    for name in ("new", "empty"):
        target = tmp_path / name
        if name == "empty":
            target.mkdir()
        with atomic_folder(target) as temporary:
            (temporary / "a").write_text("a")
            (temporary / "b").write_text("b")
            assert not target.exists() or not os.listdir(target)
        assert visible(target) == ["a", "b"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "new"]


def test_the_temporary_folder_stands_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "watched").mkdir()
    with atomic_folder(tmp_path / "watched" / "new", within=tmp_path) as temporary:
        (temporary / "a").write_text("a")
        assert temporary.parent == tmp_path
        assert os.listdir(tmp_path / "watched") == []
    assert os.listdir(tmp_path) == ["watched"]
    assert (tmp_path / "watched" / "new" / "a").read_text() == "a"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_other(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_text("old")

    def write_half() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_an_exception_leaves_no_folder(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_folder(tmp_path / "images") as temporary:
            (temporary / "a").write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011, it has no words
        write_half()
    assert os.listdir(tmp_path) == []


def kill_while_writing(kind: str, target: Path) -> None:
    command = [sys.executable, "-c", HALF_WRITTEN, kind, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    kill_while_writing("file", target)
    assert visible(tmp_path) == ["target"]
    assert target.read_text() == "old"


def test_a_process_killed_while_writing_leaves_no_folder_and_the_next_is_not_in_its_way(tmp_path: Path) -> None:
    target = tmp_path / "target"
    kill_while_writing("folder", target)
    assert visible(tmp_path) == []
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("new")
    assert visible(target) == ["a"]


def test_a_process_killed_while_writing_plainly_leaves_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    kill_while_writing("plainly", target)
    assert target.read_text() == "half of the ne"  # the two tests above can fail


def test_files_are_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "text", "hello\n")
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "a").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_target_that_cannot_be_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    for make, name, words in (
        (atomic_file, "no/where", f"the folder {tmp_path}/no does not exist; make it first: mkdir -p {tmp_path}/no"),
        (atomic_file, "full", "full is a folder"),
        (atomic_folder, "no/where", "does not exist; make it first"),
        (atomic_folder, "full", "exists and is not an empty folder"),
        (atomic_folder, "file", "exists and is not an empty folder"),
    ):
        with pytest.raises(CmfastError) as raised, make(tmp_path / name):
            pytest.fail("the block was entered")
        assert words in str(raised.value)


def cmfast_sample(model: Path, out: str) -> list[str]:
    return [sys.executable, "-m", "cmfast.cli.sample", str(model), "-n", "100", "-o", out]


@pytest.mark.parametrize("out", ["grid.png", "images.npz", "folder"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    out: str, handmade_onnx: Callable[..., Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    inner = ["sh", "-c", f"exec 3>{tmp_path}/left; {FULL_DISK}", str(tmp_path)]
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, *inner, "true"], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here, not even in a namespace of one's own")
    result = subprocess.run(
        [*namespace, *inner, *cmfast_sample(handmade_onnx(32), out)], capture_output=True, text=True
    )
    refused(result, "No space left on device")
    assert (tmp_path / "left").read_text() == ""


@pytest.mark.parametrize("out", ["grid.png", "images.npz"])
def test_a_limit_on_the_size_of_files_is_one_line_and_leaves_nothing(
    out: str, handmade_onnx: Callable[..., Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    limited = ["sh", "-c", 'ulimit -f 2; exec "$@"', "sh", *cmfast_sample(handmade_onnx(32), out)]
    refused(subprocess.run(limited, capture_output=True, text=True, cwd=tmp_path), "File too large")
    assert os.listdir(tmp_path) == []


def test_the_two_checks_above_can_fail(handmade_onnx: Callable[..., Path], tmp_path: Path) -> None:
    result = subprocess.run(cmfast_sample(handmade_onnx(32), "grid.png"), capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "grid.png").stat().st_size > 4096  # more than the disk and the limit have room for
