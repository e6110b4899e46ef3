# SPDX-License-Identifier: MIT
"""Drive episodes with the one-step policy and with its teacher: `python evaluate.py runs/policy`. No PyTorch here."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from world import Episodes, Policy, Scenes, draw_scenes, drive

import cmfast

HEUN_STEPS = 18  # 35 network calls
SCENES = 2 * 10**6  # seed of the scenes: no training run has it, and no setting was chosen by them


def one_step(model: cmfast.Model, seed: int) -> Policy:
    """Return the policy that draws each chunk in one network call.

    Sample i of a seed starts from the same noise in every call, so drive i does not change its mind about the side.
    """
    return lambda seen: model.sample(len(seen["state"]), seed=seed, conditions=seen)


def diffusion(model: cmfast.Model, seed: int) -> Policy:
    """Return the policy that draws each chunk with Heun's sampler, from the same noise."""
    return lambda seen: model.sample_heun(len(seen["state"]), steps=HEUN_STEPS, seed=seed, conditions=seen)


def episodes(run: Path, count: int, seed: int) -> tuple[Scenes, dict[str, Episodes]]:
    """Return scenes and what the two policies of a run did in them."""
    scenes = draw_scenes(count, np.random.default_rng([SCENES, seed]))
    policies = {
        "one step": one_step(cmfast.load(run / "policy.onnx", threads=1), seed),
        f"teacher, {HEUN_STEPS} Heun steps": diffusion(cmfast.load(run / "teacher.onnx", threads=1), seed),
    }
    return scenes, {name: drive(scenes, each, np.random.default_rng(seed)) for name, each in policies.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Drive episodes with the one-step policy and with its teacher.")
    parser.add_argument("run", type=Path, help="folder that train.py left")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, result in episodes(given.run, given.episodes, given.seed)[1].items():
        left = result.left[result.success].mean() if result.success.any() else float("nan")
        print(
            f"{name}: {result.success.mean():.1%} reached the goal, {result.collided.mean():.1%} collided; "
            f"{left:.0%} of the successes passed on the left"
        )


if __name__ == "__main__":
    main()
