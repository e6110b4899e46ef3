# SPDX-License-Identifier: MIT
"""Writing files: an exception, a kill and a full disk leave the old file or the new one, and nothing half."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cmfast.errors import CmfastError
from cmfast.files import (
    atomic_file,
    atomic_folder,
    check_outputs,
    check_target,
    check_target_folder,
    temporary_folder,
    write_text,
)

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
    """Kill a process in the middle."""
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
    refused(result, "no space left in")
    assert (tmp_path / "left").read_text() == ""


@pytest.mark.parametrize("out", ["grid.png", "images.npz"])
def test_a_limit_on_the_size_of_files_is_one_line_and_leaves_nothing(
    out: str, handmade_onnx: Callable[..., Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    limited = ["sh", "-c", 'ulimit -f 2; exec "$@"', "sh", *cmfast_sample(handmade_onnx(32), out)]
    refused(subprocess.run(limited, capture_output=True, text=True, cwd=tmp_path), "larger than this process may write")
    assert os.listdir(tmp_path) == []


def test_the_two_checks_above_can_fail(handmade_onnx: Callable[..., Path], tmp_path: Path) -> None:
    result = subprocess.run(cmfast_sample(handmade_onnx(32), "grid.png"), capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "grid.png").stat().st_size > 4096  # more than the disk and the limit have room for


def test_what_a_killed_process_left_is_removed_by_the_next_write_and_nothing_else_is(tmp_path: Path) -> None:
    others = [".draft.tmp.md", ".plan.tmp", ".target.0123456789.cmfast-tmp", ".target.01234567-01234567.cmfast-tmp"]
    for name in others:
        (tmp_path / name).write_text("x")
    kill_while_writing("file", tmp_path / "target")
    assert len(os.listdir(tmp_path)) == len(others) + 1
    kill_while_writing("folder", tmp_path / "images")  # which removes the first one's
    assert len(os.listdir(tmp_path)) == len(others) + 1
    write_text(tmp_path / "another", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "another"])


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "slow") as slow, atomic_folder(tmp_path / "images") as images:
        write_text(tmp_path / "another", "new")
        (images / "a").touch()
        slow.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == ["another", "images", "slow"]


def test_a_scratch_folder_goes_with_its_block(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "model.onnx") as folder:
        (folder / "a").mkdir()
        assert folder.parent == tmp_path
    assert os.listdir(tmp_path) == []


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to_fifo").symlink_to(tmp_path / "fifo")
    (tmp_path / "to_null").symlink_to("/dev/null")
    (tmp_path / "to_proc").symlink_to(f"/proc/{os.getpid()}/comm")
    for path, words in (
        (tmp_path / "fifo", "is a FIFO, not a regular file"),
        (tmp_path / "to_fifo", "is a FIFO"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "to_null", "is a device"),
        (tmp_path / "to_proc", "is not a place for files"),
        (Path("/proc/new.json"), "is not a place for files"),
        (Path("/dev/stdout"), "name a"),
    ):
        with pytest.raises(CmfastError, match=words):
            write_text(path, "text")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real.json").write_text("old")
    (tmp_path / "latest.json").symlink_to(Path("there") / "real.json")
    (tmp_path / "next.json").symlink_to(Path("there") / "new.json")  # which does not exist yet
    for name in ("latest.json", "next.json"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "new"
    assert sorted(os.listdir(tmp_path / "there")) == ["new.json", "real.json"]


def test_what_a_command_reads_is_never_its_output(tmp_path: Path) -> None:
    model = tmp_path / "m.pt"
    model.touch()
    (tmp_path / "link").symlink_to(model)
    os.link(model, tmp_path / "hard")
    for name in ("m.pt", "link", "hard", "./m.pt"):
        with pytest.raises(CmfastError, match="is read by this command"):
            check_target(tmp_path / name, inputs=[tmp_path / "other", model])
    (tmp_path / "data").mkdir()
    with pytest.raises(CmfastError, match="is read by this command"):
        check_target_folder(tmp_path / "data", inputs=[tmp_path / "data"])
    assert check_target(tmp_path / "new.pt", inputs=[model]) == tmp_path / "new.pt"


def test_two_outputs_of_a_command_are_two_files(tmp_path: Path) -> None:
    check_outputs({"--json": tmp_path / "a", "--plot": tmp_path / "b", "-o": None}, inputs=[tmp_path / "c"])
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CmfastError, match="--json and --plot name the same file"):
        check_outputs({"--json": tmp_path / "a", "--plot": tmp_path / "b"})
    with pytest.raises(CmfastError, match=r"--json: .*is read by this command"):
        check_outputs({"--json": tmp_path / "a"}, inputs=[tmp_path / "b"])


def test_a_suffix_is_checked_in_any_case(tmp_path: Path) -> None:
    assert check_target(tmp_path / "A.JSON", suffixes=(".json",)).name == "A.JSON"
    with pytest.raises(CmfastError, match=r"the name must end in \.json or \.jsonl"):
        check_target(tmp_path / "a.pt", suffixes=(".json", ".jsonl"))


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", tmp_path / "here", tmp_path / "here" / "." / "" / ".." / "here"):
        with pytest.raises(CmfastError, match="name a new folder in it"):
            check_target_folder(path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(CmfastError, match=r"mounted is a mount point.*name a new folder in it"):
        check_target_folder(tmp_path / "mounted")


@pytest.mark.parametrize("check", [check_target, check_target_folder])
def test_a_folder_without_permission_is_refused_before_the_work(
    check: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not stop root, who runs these tests in containers; what the system answers is what is checked.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CmfastError, match="no permission to write in"):
        check(tmp_path / "new")


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path / "real") == ["a"]


def test_a_name_as_long_as_the_system_allows_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("é" * 125 + ".txt"), "new")
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_asking_the_disk_after_an_error_touches_no_file_outside(
    link: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"whole" * 1000)

    def fill_folder() -> None:
        with atomic_folder(tmp_path / "folder") as folder:
            link(precious, folder / "model")
            (folder / "small").write_text("small")
            raise RuntimeError("a library's")

    def fill_file() -> None:
        with atomic_file(tmp_path / "file") as file:
            file.unlink()
            link(precious, file)
            raise RuntimeError("a library's")

    for fill in (fill_folder, fill_file):
        with pytest.raises(RuntimeError, match="a library's"):
            fill()
    assert precious.read_bytes() == b"whole" * 1000
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left in"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "larger than this process may write"),
    ],
)
def test_a_full_disk_behind_a_librarys_own_error_is_one_line(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.pt"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    def write() -> None:
        with atomic_file(target):
            monkeypatch.setattr(os, "fsync", full)
            raise RuntimeError("PytorchStreamWriter failed writing file")  # as torch.save has it

    with pytest.raises(CmfastError, match=words) as refused:
        write()
    assert f"cannot write {target}" in str(refused.value)
    assert target.read_text() == "old"
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="a bug"), atomic_file(target):  # with room on the disk it is something else
        raise RuntimeError("a bug")
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_empty_and_new_may_be_about_to_be_locked_by_its_writer_and_stays_for_now(
    kind: str, tmp_path: Path
) -> None:
    kill_while_writing(kind, tmp_path / "target")
    (left,) = tmp_path.iterdir()
    if kind == "file":
        left.write_text("")
    else:
        (left / "a").unlink()
    write_text(tmp_path / "another", "new")
    assert left.exists()
    os.utime(left, (time.time() - 60,) * 2)
    write_text(tmp_path / "another", "new")
    assert not left.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_process_has_written_to_goes_as_soon_as_it_is_dead(kind: str, tmp_path: Path) -> None:
    kill_while_writing(kind, tmp_path / "target")
    assert len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / "another", "new")
    assert os.listdir(tmp_path) == ["another"]


WRITERS = """
import sys
from pathlib import Path
from cmfast.files import atomic_file, atomic_folder
folder, name = Path(sys.argv[1]), sys.argv[2]
for number in range(150):
    with atomic_folder(folder / f"{name}{number}") as new:
        (new / "a").touch()
    with atomic_file(folder / name) as file:
        file.write_text(str(number))
"""


def test_many_writers_in_one_folder_do_not_take_each_others_files_for_leftovers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in "abc"]
    for writer in writers:
        _, err = writer.communicate(timeout=60)
        assert (writer.returncode, err) == (0, b"")
    assert len(os.listdir(tmp_path)) == 3 * 151


def test_a_bug_while_writing_keeps_its_cause(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "target"):
            try:
                int("x")
            except ValueError as err:
                raise RuntimeError("a bug") from err

    with pytest.raises(RuntimeError, match="a bug") as raised:
        write()
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_link_in_a_folder_without_permission_may_lead_to_one_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "writable").mkdir()
    (tmp_path / "link").symlink_to(Path("writable") / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name == "writable")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "writable" / "file").read_text() == "new"
