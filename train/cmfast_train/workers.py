# SPDX-License-Identifier: MIT
"""Batches made by worker processes; a worker that dies, or that cannot be started, is one line.

Batches travel through pipes, not through /dev/shm as tensors do: where that is full, as in containers, a worker that
sends a tensor prints a traceback and the training waits for ever.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cmfast.errors import CmfastError, one_line


def from_workers(data: Any, order: Any, workers: int, pin: bool) -> Generator[tuple[Tensor, Tensor] | str, None, None]:
    """Yield data.__getitems__(indices) for each list of indices in `order`, made by so many processes."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        loader = DataLoader(
            data, batch_sampler=order, collate_fn=_as_arrays, num_workers=workers, pin_memory=pin,
            persistent_workers=True,
        )  # fmt: skip
        iterator = iter(loader)
    except OSError as err:
        raise CmfastError(_not_started(workers, err)) from None
    if before is not None and threading.current_thread() is threading.main_thread():
        # DataLoader would raise in the middle of whatever runs when a worker dies. Without its handler it notices
        # while it waits for a batch, within 5 seconds.
        signal.signal(signal.SIGCHLD, before)
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


class _Arrays:
    """A batch on its way through a pipe. DataLoader calls `pin_memory` in its thread."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels
        self.pinned: tuple[Tensor, Tensor] | None = None

    def pin_memory(self, *_: Any) -> _Arrays:
        self.pinned = (torch.from_numpy(self.images).pin_memory(), torch.from_numpy(self.labels).pin_memory())
        return self

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.pinned or (torch.from_numpy(self.images), torch.from_numpy(self.labels))


def _as_arrays(batch: tuple[Tensor, Tensor] | str) -> _Arrays | str:
    return batch if isinstance(batch, str) else _Arrays(batch[0].numpy(), batch[1].numpy())


def _not_started(workers: int, err: OSError) -> str:
    full = err.errno in (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EROFS)
    why = "/dev/shm is full or missing, which their locks need" if full else "the system refuses"
    return f"{workers} worker processes cannot be started: {why} ({one_line(err, 100)}); --set workers=0 needs none"
