# SPDX-License-Identifier: MIT
"""Items of work within a budget of seconds: independent, so that none can take the others down.

Two processes. The worker runs one item after another and writes a line for each. The supervisor imports no library that
could hang or crash: it kills a worker whose item takes too long or whose time is up, writes the line for that item, and
starts the next worker, which continues after it. A worker also exits when an item has left CUDA unusable, and when its
supervisor is gone.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cmfast.errors import CmfastError, one_line
from gpu_lines import ROOT, Line, Lines

START_S = 4.0  # a worker is not started with less time left; importing PyTorch takes it
END_S = 0.5  # of the budget, kept for ending the worker
GONE = 3  # exit status of a worker in which CUDA is unusable
IDLE_LIMIT_S = 60.0  # a worker that has not started an item after this long hangs in an import


class NotHere(CmfastError):
    """This machine cannot do it: a result, not a failure."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A piece of work with a line of its own."""

    name: str
    run: Callable[[], Line]  # returns the values of the line
    expect_s: float = 1.0  # the most it takes when all is well; it is not started with less time left
    limit_s: float = 45.0  # it is killed after this long


def work(items: Iterable[Item], lines: Lines, until: float, pipe: int) -> int:
    """Run the items that have no line yet, the worker's side; return the exit status.

    Args:
        items: in the order to run them.
        lines: the output.
        until: when the budget ends, by time.monotonic(), which all processes on a machine share.
        pipe: where the supervisor reads what is running.
    """
    end_with_parent()
    for item in items:
        if item.name in lines.done:
            continue
        left = until - END_S - time.monotonic()
        if left < item.expect_s:
            why = f"{max(left, 0):.1f} s of the budget were left, and it may take {item.expect_s:.1f} s"
            lines.write({"item": item.name, "skipped": why})
            continue
        say(pipe, f"{min(time.monotonic() + item.limit_s, until)} {item.name}")
        begun = time.monotonic()
        try:
            values = item.run()
        except Exception as err:
            values = {"not_here" if isinstance(err, NotHere) else "error": _reason(err)}
        lines.done.add(item.name)
        lines.write({"item": item.name, "seconds": round(time.monotonic() - begun, 3), **values})
        free_memory()
        if "error" in values and not cuda_works():
            return GONE
    return 0


def supervise(command: list[str], lines: Lines, until: float) -> Line:
    """Run workers until all items have lines or the budget ends, the supervisor's side; return the last line.

    Args:
        command: starts a worker; the number of its pipe and `until` are added.
        lines: the output.
        until: when the budget ends, by time.monotonic().
    """
    begun, lost = time.monotonic(), 0
    while until - time.monotonic() > START_S and lost < 2:
        status, item, why = _one_worker(command, until)
        if status == 0:
            break
        lines.before = Lines(lines.path).before
        ended = {line["item"] for line in lines.before if "item" in line and "skipped" not in line}
        if item is None or item in ended:  # between two items, or CUDA is unusable and the item's line is there
            lost = 0 if status == GONE else lost + 1
            continue
        lost = 0
        lines.write({"item": item, **why})
    lines.before = Lines(lines.path).before
    counts = {"measured": 0, "failed": 0, "not_here": 0, "skipped": 0}
    for line in {line["item"]: line for line in lines.before if "item" in line}.values():
        counts[kind_of(line)] += 1
    last = {"line": "end", "seconds": round(time.monotonic() - begun, 1), **counts}
    if lost >= 2:
        last["error"] = "the worker ended twice before it began an item; the reason is on stderr"
    lines.write(last)
    return last


def kind_of(line: Line) -> str:
    """Return how an item came out: measured, failed, not_here or skipped."""
    if "error" in line or line.get("ok") is False:
        return "failed"
    return next((key for key in ("not_here", "skipped") if key in line), "measured")


def free_memory() -> None:
    """Free what the last item held, on the GPU too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except Exception:  # an item has left CUDA unusable: `cuda_works` finds that
            return


def _one_worker(command: list[str], until: float) -> tuple[int, str | None, Line]:
    """Run one worker; return its exit status, the item it was running, and the values of that item's line."""
    reading, writing = os.pipe()
    try:
        worker = subprocess.Popen(
            [*command, "--pipe", str(writing), "--until", str(until)],
            stdin=subprocess.PIPE,
            pass_fds=(writing,),
            process_group=0,
        )
    finally:
        os.close(writing)
    item, limit, since = None, min(time.monotonic() + IDLE_LIMIT_S, until), time.monotonic()
    received = b""
    try:
        while worker.poll() is None:
            if select.select([reading], [], [], 0.02)[0]:
                part = os.read(reading, 65536)
                if not part:
                    time.sleep(0.02)
                received += part
                *whole, received = received.split(b"\n")
                if whole:
                    words, _, item = whole[-1].decode().partition(" ")
                    limit, since = float(words), time.monotonic()
            if time.monotonic() > limit:
                _kill(worker)
                seconds = round(time.monotonic() - since, 3)
                if time.monotonic() >= until:
                    return worker.wait(), item, {"skipped": f"cut by the end of the budget after {seconds:.1f} s"}
                return worker.wait(), item, {"seconds": seconds, "error": f"hung: killed after {seconds:.1f} s"}
    finally:
        _kill(worker)
        os.close(reading)
        assert worker.stdin is not None
        worker.stdin.close()
    status = worker.wait()
    how = f"died of signal {-status}" if status < 0 else f"ended with exit status {status}"
    return status, item, {"seconds": round(time.monotonic() - since, 3), "error": f"its process {how}"}


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker and its children if it still runs."""
    if worker.poll() is not None:
        return
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        worker.kill()
    worker.wait()


def say(pipe: int, text: str) -> None:
    """Tell the supervisor what is running: its deadline, by time.monotonic(), and its name."""
    os.write(pipe, f"{text}\n".encode())


def end_with_parent() -> None:
    """From now on, exit when the supervisor's end of standard input closes, because it was killed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cuda_works() -> bool:
    """Whether CUDA is still usable: after an illegal access every call fails until the process ends."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception:
        return False
    return True


def _reason(err: BaseException) -> str:
    """Return why an item failed, in one line; unless it is a CmfastError, also its class and place in our files."""
    text = one_line(err, 400) or "no message"
    if isinstance(err, CmfastError):
        return text
    place, trace = "", err.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and ".venv" not in file.parts and file.name != Path(__file__).name:
            place = f" ({file.name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(err).__name__}: {text}{place}"
