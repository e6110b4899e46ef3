# SPDX-License-Identifier: MIT
"""Where something happens in a user's network, in words: the module, the file, the line.

`probe` and `trace` name them in errors.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import re
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmfast.errors import CmfastError, one_line
from cmfast_train.denoiser import Denoiser

# What an error of torch.export means, by a word in it.
MEANINGS = {"data-dependent": "the code branches on the value of a tensor"}


def failed(where: str, err: Exception, more: str = "") -> CmfastError:
    """Return the error for a network that fails by itself; an error of ours says everything already."""
    if isinstance(err, CmfastError):
        return err
    call = "; it is called as net(x, c_noise, **conditions)" if "argument" in str(err) else ""
    return CmfastError(f"{where} fails{more}{at(err)}: {reason(err)}{call}")


def at(err: BaseException) -> str:
    """Return " at FILE:LINE: CODE" of the user's code that an error comes from, or nothing."""
    frames = [(f.filename, f.lineno or 0, f.line or "") for f in traceback.extract_tb(err.__traceback__)]
    line = place(frames) or line_of(str(err))
    return f" at {line}" if line else ""


def reason(err: BaseException) -> str:
    """Return the first sentence of an error, with its type."""
    known = next((meaning for word, meaning in MEANINGS.items() if word in str(err)), "")
    text = re.split(r"(?<=[.;:])\s*\n|\n\n|The error above occurred", str(err).strip())[0]
    return known or f"{type(err).__name__}: {one_line(text, 200)}"


def module_that_fails(module: nn.Module, run: Callable[[], object]) -> tuple[str, Exception | None]:
    """Call `run`; return the path and type of the innermost part of a module in which that stops, and the error."""
    entered: list[str] = []

    def enter(name: str, part: nn.Module) -> Any:
        return part.register_forward_pre_hook(lambda *_: entered.append(in_words(name, part)))

    def leave(part: nn.Module) -> Any:
        return part.register_forward_hook(lambda *_: entered.pop() and None)

    parts = [(name, part) for name, part in module.named_modules() if name]
    handles = [enter(*each) for each in parts] + [leave(part) for _, part in parts]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            run()
    except Exception as err:
        return (entered[-1] if entered else "the network"), err
    finally:
        for handle in handles:
            handle.remove()
    return "the network", None


def in_words(name: str, module: nn.Module) -> str:
    """Return a module as errors name it: its path in the denoiser, and its class."""
    return f"{name} ({type(module).__name__})"


def line_of(stack: str) -> str:
    """Return the innermost place of a printed stack that is neither torch's nor ours."""
    found = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return place([(name, int(number), "") for name, number in found])


def place(frames: list[tuple[str, int, str]]) -> str:
    """Return FILE:LINE: CODE of the innermost frame that is neither torch's nor ours; "" if there is none."""
    for name, number, code in reversed(frames):
        if is_foreign(name):
            code = code or linecache.getline(name, number).strip()
            return f"{Path(name).name}:{number}: {one_line(code, 100)}"
    return ""


def is_foreign(name: str) -> bool:
    """Whether a file of code is neither torch's nor ours nor of Python's library."""
    own = {Path(torch.__file__).parent, Path(__file__).parent.parent, Path(inspect.getfile(Denoiser)).parent}
    path = Path(name)
    library = Path(sysconfig.get_path("stdlib")) in path.parents and "site-packages" not in path.parts
    of_torch = {"sympy", "mpmath"}.intersection(path.parts)  # which computes sizes with them
    return path.is_absolute() and not library and not of_torch and not own.intersection(path.parents)
