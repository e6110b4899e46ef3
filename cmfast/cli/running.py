# SPDX-License-Identifier: MIT
"""What all commands share: one line for an error the user can fix, a traceback for a bug, exit codes, streams."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import select
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from cmfast.errors import CmfastError, CmfastWarning, MissingDependency, one_line, printable

READER_GONE = 141  # what a shell reports for a program that SIGPIPE ended


def run_command(command: click.Command) -> NoReturn:
    """Run a click command and exit.

    0 success, 1 a check failed, 2 the request cannot be fulfilled, 130 interrupted, 141 the output has lost its reader.
    """
    name = command.name or "cmfast"
    # Python's last search for garbage looks through all that was imported: half a second with PyTorch, twice that after
    # an export.
    atexit.register(gc.freeze)
    _open_closed_streams()
    _print_warnings_as_one_line(name)
    code = 0
    try:
        code = _exit_code(command, name)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_streams()
        code = READER_GONE
    except OSError as err:  # from the flush: a full disk behind the standard output
        _silence_streams()
        code = code or _report(name, f"cannot write the output: {err.strerror}", 2)  # else it is reported already
    sys.exit(code)


def report_interrupt(name: str) -> int:
    """Print that a command was interrupted and return its exit code. Another Ctrl-C ends it at once."""
    code = _report(name, "interrupted", 130)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Turn a failed import of an optional package in the block into the pip line that installs it."""
    try:
        yield
    except ModuleNotFoundError as err:
        package = (err.name or "").split(".")[0]
        if package.startswith("cmfast") or not package:
            raise
        raise MissingDependency(what, package, extra) from None


def _exit_code(command: click.Command, name: str) -> int:
    """Run the command; return its exit code, after the one line of an error. A bug keeps its traceback."""
    if f"_{name}_COMPLETE".replace("-", "_").upper() in os.environ:  # a shell asks for completions
        command.main(prog_name=name)
    try:
        # Not command.main, which turns a broken pipe into exit code 1: that means a failed check here.
        with command.make_context(name, _arguments()) as context:
            code = command.invoke(context)
        return code if isinstance(code, int) else 0
    except CmfastError as err:
        return _report(name, str(err), err.exit_code)
    except click.exceptions.Exit as err:
        return err.exit_code
    except (click.Abort, KeyboardInterrupt):
        return report_interrupt(name)
    except click.ClickException as err:
        return _report(name, f"{err.format_message()} (see {name} --help)", 2)
    except BrokenPipeError as err:
        if _reader_has_gone():
            raise
        return _report(name, f"a process that this command depends on has ended: {err.strerror}", 2)
    except MemoryError as err:
        why = f" ({one_line(err, 150)})" if str(err) else ""
        return _report(name, f"out of memory{why}; try a smaller batch or fewer images", 2)
    except OSError as err:  # no permission, a failing disk: the system's own words are the clearest
        named = err.filename if isinstance(err.filename, (str, bytes)) else ""  # it may be a descriptor
        return _report(name, f"{os.fsdecode(named)}: {err.strerror}" if named else err.strerror or str(err), 2)


def _arguments() -> list[str]:
    if os.name == "nt":  # shells there leave wildcards to the programs
        from click.utils import _expand_args

        return list(_expand_args(sys.argv[1:]))
    return sys.argv[1:]


def _reader_has_gone() -> bool:
    """Whether nothing reads standard output or standard error any more."""
    if not hasattr(select, "poll"):
        return True
    streams = select.poll()
    for number in (1, 2):
        streams.register(number, 0)
    return any(event & select.POLLERR for _, event in streams.poll(0))


def _open_closed_streams() -> None:
    """Open the streams that the caller has closed (`2>&-`), and replace characters that a stream cannot encode.

    Otherwise the next file that is opened would get the number of a closed stream, and C libraries would write their
    messages into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:
            opened = open(os.devnull, "r" if stream == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, stream, opened)
    for output, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors=errors)


def _silence_streams() -> None:
    """Discard what is left of the output, so that the interpreter's last flush does not fail."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(devnull, stream.fileno())


def _print_warnings_as_one_line(name: str) -> None:
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, CmfastWarning):
            click.echo(f"{name}: warning: {printable(one_line(message, 2000))}", err=True)
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show


def _report(name: str, message: str, code: int) -> int:
    click.echo(f"{name}: {printable(' '.join(message.split()))}", err=True)
    return code
