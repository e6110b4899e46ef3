# SPDX-License-Identifier: MIT
"""log.jsonl and TensorBoard: a line every log_images. A resumed run cuts them back to where it continues."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cmfast.errors import CmfastWarning
from cmfast.files import atomic_file
from cmfast_train.config.train_config import TrainConfig

LOOK_EVERY = 32  # steps
LONGEST_LINE = 1 << 16  # bytes of log.jsonl; ours have a few hundred


class TrainLog:
    """The curves of a run. All its processes take part; the main one writes.

    Args:
        out: folder of the run.
        images: images seen before; later lines of an earlier process are removed.
        config: of the run.
        accelerator: its processes.
    """

    def __init__(self, out: Path, images: int, config: TrainConfig, accelerator: Accelerator) -> None:
        self.path, self.config, self.active = out / "log.jsonl", config, accelerator.is_main_process
        self._accelerator = accelerator
        self.recent = math.nan  # mean loss since the last line
        self._sum: Tensor | float = 0.0
        self._count, self._since = 0, time.perf_counter()
        self._board: Any = None
        if not self.active:
            return
        if self.path.exists():
            _cut(self.path, images)
        if config.tensorboard:
            self._board = _Board(out / "tensorboard", images)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def add(self, loss: Tensor, images: int, where: dict[str, Any]) -> None:
        """Add the mean loss of this process's part of a step; write a line when one is due.

        A loss on a GPU is read rarely: reading it waits for the GPU's queue.

        Args:
            loss: mean over the images of the step, a scalar.
            images: seen so far, with this step.
            where: phase, step and learning rate (`Run.where`).
        """
        self._sum = self._sum + loss.double()
        self._count += 1
        interval, batch = self.config.log_images, self.config.batch
        due = images // interval > (images - batch) // interval
        if due:
            self._sum = self._accelerator.reduce(self._sum, "mean")
        if due or loss.device.type == "cpu" or self._count % LOOK_EVERY == 0:
            self.recent = float(self._sum) / self._count
        if due:
            now = time.perf_counter()
            speed = self._count * batch / (now - self._since)
            self._write({"images": images, **where, "loss": self.recent, "images_per_s": round(speed, 2)})
            if self._board is not None:
                values = {"loss": self.recent, "lr": where["lr"], "images_per_s": speed}
                self._board.add({f"{where['phase']}/{name}": value for name, value in values.items()}, images)
            self._sum, self._count, self._since = 0.0, 0, now

    def checkpoint(self, images: int, where: dict[str, Any]) -> None:
        """Write a line about a new checkpoint."""
        self.note(images, where, checkpoint="model.pt")

    def note(self, images: int, where: dict[str, Any], **facts: Any) -> None:
        """Write a line with facts about the run from here on."""
        self._write({"images": images, **where, **facts})

    def _write(self, values: dict[str, Any]) -> None:
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def noted_a_checkpoint(path: Path) -> bool:
    """Return whether a log has a line about a checkpoint."""
    return path.exists() and any("checkpoint" in entry for _, entry in _lines(path))


def _cut(path: Path, images: int) -> None:
    """Remove damaged lines and those after so many images, which a resumed run writes again."""
    damaged, last = 0, False
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for line, entry in _lines(path):
            damaged += last  # the last line does not count: a killed run may have cut it
            last = not entry
            if entry and _images_of(entry) <= images:
                file.write(line)
    if damaged:
        warnings.warn(f"{path}: {damaged} lines are not lines of a log; they are removed", CmfastWarning, stacklevel=3)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a log as bytes and as its content, {} if that cannot be read."""
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else {}
            except (ValueError, RecursionError):
                entry = {}
            yield line, entry if isinstance(entry, dict) and math.isfinite(_images_of(entry)) else {}


def _images_of(entry: dict[str, Any]) -> float:
    images = entry.get("images")
    return images if isinstance(images, int) and 0 <= images < 1 << 63 else math.inf


class _Board:
    """The curves for TensorBoard, in a new file of its folder.

    Written in this thread: on a full disk SummaryWriter's own thread prints a traceback and ends.
    """

    def __init__(self, folder: Path, images: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{platform.node()}.{os.getpid()}"
        number = sum(1 for entry in os.scandir(folder) if entry.name.startswith(f"{name}."))
        self._event = Event
        self._file = (folder / f"{name}.{number}").open("wb")
        self._records = RecordWriter(self._file)
        # TensorBoard hides points of a killed run from this step on.
        self._write(Event(step=images + 1, wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(step=images + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: dict[str, float], images: int) -> None:
        """Add a point to each of the curves."""
        event = self._event(step=images, wall_time=time.time())
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the write has already raised
            self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()
