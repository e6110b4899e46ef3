# SPDX-License-Identifier: MIT
"""What all commands share: standard streams that are closed, full or of another encoding; interrupts; exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from cmfast.cli.running import run_command
from cmfast.errors import CmfastError, CmfastWarning, printable

Result = subprocess.CompletedProcess


def shell(line: str, *arguments: object, **environment: str) -> Result[bytes]:
    """Run a line of sh, with "$@" for the arguments."""
    command = ["sh", "-c", line, "sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, env=os.environ | environment)


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_with_standard_streams_closed(
    closed: str, handmade_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    sample = command("cmfast.cli.sample", handmade_onnx(), "-n", 1, "-o", tmp_path / "grid.png")
    result = shell(f'"$@" {closed}', *sample)
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_messages_of_libraries_do_not_get_into_a_file_when_stderr_is_closed(tmp_path: Path) -> None:
    code = f"""
import click, os
from cmfast.cli.running import run_command
@click.command("cmfast-test")
def test():
    with open({str(tmp_path / "out")!r}, "w") as file:
        os.write(2, b"a library in C says something")
        file.write("content")
run_command(test)
"""
    assert shell('"$@" 2>&-', sys.executable, "-c", code).returncode == 0
    assert (tmp_path / "out").read_text() == "content"


def test_a_name_that_the_terminal_cannot_show_is_no_error(handmade_onnx: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "Bänder-Ж.png"
    sample = command("cmfast.cli.sample", handmade_onnx(), "-n", 1, "-o", out)
    result = shell('"$@"', *sample, PYTHONIOENCODING="cp1252")
    assert (result.returncode, result.stderr) == (0, b"")
    assert "Bänder-?.png".encode("cp1252") in result.stdout
    assert out.exists()


def test_a_name_that_is_not_utf_8_is_no_error(handmade_onnx: Callable[..., Path], tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/\xff.png"
    sample = [os.fsencode(word) for word in command("cmfast.cli.sample", handmade_onnx(), "-n", 1, "-o")]
    result = subprocess.run([*sample, out], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert os.path.exists(out)


@pytest.mark.parametrize("module", ["cmfast.cli.info", "cmfast.cli.sample", "cmfast_export.cli"])
def test_a_reader_that_has_gone_is_no_failed_check(module: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        result = subprocess.run(command(module, "--help"), stdout=broken, stderr=subprocess.PIPE, timeout=60)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_one_line(unbuffered: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    result = shell('"$@" > /dev/full', *command("cmfast.cli.info", "--help"), PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 2
    assert result.stderr == b"cmfast-info: No space left on device\n"


@pytest.mark.parametrize("module", ["cmfast.cli.sample", "click", "cmfast.cli.running"])
def test_an_interrupt_while_a_command_is_imported_is_one_line(module: str) -> None:
    code = f"""
import importlib.abc, os, signal, sys
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from cmfast.cli.commands import sample
sample()
"""
    result = shell('"$@"', sys.executable, "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"cmfast-sample: interrupted\n")


def test_an_interrupt_at_work_is_one_line(handmade_onnx: Callable[..., Path], tmp_path: Path) -> None:
    sample = command("cmfast.cli.sample", handmade_onnx(256), "-n", 100_000, "--batch", 8, "-o", tmp_path / "x.npz")
    with subprocess.Popen(sample, stderr=subprocess.PIPE) as process:
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"cmfast-sample: interrupted\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "handler"),
    [
        ("signal.raise_signal(signal.SIGINT)", "raise ImportError('initialization failed') from None"),
        ("signal.raise_signal(signal.SIGINT)", "raise RecursionError from None"),
        ("signal.raise_signal(signal.SIGINT)", "pass"),
        ("weakref.ref(X, lambda _: signal.raise_signal(signal.SIGINT)); del X", "pass"),
    ],
    ids=["an extension module", "a half-imported package", "swallowed", "a callback"],
)
def test_ctrl_c_in_an_import_that_hides_it_is_one_line(body: str, handler: str, tmp_path: Path) -> None:
    (tmp_path / "hides.py").write_text(
        f"import signal, weakref\nclass C: pass\nX = C()\n"
        f"try:\n    r = {body}\nexcept KeyboardInterrupt:\n    {handler}\n".replace("r = signal", "signal")
    )
    code = """
from cmfast.cli.interrupt import interruptible
with interruptible("cmfast-sample"):
    import hides
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (130, b"cmfast-sample: interrupted\n")


def test_an_empty_memory_is_one_line(call: Callable[..., Result[str]], refused: Callable[..., None]) -> None:
    def use_up() -> None:
        raise MemoryError("Unable to allocate 7 PiB")

    refused(call(lambda: run_command(click.Command("cmfast-test", callback=use_up))), "Unable to allocate 7 PiB")


@pytest.mark.parametrize("kind", ["error", "warning"])
def test_what_a_message_quotes_reaches_the_terminal_escaped(kind: str, call: Callable[..., Result[str]]) -> None:
    name = "a\x1b[2J\nforged: line\x07\u202eb\udcff\r"

    def quote() -> None:
        shown = warnings.showwarning  # of the command; a new context has none
        if kind == "error":
            raise CmfastError(f"{name}: not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = shown
            warnings.warn(f"{name}: strange", CmfastWarning, stacklevel=1)

    result = call(lambda: run_command(click.Command("cmfast-test", callback=quote)))
    (line,) = result.stderr.splitlines()
    assert r"a\x1b[2J forged: line\x07\u202eb\udcff" in line


def test_texts_that_people_read_are_printed_as_they_are() -> None:
    text = "grüne Äpfel, 日本　語, 😀 /path/to a file"
    assert printable(text) == text
    assert printable("a\tb\u2028c\x7f") == r"a\tb\u2028c\x7f"


def test_a_pipe_of_our_own_that_breaks_is_not_the_reader_of_the_output(
    call: Callable[..., Result[str]], refused: Callable[..., None]
) -> None:
    def write() -> None:
        read, end = os.pipe()
        os.close(read)
        os.write(end, b"x")

    refused(call(lambda: run_command(click.Command("cmfast-test", callback=write))), "has ended: Broken pipe")
