# SPDX-License-Identifier: MIT
"""The robot policy of examples/policy: success of one step against its teacher, latency against eager PyTorch.

    for seed in 0 1 2; do python examples/policy/train.py --out runs/policy$seed --seed $seed; done
    python benchmarks/policy.py runs/policy0 runs/policy1 runs/policy2 --json benchmarks/results/policy.json

Latency is of the first run, with one thread: calls interleaved in one process, and loops at a fixed rate in a process
each, the one of examples/policy/control.py without PyTorch, the one of examples/cpp/policy, and the same loop in eager
PyTorch. --plot draws the paths of both policies.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import cmfast
import cmfast_train
import cpp_timing
from cmfast.bench import timing
from cmfast.bench.chart import save_chart
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text
from cmfast_train import Denoiser

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "policy"
sys.path.insert(0, str(EXAMPLE))

import control  # noqa: E402
import evaluate  # noqa: E402
import world  # noqa: E402

import train  # noqa: E402

MOST_APART = 1e-4  # of the scaled chunks, file against PyTorch
SHOWN = 4  # scenes in the picture
TRIES = 24  # drives through each
EAGER = "PyTorch eager"


@click.command("policy.py")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--episodes", type=int, default=1000, show_default=True, help="Drives of each policy.")
@click.option("--cycles", type=int, default=2000, show_default=True, help="Cycles of each control loop.")
@click.option("--rate", type=float, default=50.0, show_default=True, help="Hz, of the control loops.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the paths of the first run, PNG.")
def command(
    runs: tuple[Path, ...], episodes: int, cycles: int, rate: float, json_file: Path | None, plot: Path | None
) -> None:
    """Measure the policies that examples/policy/train.py left in RUNS."""
    check_outputs({"--json": json_file, "--plot": plot}, ())
    torch.set_num_threads(1)
    if plot is not None:
        draw(runs[0], plot)
        click.echo(f"the picture is {plot}")
    rows = [row for run in runs for row in successes(run, episodes)]
    before = timing.cpu_ticks()
    times, apart = latencies(runs[0])
    loops = control_loops(runs[0], rate, cycles)
    steal, load = timing.steal_share(before, timing.cpu_ticks()), timing.load_average()
    summaries = {
        name: dataclasses.asdict(timing.summarise(each)) | {"p99_ms": p99(each)} for name, each in times.items()
    }
    eager = summaries[EAGER]["median_ms"]
    record: dict[str, Any] = {"what": "policy", **timing.provenance(), "load_average": load, "steal": steal}
    record |= {"warning": timing.noise_warning(times, load=load, steal=steal), "parameters": parameters(runs[0])}
    record |= {"training": [training_of(run) for run in runs], "episodes": episodes, "rows": rows}
    record |= {"max_difference": apart, "threads": 1}
    record["latency"] = [{"call": name, **each, "speed": eager / each["median_ms"]} for name, each in summaries.items()]
    record["loops"] = loops
    for row in record["latency"]:
        click.echo(f"{row['call']:<40}{row['median_ms']:8.3f} ms   p99 {row['p99_ms']:8.3f}   {row['speed']:.2f}x")
    for row in loops:
        click.echo(f"{row['loop']:<40}{row['p50_ms']:8.3f} ms   p99 {row['p99_ms']:8.3f}   {row['late']} late")
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if record["warning"]:
        click.echo(f"warning: {record['warning']}")


def successes(run: Path, episodes: int) -> list[dict[str, Any]]:
    """Return how often each policy of a run reached the goal, and on which side it passed."""
    seed = training_of(run)["seed"]
    rows = []
    for name, result in evaluate.episodes(run, episodes, seed)[1].items():
        passed = result.left[result.success]
        row = {"seed": seed, "policy": name, "success": float(result.success.mean())}
        row |= {"collided": float(result.collided.mean()), "left": float(passed.mean()) if len(passed) else None}
        rows.append(row)
        click.echo(f"seed {seed}, {name}: {result.success.mean():.1%} reached the goal, {row['left']:.1%} on the left")
    return rows


class Eager:
    """The one-step policy in eager PyTorch, with the interface of control.Controller."""

    def __init__(self, student: Denoiser) -> None:
        self.denoiser, self.spec = student.eval(), student.spec
        self.image = torch.zeros(1, 2, world.PIXELS, world.PIXELS)

    def see(self, image: np.ndarray) -> None:
        """Take a new image."""
        self.image = torch.from_numpy(image)[None]

    def plan(self, state: np.ndarray, seed: int) -> np.ndarray:
        """Draw a chunk."""
        generator = torch.Generator().manual_seed(seed)
        return self.denoise(torch.randn(1, *self.spec.shape, generator=generator), state) * world.SCALE

    def denoise(self, noise: torch.Tensor, state: np.ndarray) -> np.ndarray:
        """Return the chunk, scaled, for unit noise [1, *shape]."""
        sigma = torch.full((1,), self.spec.sigma_max)
        with torch.inference_mode():
            x0 = self.denoiser(
                self.spec.sigma_max * noise, sigma, state=torch.from_numpy(state)[None], image=self.image
            )
        chunk: np.ndarray = x0[0].numpy()
        return chunk


def latencies(run: Path) -> tuple[dict[str, list[float]], float]:
    """Return the times of one plan, from an observation to a chunk, ms, and how far the file is from PyTorch."""
    student = student_of(run)
    eager, controller = Eager(student), control.Controller(run)
    whole = cmfast.load(run / "policy.onnx", threads=1)
    diffusion = cmfast.load(run / "teacher.onnx", threads=1)
    seen = {name: value[0] for name, value in observed().items()}
    eager.see(seen["image"])
    controller.see(seen["image"])
    noise = cmfast.gaussian(0, range(1), 0, student.spec.shape)
    wanted = eager.denoise(torch.from_numpy(noise), seen["state"])
    apart = max(
        float(np.abs(whole.sample(1, seed=0, conditions=seen)[0] - wanted).max()),
        float(np.abs(controller.plan(seen["state"], 0) / world.SCALE - wanted).max()),
    )
    if apart > MOST_APART:
        raise CheckFailed(f"the files are {apart:.1e} away from PyTorch (allowed {MOST_APART})")

    def plan_anew() -> None:
        controller.see(seen["image"])
        controller.plan(seen["state"], 0)

    times = timing.interleave(
        {
            EAGER: lambda: eager.plan(seen["state"], 0),
            "policy.onnx": lambda: whole.sample(1, seed=0, conditions=seen),
            "camera.onnx and planner.onnx": plan_anew,
            "planner.onnx, image encoded before": lambda: controller.plan(seen["state"], 0),
            f"teacher.onnx, {evaluate.HEUN_STEPS} Heun steps": lambda: diffusion.sample_heun(
                1, steps=evaluate.HEUN_STEPS, seed=0, conditions=seen
            ),
        },
        most_s=20,
    )
    return times, apart


def observed() -> dict[str, np.ndarray]:
    """Return the first observation of a scene."""
    scene = world.draw_scenes(1, np.random.default_rng(0))
    return world.observation(scene, scene.start, np.zeros_like(scene.start))


def control_loops(run: Path, rate: float, cycles: int) -> list[dict[str, Any]]:
    """Return p50 and p99 of control loops at a fixed rate."""
    logs = {EAGER: control.loop(Eager(student_of(run)), rate, cycles)}
    code = "import sys, control, pathlib, json, dataclasses\n"
    code += f"log = control.loop(control.Controller(pathlib.Path({str(run.resolve())!r})), {rate}, {cycles})\n"
    code += "assert 'torch' not in sys.modules\n"
    code += "print(json.dumps(dataclasses.asdict(log)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLE, capture_output=True, text=True)
    if done.returncode:
        raise CmfastError(f"control.py failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    logs["cmfast, control.py"] = control.Log(**json.loads(done.stdout))
    loops = [{"loop": name, "rate_hz": rate, **loop_of(log)} for name, log in logs.items()]
    if shutil.which("g++"):
        with tempfile.TemporaryDirectory() as name:
            program = cpp_timing.compiled(ROOT / "examples" / "cpp" / "policy" / "policy.cpp", Path(name) / "policy")
            words = cpp_timing.said(
                [str(program), str((run / "policy.onnx").resolve()), str(rate), str(cycles)], Path(name)
            )
        late = int(words.strip().split()[-2])
        loops.append({"loop": "C++, examples/cpp/policy", "rate_hz": rate, **cpp_timing.loop_of(words), "late": late})
    return loops


def loop_of(log: control.Log) -> dict[str, Any]:
    """Return what the record keeps of a loop."""
    times = {"p50_ms": float(np.median(log.took_ms)), "p99_ms": p99(log.took_ms), "worst_ms": max(log.took_ms)}
    ends = {"late": log.late, "goals": log.goals, "collisions": log.collisions, "gave_up": log.gave_up}
    return {"steps": len(log.took_ms), **times, **ends}


def p99(times: list[float]) -> float:
    """Return the 99th percentile."""
    return timing.percentile(sorted(times), 0.99)


def parameters(run: Path) -> dict[str, int]:
    """Return the number of weights of the network and of its encoder."""
    network = student_of(run).network
    whole = sum(each.numel() for each in network.parameters())
    encoder = sum(each.numel() for each in network.encoders.parameters())
    return {"network": whole - encoder, "camera": encoder}


def training_of(run: Path) -> dict[str, Any]:
    """Return what a run trained: its seed, its phases, seconds by the median speed of each."""
    phases, seed, seconds = [], 0, 0.0
    for folder in (run / "teacher", run / "student"):
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        speed = statistics.median(line["images_per_s"] for line in log if "images_per_s" in line)
        (each,) = config["phases"]
        phases.append({"batch": config["batch"], **each, "samples_per_s": speed})
        seed, seconds = config["seed"], seconds + each["images"] / speed
    return {"seed": seed, "phases": phases, "seconds": seconds}


def student_of(run: Path) -> Denoiser:
    """Return the one-step model of a run."""
    return cmfast_train.load_model(run / "student" / "model.pt").denoiser(train.new_policy())


def draw(run: Path, out: Path) -> None:
    """Draw paths of both policies of a run through SHOWN scenes."""
    from matplotlib.figure import Figure

    one = world.draw_scenes(SHOWN, np.random.default_rng(5))
    scenes = world.Scenes(*(np.repeat(getattr(one, field.name), TRIES, axis=0) for field in dataclasses.fields(one)))
    policies = {
        "teacher, 35 network calls": evaluate.diffusion(cmfast.load(run / "teacher.onnx", threads=1), 0),
        "one network call": evaluate.one_step(cmfast.load(run / "policy.onnx", threads=1), 0),
    }
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=110)
    for row, (name, policy) in zip(figure.subplots(2, SHOWN), policies.items(), strict=True):
        driven = world.drive(scenes, policy, np.random.default_rng(0))
        for index, axes in enumerate(row):
            own = slice(index * TRIES, (index + 1) * TRIES)
            axes.add_patch(_disc(one.centre[index], one.radius[index], "0.35"))
            axes.add_patch(_disc(one.goal[index], world.TOLERANCE, "#2ca02c"))
            for path, left, fine in zip(
                driven.path[:, own].swapaxes(0, 1), driven.left[own], driven.success[own], strict=True
            ):
                colour = ("#1f77b4" if left else "#ff7f0e") if fine else "#d62728"
                axes.plot(path[:, 0], path[:, 1], color=colour, lw=0.8, alpha=0.8)
            axes.plot(*one.start[index], "o", color="black", ms=4)
            axes.set(xlim=(-1.1, 1.1), ylim=(-0.85, 0.85), xticks=[], yticks=[], aspect="equal")
        row[0].set_ylabel(name, fontsize=9)
    save_chart(figure, out)


def _disc(centre: np.ndarray, radius: float, colour: str) -> Any:
    from matplotlib.patches import Circle

    return Circle((float(centre[0]), float(centre[1])), float(radius), color=colour, lw=0)


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
