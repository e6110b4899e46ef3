# SPDX-License-Identifier: MIT
"""log.jsonl and TensorBoard: a line every log_images, cut back to where a resumed run continues."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cmfast.files import write_text
from cmfast_train.config import TrainConfig

LOOK_EVERY = 32  # steps


class TrainLog:
    """The curves of a run, of all its processes. One of them writes."""

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
            kept = [line for line in self.path.read_text().splitlines() if _images_of(line) <= images]
            write_text(self.path, "".join(line + "\n" for line in kept))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=images)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board:
            self._board.close()

    def add(self, loss: Tensor, images: int, where: dict[str, Any]) -> None:
        """Count the mean loss of one step's images here, after `images` in all; write a line when one is due.

        The loss of a GPU is looked at now and then only: a look waits for everything that it has been handed.
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
            if self._board:
                for name, value in {"loss": self.recent, "lr": where["lr"], "images_per_s": speed}.items():
                    self._board.add_scalar(f"{where['phase']}/{name}", value, images)
            self._sum, self._count, self._since = 0.0, 0, now

    def checkpoint(self, images: int, where: dict[str, Any]) -> None:
        """Note that a checkpoint was written."""
        self._write({"images": images, **where, "checkpoint": "model.pt"})

    def _write(self, values: dict[str, Any]) -> None:
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def _images_of(line: str) -> float:
    try:
        return float(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # the last line of a killed run may be cut
