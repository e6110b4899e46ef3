# SPDX-License-Identifier: MIT
"""Batches made by worker processes; a worker that dies, or that cannot be started, is one line.

Batches travel in files of the temporary folder, which mostly stay in memory: they live for less than a second. Tensors
would travel in /dev/shm: where that is full, as in containers, a worker prints a traceback and training waits for ever.
In a pipe, a worker that is killed in the middle of a batch leaves half of it, which is waited for as long.
"""

from __future__ import annotations

import errno
import signal
import tempfile
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from cmfast.errors import CmfastError, one_line


def from_workers(data: Any, order: Any, workers: int, pin: bool) -> Generator[tuple[Tensor, ...] | str, None, None]:
    """Yield data.__getitems__(indices) for each list of indices in `order`, made by so many processes."""
    with tempfile.TemporaryDirectory(prefix="cmfast-batches-", ignore_cleanup_errors=True) as folder:
        yield from _from_workers(data, order, workers, pin, Path(folder))


def _from_workers(
    data: Any, order: Any, workers: int, pin: bool, folder: Path
) -> Generator[tuple[Tensor, ...] | str, None, None]:
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        # What DataLoader asks the system for. It fails here first: its own half-made iterator prints a traceback.
        probes = [torch.multiprocessing.Event(), *(torch.multiprocessing.Queue() for _ in range(workers + 1))]
        del probes
        collate: Callable[[Any], Any] = _Storing(folder)  # of a whole batch: the data set has `__getitems__`
        loader = DataLoader(
            data, batch_sampler=order, collate_fn=collate, num_workers=workers, pin_memory=pin,
            persistent_workers=True,
        )  # fmt: skip
        iterator = iter(loader)
    except OSError as err:
        raise CmfastError(_not_started(workers, err)) from None
    if before is not None and threading.current_thread() is threading.main_thread():
        # DataLoader would raise in the middle of whatever runs when a worker dies. Without its handler it notices
        # while it waits for a batch, within 5 seconds.
        signal.signal(signal.SIGCHLD, before)
        signal_handling._SIGCHLD_handler_set = False  # so that other DataLoaders of this process set theirs again
    while True:
        try:
            made = next(iterator)
        except StopIteration:
            return
        except RuntimeError as err:
            if "DataLoader" not in str(err):
                raise
            raise CmfastError(
                f"a worker process that reads images has died ({one_line(err, 120)}); if memory or /dev/shm is short, "
                "--set workers=0 reads them in this process; the same command continues from the last checkpoint"
            ) from None
        yield made if isinstance(made, str) else made.tensors()


class _Stored:
    """A batch in a file, on its way. DataLoader calls `pin_memory` in its thread."""

    def __init__(self, file: Path, parts: int) -> None:
        self.file, self.parts = file, parts
        self._pinned: tuple[Tensor, ...] | None = None

    def pin_memory(self, *_: Any) -> _Stored:
        self._pinned = tuple(part.pin_memory() for part in self.tensors())
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the batch; its file is removed."""
        if self._pinned is not None:
            return self._pinned
        with self.file.open("rb") as opened:
            parts = tuple(torch.from_numpy(np.load(opened, allow_pickle=False)) for _ in range(self.parts))
        self.file.unlink()
        return parts


class _Storing:
    """What a worker does with a batch: write it to a new file of the folder. What is wrong is a text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, batch: tuple[Tensor, ...] | str) -> _Stored | str:
        if isinstance(batch, str):
            return batch
        try:
            handle, name = tempfile.mkstemp(dir=self.folder)
            with open(handle, "wb") as opened:
                for part in batch:
                    np.save(opened, part.numpy())
        except OSError as err:
            return (
                f"a worker process cannot write a batch to {self.folder} ({err.strerror}); name another folder with "
                "TMPDIR, or read images in this process: --set workers=0"
            )
        return _Stored(Path(name), len(batch))


def _not_started(workers: int, err: OSError) -> str:
    full = err.errno in (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EROFS)
    why = "/dev/shm is full or missing, which their locks need" if full else "the system refuses"
    return f"{workers} worker processes cannot be started: {why} ({one_line(err, 100)}); --set workers=0 needs none"
