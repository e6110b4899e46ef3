# SPDX-License-Identifier: MIT
"""The task: a point robot drives around a disc to a goal, on the left or on the right. NumPy only, no download.

Positions and lengths are in units of half the field's width. Everything is computed for many scenes at a time, [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

HORIZON = 16  # waypoints of an action chunk
EXECUTED = 4  # of them, before the next observation
PIXELS = 24  # the image is [2, PIXELS, PIXELS]: obstacle, goal
FIELD = 1.1  # the image shows [-FIELD, FIELD] squared
GOAL_RADIUS = 0.1  # of the disc that is drawn
TOLERANCE = 0.08  # distance to the goal that counts as reached
SPEED = 0.06  # largest step between waypoints
CLEARANCE = 0.15  # the expert's distance from the obstacle
DISTURBANCE = 0.005  # standard deviation of the robot's error in a step
WANDER = 0.02  # the same while demonstrations are recorded, so that they show how to come back
LIMIT = 64  # steps of an episode
SCALE = 0.6  # waypoints / SCALE have a standard deviation near 0.5, which is the model's sigma_data

# observation -> chunk [N, HORIZON, 2] of waypoints relative to the robot, divided by SCALE
Policy = Callable[[dict[str, Floats]], Floats]


@dataclass(frozen=True)
class Scenes:
    """N scenes."""

    start: Floats  # [N, 2]
    goal: Floats  # [N, 2]
    centre: Floats  # [N, 2], of the obstacle
    radius: Floats  # [N]

    def __len__(self) -> int:
        return len(self.radius)


@dataclass(frozen=True)
class Episodes:
    """What happened in N scenes."""

    path: Floats  # [LIMIT + 1, N, 2]
    success: npt.NDArray[np.bool_]  # [N]: the goal was reached without a collision
    collided: npt.NDArray[np.bool_]  # [N]
    left: npt.NDArray[np.bool_]  # [N]: the obstacle was passed on its left, seen from the start


def draw_scenes(n: int, rng: np.random.Generator) -> Scenes:
    """Draw scenes whose obstacle blocks the straight way, so that the robot may pass it on either side."""
    start = np.stack([rng.uniform(-0.95, -0.8, n), rng.uniform(-0.4, 0.4, n)], axis=1)
    goal = np.stack([rng.uniform(0.8, 0.95, n), rng.uniform(-0.4, 0.4, n)], axis=1)
    along = goal - start
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    centre = start + rng.uniform(0.4, 0.6, (n, 1)) * along + rng.uniform(-0.08, 0.08, (n, 1)) * across
    return Scenes(*(each.astype(np.float32) for each in (start, goal, centre, rng.uniform(0.2, 0.3, n))))


def render(scenes: Scenes) -> Floats:
    """Return the camera's images [N, 2, PIXELS, PIXELS] in [0, 1]: obstacle and goal, with soft edges."""
    axis = np.linspace(-FIELD, FIELD, PIXELS, dtype=np.float32)
    pixel = axis[1] - axis[0]

    def disc(centre: Floats, radius: Floats | float) -> Floats:
        dx, dy = axis - centre[:, :1], axis - centre[:, 1:]
        distance = np.hypot(dx[:, None, :], dy[:, :, None])
        return np.clip((np.reshape(radius, (-1, 1, 1)) - distance) / pixel + 0.5, 0, 1).astype(np.float32)

    return np.stack([disc(scenes.centre, scenes.radius), disc(scenes.goal, GOAL_RADIUS)], axis=1)


def expert_step(scenes: Scenes, position: Floats, left: npt.NDArray[np.bool_]) -> Floats:
    """Return the next position [N, 2] of an expert that passes the obstacle on the given side."""
    keep = scenes.radius + CLEARANCE
    to_goal, to_centre = scenes.goal - position, scenes.centre - position
    left_to_go = np.linalg.norm(to_goal, axis=1)
    distance = np.linalg.norm(to_centre, axis=1)
    share = np.clip(np.sum(to_goal * to_centre, axis=1) / np.maximum(left_to_go, 1e-6) ** 2, 0, 1)
    free = np.linalg.norm(to_centre - share[:, None] * to_goal, axis=1) >= 0.999 * keep
    # The tangent to the circle of radius `keep`; from inside of it, at a right angle and a little outwards.
    turn = np.where(distance > keep, np.arcsin(np.minimum(keep / np.maximum(distance, 1e-6), 1)), 0.5 * np.pi + 0.3)
    heading = np.arctan2(to_centre[:, 1], to_centre[:, 0]) + np.where(left, turn, -turn)
    tangent = np.stack([np.cos(heading), np.sin(heading)], axis=1)
    straight = to_goal / np.maximum(left_to_go, 1e-6)[:, None]
    step = np.where(free[:, None], straight, tangent) * np.minimum(left_to_go, SPEED)[:, None]
    return (position + step).astype(np.float32)


def demonstrations(n: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Return n recorded pairs of observation and action chunk, half of them of drives on the left: x, state, image.

    Each is of another scene, at a random time of a drive from which the robot was pushed around.
    """
    scenes, left, when = draw_scenes(n, rng), rng.random(n) < 0.5, rng.integers(0, 36, n)
    position, moved = scenes.start, np.zeros_like(scenes.start)
    for step in range(when.max()):
        ahead = expert_step(scenes, position, left) + WANDER * rng.standard_normal((n, 2))
        going = (step < when)[:, None]
        moved = np.where(going, ahead - position, moved).astype(np.float32)
        position = np.where(going, ahead, position).astype(np.float32)
    chunk, ahead = [], position
    for _ in range(HORIZON):
        ahead = expert_step(scenes, ahead, left)
        chunk.append((ahead - position) / SCALE)
    return {"x": np.stack(chunk, axis=1), **observation(scenes, position, moved)}


def observation(scenes: Scenes, position: Floats, moved: Floats, image: Floats | None = None) -> dict[str, Floats]:
    """Return what the robot sees: state [N, 4], its position and its last step, and the camera's image."""
    state = np.concatenate([position, moved / SPEED], axis=1).astype(np.float32)
    return {"state": state, "image": render(scenes) if image is None else image}


def drive(scenes: Scenes, policy: Policy, rng: np.random.Generator) -> Episodes:
    """Let a policy drive: it plans HORIZON waypoints, the robot takes EXECUTED of them, and it plans again."""
    n, image = len(scenes), render(scenes)
    position, moved = scenes.start, np.zeros_like(scenes.start)
    collided, reached, passed, left = (np.zeros(n, bool) for _ in range(4))
    path = [position]
    while len(path) <= LIMIT:
        chunk = policy(observation(scenes, position, moved, image)) * SCALE
        seen_from = position
        for waypoint in range(EXECUTED):
            before = position
            position, moved, hit, there = step(scenes, position, seen_from + chunk[:, waypoint] - position, rng)
            over = (reached | collided)[:, None]
            position, moved = np.where(over, before, position), np.where(over, 0, moved)
            collided |= ~reached & hit
            reached |= ~collided & there
            beside = ~passed & (position[:, 0] > scenes.centre[:, 0])
            left = np.where(beside, position[:, 1] > scenes.centre[:, 1], left)
            passed |= beside
            path.append(position)
    return Episodes(np.stack(path)[: LIMIT + 1], reached, collided, left)


def step(
    scenes: Scenes, position: Floats, wanted: Floats, rng: np.random.Generator
) -> tuple[Floats, Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Move robots by `wanted` [N, 2], as far as motors can and with their error.

    Returns:
        The new positions and the moves [N, 2]; which robots hit the obstacle and which are at the goal [N].
    """
    length = np.linalg.norm(wanted, axis=1, keepdims=True)
    moved = wanted * np.minimum(1, 1.5 * SPEED / np.maximum(length, 1e-6))
    moved = (moved + DISTURBANCE * rng.standard_normal(moved.shape)).astype(np.float32)
    after = position + moved
    hit = _distance(scenes.centre, position, after) < scenes.radius
    return after, moved, hit, np.linalg.norm(scenes.goal - after, axis=1) < TOLERANCE


def expert(scenes: Scenes, left: npt.NDArray[np.bool_]) -> Policy:
    """Return the expert as a policy: what demonstrations would score."""

    def plan(seen: dict[str, Floats]) -> Floats:
        position = ahead = seen["state"][:, :2]
        chunk = []
        for _ in range(HORIZON):
            ahead = expert_step(scenes, ahead, left)
            chunk.append((ahead - position) / SCALE)
        return np.stack(chunk, axis=1)

    return plan


def _distance(point: Floats, begin: Floats, end: Floats) -> Floats:
    """Return the distance of points from segments, [N]."""
    along = end - begin
    share = np.sum((point - begin) * along, axis=1) / np.maximum(np.sum(along * along, axis=1), 1e-12)
    nearest = begin + np.clip(share, 0, 1)[:, None] * along
    distance: Floats = np.linalg.norm(point - nearest, axis=1).astype(np.float32)
    return distance
