# SPDX-License-Identifier: MIT
"""Batches of the samples to train on, in an order that depends on the step alone.

The order is a function of (seed, step), so a resumed run sees what an uninterrupted one would have seen,
and any number of processes share one batch. Batches are made ahead of the step that needs them, in a thread or in
other processes (`data.workers`); small data sets in memory are copied to the GPU, which then makes them itself.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cmfast_train.data.arrays import ArraySamples, Samples
from cmfast_train.data.images import Batch, Data, Images, check_batch
from cmfast_train.data.workers import from_workers

AHEAD = 2  # batches that wait, at most, for the step that needs them
ON_DEVICE = 2 * 10**9  # bytes of samples that are kept on a GPU, at most; CIFAR-10 has 154 million
INDICES = 2**15  # that are copied to a GPU at once


def batches(
    data: Data | Samples,
    batch: int,
    seed: int,
    start: int,
    stop: int,
    share: slice,
    workers: int,
    pin: bool,
    keep: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """Yield this process's share of the batches of steps start .. stop - 1.

    Args:
        batch: images per step, summed over processes
        share: which of them this process takes
        workers: processes that make the batches; 0: a thread, which ends when the generator does
        pin: put them in pinned memory, from which a GPU copies while it computes
        keep: a device that makes them itself from a copy of the data, if those are in memory and not too large for
            it

    Raises:
        CmfastError: An image cannot be read, or a worker process has died.
    """
    order = _StepIndices(len(data), batch, seed, start, stop, share)
    if keep is not None and isinstance(data, (Images, ArraySamples)) and data.in_memory:
        whole = data.tensors()
        if sum(tensor.nbytes for tensor in whole) < ON_DEVICE:
            yield from _device_batches(whole, order, keep)
            return
    if workers:
        yield from map(check_batch, from_workers(data, order, workers, pin))
        return

    def make(step: int) -> Batch | str:
        made = data.__getitems__(order.at(step))
        return made if isinstance(made, str) or not pin else tuple(map(_pinned, made))

    with contextlib.closing(_ahead(make, range(start, stop), pin)) as stream:
        yield from map(check_batch, stream)


def _device_batches(whole: Batch, order: _StepIndices, device: torch.device) -> Generator[Batch, None, None]:
    """Yield the batches of an order from a copy of all samples on the device, which makes them there.

    Indices are copied for many steps at once: what a GPU waits for least often.
    """
    parts = [tensor.to(device) for tensor in whole]
    steps = max(1, INDICES // order.batch)
    for first in range(order.start, order.stop, steps):
        block = torch.stack([order.tensor(step) for step in range(first, min(first + steps, order.stop))])
        if device.type == "cuda":
            block = block.pin_memory()
        for indices in block.to(device, non_blocking=True):
            yield tuple(part.index_select(0, indices) for part in parts)


class _StepIndices:
    """The indices of each step: one shuffle of the data an epoch, epochs end to end."""

    def __init__(self, n: int, batch: int, seed: int, start: int, stop: int, share: slice) -> None:
        self.n, self.batch, self.seed, self.start, self.stop, self.share = n, batch, seed, start, stop, share
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.at, range(self.start, self.stop))

    def at(self, step: int) -> list[int]:
        """Return the indices of any step, whatever came before."""
        indices: list[int] = self.tensor(step).tolist()
        return indices

    def tensor(self, step: int) -> Tensor:
        """Return the indices of any step as int64."""
        position, stop = step * self.batch, (step + 1) * self.batch
        parts = []
        while position < stop:  # once, or once for each epoch that the batch touches
            epoch, first = divmod(position, self.n)
            parts.append(self._shuffled(epoch)[first : first + stop - position])
            position += len(parts[-1])
        return torch.cat(parts)[self.share]

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order


def _ahead(make: Callable[[int], Batch | str], steps: range, pin: bool) -> Generator[Batch | str, None, None]:
    """Yield make(step) for each step, made in order by one thread while the caller works.

    What the thread raises is raised here, in its turn. However the caller leaves, nothing more is begun and the thread
    has ended.
    """
    # A thread begins on the first GPU, whichever its process uses, and pinning memory would take a piece of that one.
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin else (None, ())
    thread = ThreadPoolExecutor(1, "cmfast-batches", *device)
    waiting: deque[Future[Batch | str]] = deque()
    try:
        for step in steps:
            waiting.append(thread.submit(make, step))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _pinned(values: Tensor) -> Tensor:
    pinned = torch.empty_like(values, pin_memory=True)
    pinned.numpy()[...] = values.numpy()  # by numpy: see Images
    return pinned
