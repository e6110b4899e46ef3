# SPDX-License-Identifier: MIT
"""A control loop at a fixed rate, without PyTorch: `python control.py runs/policy --rate 50 --cycles 500`.

Each cycle takes one waypoint; every fourth plans from the newest state. The camera is slower: an image is encoded when
there is a new one. All plans of a drive start from the same noise, which a seed names, so the robot does not change its
mind about the side.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from world import EXECUTED, LIMIT, SCALE, Floats, draw_scenes, observation, render, step

import cmfast

CAMERA = 2 * EXECUTED  # cycles between two images


class Planner(Protocol):
    """What the loop drives with."""

    def see(self, image: Floats) -> None:
        """Take a new image [2, PIXELS, PIXELS]."""

    def plan(self, state: Floats, seed: int) -> Floats:
        """Return waypoints [HORIZON, 2] relative to the robot, for a state [4]."""


class Controller:
    """The policy in two files."""

    def __init__(self, run: Path) -> None:
        # One thread: threads that wait for each other make the worst case worse.
        self.model = cmfast.load(run / "planner.onnx", encoder=run / "camera.onnx", threads=1)
        self.image: dict[str, Floats] = {}

    def see(self, image: Floats) -> None:
        """Encode a new image."""
        self.image = self.model.encode({"image": image})

    def plan(self, state: Floats, seed: int) -> Floats:
        """Draw a chunk; the same seed is the same noise."""
        chunk: Floats = self.model.sample(1, seed=seed, conditions={"state": state, **self.image})[0]
        return chunk * np.float32(SCALE)


@dataclass(frozen=True)
class Log:
    """What happened in a loop."""

    took_ms: list[float]  # of each cycle that plans, from observation to waypoints
    late: int  # cycles that missed their deadline
    goals: int
    collisions: int
    gave_up: int  # drives that took longer than LIMIT


def loop(planner: Planner, rate_hz: float, cycles: int, seed: int = 0) -> Log:
    """Drive through one scene after the other."""
    rng, took, late, ends = np.random.default_rng(seed), [], 0, {"goal": 0, "collision": 0, "limit": 0}
    planner.see(render(draw_scenes(1, rng))[0])
    planner.plan(np.zeros(4, np.float32), 0)  # the first call allocates
    age, drives, scene = LIMIT, 0, draw_scenes(1, rng)
    deadline = time.perf_counter()
    for _ in range(cycles):
        if age == LIMIT:
            scene, age, drives = draw_scenes(1, rng), 0, drives + 1
            position, moved = scene.start, np.zeros_like(scene.start)
        if age % EXECUTED == 0:
            seen, seen_from = observation(scene, position, moved), position
            began = time.perf_counter()
            if age % CAMERA == 0:
                planner.see(seen["image"][0])
            waypoints = planner.plan(seen["state"][0], seed=drives)
            took.append(1000 * (time.perf_counter() - began))
        wanted = seen_from + waypoints[age % EXECUTED] - position
        position, moved, collided, reached = step(scene, position, wanted, rng)
        age += 1
        if collided[0] or reached[0] or age == LIMIT:
            ends["collision" if collided[0] else "goal" if reached[0] else "limit"] += 1
            age = LIMIT
        deadline += 1 / rate_hz
        late += time.perf_counter() > deadline
        time.sleep(max(0.0, deadline - time.perf_counter()))
    return Log(took, late, ends["goal"], ends["collision"], ends["limit"])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Drive in a control loop at a fixed rate, without PyTorch.")
    parser.add_argument("run", type=Path, help="folder that train.py left")
    parser.add_argument("--rate", type=float, default=50.0, help="Hz")
    parser.add_argument("--cycles", type=int, default=500)
    given = parser.parse_args()
    log = loop(Controller(given.run), given.rate, given.cycles)
    p50, p99 = np.percentile(log.took_ms, [50, 99])
    print(
        f"{given.cycles} cycles at {given.rate:g} Hz: p50 {p50:.3f} ms, p99 {p99:.3f} ms, worst {max(log.took_ms):.3f} "
        f"ms, {log.late} late; {log.goals} goals, {log.collisions} collisions, {log.gave_up} given up"
    )


if __name__ == "__main__":
    main()
