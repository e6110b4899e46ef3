# SPDX-License-Identifier: MIT
"""Locks between processes: one holder, named by its process, and none that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmfast.errors import CmfastError
from cmfast.files.locks import exclusive, lock_beside

HOLD = """
import sys, time
from cmfast.files.locks import exclusive
with exclusive(sys.argv[1], "somebody writes"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process_holds(lock: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def take(lock: Path) -> None:
    with exclusive(lock, "a run is going on in runs/a"):
        pass


def test_a_second_process_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with another_process_holds(lock) as process, pytest.raises(CmfastError) as refused:
        take(lock)
    assert str(refused.value) == f"a run is going on in runs/a (pid {process.pid})"


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with another_process_holds(lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.exists()
        take(lock)
    assert os.listdir(tmp_path) == []


def test_a_second_thread_is_refused_as_well(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def other() -> None:
        try:
            take(tmp_path / "lock")
        except CmfastError as err:
            caught.append(err)

    with exclusive(tmp_path / "lock", "first"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert str(caught[0]).endswith(f"(pid {os.getpid()})")
    take(tmp_path / "lock")  # free again


def test_a_lock_outlives_no_child_that_was_forked_meanwhile(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from cmfast.files.locks import exclusive
with exclusive({str(tmp_path / "lock")!r}, "busy"):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    os.kill(os.getpid(), 9)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        process.wait()
        take(tmp_path / "lock")
        os.killpg(process.pid, signal.SIGKILL)


def test_an_error_in_the_block_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock", "busy"):
        1 / 0  # noqa: B018
    take(tmp_path / "lock")


def test_the_lock_of_a_target_is_beside_it_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model.onnx").touch()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "model.onnx")
    assert lock_beside(tmp_path / "link.onnx") == tmp_path / "real" / ".model.onnx.cmfast-lock"
    assert len(os.fsencode(lock_beside(tmp_path / ("é" * 120)).name)) < 256


def test_a_child_that_was_forked_under_a_lock_can_lock_when_it_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    go_read, go_write = os.pipe()
    with exclusive(lock, "busy"):
        child = os.fork()
        if child == 0:
            os.read(go_read, 1)
            try:
                take(lock)
            except BaseException:
                os._exit(1)
            os._exit(0)
    os.write(go_write, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_lock_file_of_another_user_is_one_line_that_says_what_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    real = os.open

    def refuse(path: str, *arguments: int) -> int:
        if path == str(lock):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CmfastError, match=r"by another user; if that process was killed, remove .*lock"):
        take(lock)
