# SPDX-License-Identifier: MIT
"""What `gpu.py train` does: a preset trained in the seconds that there are, evaluated, its samples drawn.

The speed of each phase is measured first, and their lengths are planned by it (`RECIPES`). The run is
`cmfast_train.training.trainer.train`, as `cmfast-train` starts it; where it is slower than planned, it is stopped by
the signal that a user would send, and what it has is evaluated. It lies in a folder beside the lines, and a command
that was killed goes on with it.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmfast.errors import CmfastError
from cmfast.images import save_images
from cmfast.model import Model
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import Checkpoint, load_checkpoint
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.config.train_config import to_dict as config_to_dict
from cmfast_train.evaluation.evaluate import Reference, data_images, few_steps, heun_steps
from cmfast_train.evaluation.features import default_features, features_record, load_features
from gpu_items import Item, NotHere
from gpu_lines import Line, Lines

RESERVE_S, RESERVE = 24.0, 0.35  # for evaluation: seconds, and the most of a small budget
SWITCH_S = 3.0  # of the training time, for each phase: opening it, loading the data, checkpoints
GRID = 64  # images
# torchvision wants all four, also for the training images.
MNIST_FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a preset is trained in minutes.

    Args:
        settings: of `cmfast-train --set`
        parts: of the training time, by method: the phases in their order; the first is the teacher
        probe: optimiser steps by method that the speed of a phase is measured by; the first half warms up
        samples: of an evaluation, the first as in the record on a CPU
    """

    settings: tuple[str, ...]
    parts: Mapping[str, float]
    probe: Mapping[str, int]
    samples: tuple[int, ...]


# What 200 seconds need, which are some 6,000 steps on an H200, where published recipes have 200,000 and more.
# * c_noise=trig: between the two noise levels of a pair whose gap is 1/128, 250 ln(sigma) turns by two radians. A short
#   run does not learn to smooth that; the preset of the digits has trig for the same reason.
# * lr_decay=0.5: so every run of methods_digits.json ends. The average of some 1,000 steps then has little noise left
#   to remove, and it forgets the beginning even of a phase of 3,000.
# * ect.stages=1,6: as "ect, tuned" in methods_digits.json, which in two steps comes as near to the data as two halves
#   of them. Stage 0 pairs nearly every level with the image, which edm learned; the gap of stage 6, 1/128, has as
#   many levels between 80 and 0.002 as iCT ends with, 1,280.
# * batch=256: a fifth more images a second than with 128, and the gradients of ect are noisy.
# * lr: ECT's 1e-4 is for 200,000 steps; a tenth of the weights took 5e-4 on the digits. edm had 5e-4 and ect 3e-4 with
#   half the batch: these are 1.4 times that.
# * edm, then ect with 0.35 and 0.65 of 176 seconds ended at 3.8 in one step and 1.8 in two (gpu_h200.json): one step is
#   short. The preset mnist has sid as its last phase for that, with these settings. Not run on a GPU yet.
# * beta2=0.99: in phases of 2,667 steps of ect and 667 of sid, on a CPU, ect ends at 23 and 10 in one and two steps
#   instead of 25 and 16, and sid after it at 15 and 5.5 instead of 17 and 9.7 (phases_mnist.json, one seed).
# * probe of sid: its student is trained in one of five steps, the 20th of which a recording must serve.
RECIPES: dict[str, Recipe] = {
    "mnist-large": Recipe(
        settings=(
            "batch=256", "c_noise=trig", "edm.lr=7e-4", "edm.lr_decay=0.5", "edm.ema=0.999", "ect.lr=4e-4",
            "ect.lr_decay=0.5", "ect.ema=0.999", "ect.stages=1,6", "sid.lr=1e-4", "sid.lr_decay=0.5", "sid.ema=0.998",
            "edm.beta2=0.99", "ect.beta2=0.99", "sid.beta2=0.99",
        ),
        parts={"edm": 0.3, "ect": 0.5, "sid": 0.2},
        probe={"edm": 72, "ect": 72, "sid": 140},
        samples=(2_000, 10_000),
    ),
    "digits": Recipe(
        settings=("edm.lr_decay=0.5", "ect.lr_decay=0.5", "sid.lr_decay=0.5"),
        parts={"edm": 0.35, "ect": 0.5, "sid": 0.15},
        probe={"edm": 4, "ect": 4, "sid": 5},
        samples=(200,),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The request of `gpu.py train`."""

    preset: str
    settings: tuple[str, ...]
    data_root: Path | None
    run: Path  # folder
    out: Path  # the lines; the grids lie beside it
    device: str
    until: float  # time.monotonic()
    budget: float


class Training:
    """The items of a training, most valuable first."""

    def __init__(self, request: TrainRequest, lines: Lines) -> None:
        self.request, self.lines = request, lines
        self.recipe = RECIPES[request.preset]
        self.stop_at = request.until - min(RESERVE_S, RESERVE * request.budget)
        self._reference: tuple[Reference, Line] | None = None

    def items(self) -> Iterator[Item]:
        """Yield all items."""
        long = self.request.budget
        yield Item(name="plan", run=self.plan, limit_s=long)
        yield Item(name="training", run=self.train, expect_s=self.request.until - self.stop_at, limit_s=long)
        for steps in (1, 2):
            yield Item(name=f"grid {steps} step(s)", run=functools.partial(self.grid, steps))
        for n in self.recipe.samples:
            for steps in (1, 2):
                run = functools.partial(self.evaluate, steps, n)
                yield Item(name=f"evaluation {steps} step(s) {n} samples", run=run, limit_s=long)
        n = self.recipe.samples[0]
        slow = 10.0 if self.request.device == "cuda" else 3.0  # 35 calls an image
        run = functools.partial(self.teacher, n)
        yield Item(name=f"evaluation teacher {n} samples", run=run, expect_s=slow, limit_s=long)
        for steps in (1, 2):
            run = functools.partial(self.before, steps, n)
            yield Item(name=f"evaluation before the last phase {steps} step(s) {n} samples", run=run, limit_s=long)

    def plan(self) -> Line:
        """Measure the speed of each phase, and return how long they can be; `--set phases=..` has them given."""
        begun = time.monotonic()
        if any(text.startswith("phases=") for text in self.request.settings):
            config = self.config({})
            images = {phase.method: phase.images for phase in config.phases}
            return {"kind": "plan", "images_per_s": None, "images": images, "config": config_to_dict(config)}
        parts = self.recipe.parts
        every = max(1, min(self.recipe.probe.values()) // 6)
        config = self.config({method: self.recipe.probe[method] * self._batch for method in parts})
        # One stage of ect: with the next one a GPU records its steps anew, which a long run does not notice.
        phases = tuple(
            each.changed({"stages": (each.values()["stages"][0],) * 2}) if each.method == "ect" else each
            for each in config.phases
        )
        config = dataclasses.replace(config, log_images=every * config.batch, phases=phases, grid=1)
        with tempfile.TemporaryDirectory() as folder:
            run(config, Path(folder) / "probe", self.data_root())
            logged = read_log(Path(folder) / "probe")
        rates = {}
        for method in parts:
            found = [line["images_per_s"] for line in logged if line["phase"] == method and "images_per_s" in line]
            rates[method] = statistics.median(found[len(found) // 2 :])
        left = self.stop_at - time.monotonic()
        left -= min(SWITCH_S * len(parts), 0.2 * left)
        least = {phase.method: phase.row.least_steps(phase.hyper) * self._batch for phase in config.phases}
        images = {m: max(least[m], int(parts[m] * left * rates[m]) // self._batch * self._batch) for m in parts}
        planned = self.config(images)
        return {
            "kind": "plan", "images_per_s": rates, "images": images, "seconds_left": round(left, 1),
            "config": config_to_dict(planned), "probe_s": round(time.monotonic() - begun, 1),
        }  # fmt: skip

    def train(self) -> Line:
        """Train as planned, or as far as the time goes."""
        planned = next(self.lines.found("plan"), None)
        if planned is None:
            raise NotHere("there is no plan, for the reason on its line")
        config, folder = self.config(planned["images"]), self.request.run
        begun = time.monotonic()
        watch = _Watch(folder, self.lines)
        stop = threading.Timer(self.stop_at - begun, os.kill, (os.getpid(), signal.SIGINT))
        stop.start()
        watch.start()
        try:
            run(config, folder, self.data_root())
            stopped = False
        except KeyboardInterrupt:
            stopped = True
        finally:
            stop.cancel()
            watch.stop()
        logged = [line for line in read_log(folder) if "loss" in line]
        return {
            "kind": "training", "preset": self.request.preset, "stopped": stopped, "batch": config.batch,
            "planned": config.images, "images": max(line["images"] for line in read_log(folder)),
            "images_per_s": {phase.method: median_rate(logged, phase.method) for phase in config.phases},
            "curve": thinned(logged),
            "graph": next((line["graph"] for line in read_log(folder) if "graph" in line), None),
        }  # fmt: skip

    def grid(self, steps: int) -> Line:
        """Draw the samples that people look at first."""
        model = Model(TorchBackend(self.checkpoint(), self.request.device))
        file = self.request.out.with_name(f"{self.request.out.stem}_{steps}.png")
        save_images(file, model.sample(GRID, steps=steps, seed=0))
        return {"kind": "grid", "steps": steps, "file": file.name, "images": GRID}

    def evaluate(self, steps: int, n: int) -> Line:
        """Return the Frechet distance of n samples, by the protocol of the records made on a CPU."""
        return self._distance("few steps", self.checkpoint(), steps, n)

    def teacher(self, n: int) -> Line:
        """Return the distance of the first phase's model, by 18 steps of Heun's method."""
        reference, about = self.reference()
        (file,) = (self.request.run / "phases").glob("1_edm.pt")
        row = heun_steps(Model(TorchBackend(load_checkpoint(file), self.request.device)), 18, n, seed=0, batch=256)
        row |= reference.measure(row.pop("images"))
        return {"kind": "evaluation", "model": "teacher", **row, **about}

    def before(self, steps: int, n: int) -> Line:
        """Return the distance of the model that the last phase began with: what that phase gained."""
        planned = next(self.lines.found("plan"), None)
        *before, last = self.config(planned["images"]).phases if planned else (None,)
        if not before or before[-1].row.leaves != "consistency":
            raise NotHere("no phase before the last one leaves a consistency model")
        file = self.request.run / "phases" / f"{len(before)}_{before[-1].name}.pt"
        if not file.exists():
            raise NotHere("the run was stopped before its last phase")
        return self._distance(f"before {last.name}", load_checkpoint(file), steps, n)

    def _distance(self, name: str, checkpoint: Checkpoint, steps: int, n: int) -> Line:
        reference, about = self.reference()
        model = Model(TorchBackend(checkpoint, self.request.device))
        row = few_steps(model, model.sigmas_for(steps), n, seed=0, batch=256)
        row |= reference.measure(row.pop("images"))
        return {"kind": "evaluation", "model": name, **row, **about}

    def checkpoint(self) -> Checkpoint:
        """Return the model that was trained."""
        file = self.request.run / "model.pt"
        if not file.exists():
            raise NotHere("there is no model, for the reason on the line of the training")
        return load_checkpoint(file)

    def reference(self) -> tuple[Reference, Line]:
        """Return the data's side of the comparison, and what a line says of it."""
        if self._reference is None:
            preset = self.request.preset
            image = (PRESETS[preset].channels, *PRESETS[preset].image_sides)
            data_set = PRESETS[preset].data
            name = default_features(data_set)
            features, images = load_features(name, image), data_images(data_set, self.data_root(), image)
            reference = Reference(features, images, ("fd",), seed=0, device=self.request.device)
            about = {
                "features": features_record(features, name),
                "data_images": len(images),
                "halves": reference.halves,
            }
            self._reference = reference, about
        return self._reference

    def config(self, images: dict[str, int]) -> TrainConfig:
        """Return the configuration of a run with phases of these lengths, in images."""
        own = dict(text.partition("=")[::2] for text in self.recipe.settings)
        given = dict(text.partition("=")[::2] for text in self.request.settings)
        own |= {"phases": ",".join(f"{method}:{n}" for method, n in images.items()), "device": self.request.device}
        config = override(PRESETS[self.request.preset], [f"{name}={value}" for name, value in (own | given).items()])
        return dataclasses.replace(
            config, checkpoint_images=max(config.batch, config.images // 2), grid=GRID, tensorboard=False,
            log_images=max(config.batch, config.images // 120 // config.batch * config.batch),
        )  # fmt: skip

    @property
    def _batch(self) -> int:
        return self.config(dict.fromkeys(self.recipe.parts, 10**6)).batch

    def data_root(self) -> Path | None:
        """Return the folder of the data; MNIST's four files as they are published are put where torchvision looks."""
        root = self.request.data_root
        if root is None or PRESETS[self.request.preset].data != "mnist" or (root / "MNIST" / "raw").is_dir():
            return root
        raw = self.request.run.with_name(self.request.run.name + "_data") / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name in MNIST_FILES:
            packed, plain = root / f"{name}.gz", root / name
            if not packed.exists() and not plain.exists():
                raise CmfastError(f"--data-root {root}: neither MNIST/raw nor {name}.gz is in it")
            with gzip.open(packed) if packed.exists() else plain.open("rb") as source, (raw / name).open("wb") as file:
                shutil.copyfileobj(source, file)
        return raw.parent.parent


class _Watch(threading.Thread):
    """Writes a line of the training's progress now and then, for a command that is killed."""

    EVERY_S = 5.0

    def __init__(self, folder: Path, lines: Lines) -> None:
        super().__init__(daemon=True)
        self._folder, self._lines, self._end, self._seen = folder, lines, threading.Event(), 0

    def run(self) -> None:
        while not self._end.wait(self.EVERY_S):
            logged = [line for line in read_log(self._folder) if "loss" in line]
            if logged and logged[-1]["images"] > self._seen:
                self._seen = logged[-1]["images"]
                self._lines.write({"line": "progress", **logged[-1]})

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self.join()


def run(config: TrainConfig, folder: Path, data_root: Path | None) -> None:
    """Train in a folder, or go on with what is in it."""
    from cmfast_train.training.trainer import train

    train(config, folder, data_root)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's log."""
    file = folder / "log.jsonl"
    if not file.exists():
        return []
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def median_rate(logged: list[dict[str, Any]], method: str) -> float | None:
    """Return the images a second of a phase: the median over the lines of its log."""
    found = [line["images_per_s"] for line in logged if line["phase"] == method]
    return statistics.median(found) if found else None


def thinned(logged: list[dict[str, Any]], most: int = 60) -> list[dict[str, Any]]:
    """Return at most so many points of the loss curve, the last among them."""
    step = -(-len(logged) // most) if logged else 1
    return [{name: line[name] for name in ("images", "phase", "loss", "lr")} for line in logged[::-1][::step][::-1]]
