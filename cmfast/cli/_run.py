# SPDX-License-Identifier: MIT
"""What all commands share: one line for what a user can mend, a traceback for a bug."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from cmfast.errors import CmfastError, CmfastWarning, MissingDependency


def run_command(command: click.Command) -> None:
    """Run a click command and exit: 0 done, 1 a check failed, 2 the request cannot be fulfilled, 130 interrupted."""
    name = command.name or "cmfast"
    _print_warnings_as_one_line(name)
    try:
        code = command.main(prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except CmfastError as err:
        _fail(name, str(err), err.exit_code)
    except click.exceptions.Exit as err:
        sys.exit(err.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail(name, "interrupted", 130)
    except click.ClickException as err:
        _fail(name, f"{err.format_message()} (see {name} --help)", 2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, for example `| head`
        sys.exit(141)
    except OSError as err:  # disk full, no permission: the system's own words are the clearest
        _fail(name, f"{err.filename}: {err.strerror}" if err.filename else str(err), 2)


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Turn a failing import of an optional package in the block into the pip line that installs it."""
    try:
        yield
    except ModuleNotFoundError as err:
        package = (err.name or "").split(".")[0]
        if package.startswith("cmfast") or not package:
            raise
        raise MissingDependency(what, package, extra) from None


def _print_warnings_as_one_line(name: str) -> None:
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, CmfastWarning):
            click.echo(f"{name}: warning: {message}", err=True)
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show


def _fail(name: str, message: str, code: int) -> None:
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(code)
