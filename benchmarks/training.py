# SPDX-License-Identifier: MIT
"""Images per second of our training loop against the first public implementation's, which trains its own network.

    git clone https://github.com/cloneofsimo/consistency_models seed
    python benchmarks/training.py --reference seed --data DIR --json benchmarks/results/training_speed_cpu.json

Theirs is `train` of their main.py, run as it stands from the clone, which has no licence and no copy here; one thing is
replaced: their loader of 20 worker processes, by batches that lie ready in memory, so that its reading costs nothing.
Ours is `cmfast_train.training.trainer.steps` with its own loader. Both train the network of that project at their width
(256, 26 million weights) and batch (128) on MNIST, by consistency training at the noise levels of their first epoch
(16; the number does not change what a step costs), each with its optimiser: AdamW there, RAdam and an average more
here.

Each contender is a process, as a user starts it, and they take turns step by step, the order rotating; who has no turn
sleeps. Before its first step, each of ours gets the loss and the gradient of some images, and their code those of the
same images, noise, levels and weights. Where they differ by more than rounding, nothing is timed.

Most of the difference in float32 is arithmetic that `cmfast_train.networks.cloneofsimo` does not do: the record has the
multiplications that an image costs in each network.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cmfast.bench import timing
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.data.batches import batches
from cmfast_train.data.images import load_data, to_unit_range
from cmfast_train.methods.step import Step
from cmfast_train.networks.build import build_network
from cmfast_train.torchvision_cpu import torchvision_datasets
from cmfast_train.training.state import Run
from cmfast_train.training.trainer import accelerator_of, steps

REFERENCE = "the first public implementation"
LEVELS = 16  # noise levels in the first of their 100 epochs
COMPARED = 8  # images whose loss and gradient are compared
OURS: dict[str, tuple[str, ...]] = {
    "fp32": ("precision=fp32",),
    "bf16": ("precision=bf16",),
    "fp32, compile": ("precision=fp32", "compile=true"),
    "bf16, compile": ("precision=bf16", "compile=true"),
}
UNCOMPILED = ("fp32", "bf16")  # compiling takes minutes on a CPU
# Relative: of the loss, and of the norm of the gradient's difference. fp32: other orders of summation. bf16: 17
# convolutions, each of which rounds at 2^-9, and the gradient through all of them.
ROOM = {"fp32": (1e-5, 1e-4), "bf16": (0.01, 0.05)}
FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all contenders share."""

    reference: Path  # the clone
    data: Path
    width: int
    batch: int
    device: str  # cpu or cuda


@click.command("training.py")
@click.option("--reference", type=click.Path(path_type=Path), required=True, help="Clone.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Has MNIST.")
@click.option("--only", multiple=True, type=click.Choice(tuple(OURS)), help="Of ours, these; default: not compiled.")
@click.option("--rounds", type=int, default=4, show_default=True, help="Counted steps of each.")
@click.option("--width", type=int, default=256, show_default=True, help="Of the network; theirs is 256.")
@click.option("--batch", type=int, default=128, show_default=True, help="Images a step; theirs are 128.")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(only: tuple[str, ...], rounds: int, json_file: Path | None, **options: Any) -> None:
    """Time training steps."""
    if rounds < 1:
        raise CmfastError(f"--rounds must be at least 1, got {rounds}")
    shared = Options(**{**options, "reference": options["reference"].resolve(), "data": options["data"].resolve()})
    read = (shared.reference / "main.py", *(shared.data / "MNIST" / "raw" / name for name in FILES))
    check_outputs({"--json": json_file}, read)
    for file in read:
        if not file.is_file():  # their main.py would download what is missing
            raise CmfastError(
                f"{file} is missing: --reference is a clone of {REFERENCE}, --data has MNIST/raw unpacked"
            )
    os.environ["TQDM_DISABLE"] = "1"  # of the processes that follow: no bar on the terminal
    contenders = {REFERENCE: Contender(train_theirs, shared)}
    contenders |= {name: Contender(train_ours, shared, name) for name in only or UNCOMPILED}
    about = {name: contender.answer() for name, contender in contenders.items()}
    before = timing.cpu_ticks()
    times = take_turns(contenders, rounds)
    steal = timing.steal_share(before, timing.cpu_ticks())
    load = timing.load_average()
    for contender in contenders.values():
        contender.end()
    rows = [row_of(name, times, about[name], shared.batch) for name in contenders]
    warning = timing.noise_warning(times, load=load, steal=steal)
    for row in rows:
        click.echo(
            f"{row['contender']:<34}{row['images_per_s']:9.2f} images/s  {row['times_reference']:6.2f}x   "
            f"step {row['median_ms']:8.0f} ms (p10 {row['p10_ms']:.0f}, p90 {row['p90_ms']:.0f})"
        )
    if json_file is not None:
        record = {
            "what": "training speed",
            **timing.provenance(),
            "load_average": load,
            "steal": steal,
            "warning": warning,
            "method": "ct",
            "data": "mnist",
            "width": shared.width,
            "batch": shared.batch,
            "device": torch.cuda.get_device_name() if shared.device == "cuda" else "cpu",
            "rows": rows,
        }
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if warning:
        click.echo(f"warning: {warning}")


def take_turns(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Let each contender take a step in turns, the order rotating; return their times, ms, but for a first round."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = contenders[name].step()
            click.echo(f"round {turn}: {name} {seconds:.2f} s", err=True)
            if turn:
                times[name].append(1000 * seconds)
    return times


def row_of(name: str, times: dict[str, list[float]], about: dict[str, Any], batch: int) -> dict[str, Any]:
    """Return a row of the record."""
    summary, reference = timing.summarise(times[name]), timing.summarise(times[REFERENCE])
    return {
        "contender": name,
        **about,
        "images_per_s": round(1000 * batch / summary.median_ms, 3),
        "times_reference": round(reference.median_ms / summary.median_ms, 3),
        **dataclasses.asdict(summary),
        "all_ms": [round(each, 1) for each in times[name]],
    }


class Contender:
    """A process that trains, one step whenever it is asked. `work` sends what there is to know, then the seconds."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, link = context.Pipe()
        self._process = context.Process(target=_guarded, args=(work, link, *arguments), daemon=True)
        self._process.start()
        link.close()

    def answer(self) -> Any:
        try:
            answer = self._link.recv()
        except EOFError:
            raise CmfastError("a training process ended without a word: too little memory?") from None
        if isinstance(answer, CmfastError):
            raise answer
        return answer

    def step(self) -> float:
        """Take one step; return how long it took, seconds."""
        self._link.send(True)
        seconds: float = self.answer()
        return seconds

    def end(self) -> None:
        self._link.send(False)
        self._process.join()


def _guarded(work: Callable[..., None], link: Connection, *arguments: Any) -> None:
    try:
        work(link, *arguments)
    except CmfastError as err:
        link.send(err)
    except EOFError:
        return  # the parent has failed, and says so


def train_theirs(link: Connection, options: Options) -> None:
    """Run their `train`, whose loader is `Handed`."""
    config = config_of(options)
    data = load_data(config, options.data)
    share = slice(0, options.batch)
    stream = batches(data, options.batch, 0, 0, 8, share, 0, False)
    ready = [(to_unit_range(images), label) for images, label in stream]
    torchvision_datasets()
    sys.path.insert(0, str(options.reference))
    with tempfile.TemporaryDirectory() as folder:  # its main.py opens ./data at once
        os.chdir(folder)
        Path("data").symlink_to(options.data)
        warnings.simplefilter("ignore")  # 20 worker processes are too many here; none is started
        import main as theirs  # type: ignore[import-not-found]

        os.chdir(options.reference)
    original = theirs.ConsistencyModel
    about = about_network(original(1, D=options.width), torch.ones(COMPARED, 1))
    theirs.ConsistencyModel = lambda channels, D: original(channels, D=options.width)  # 256 stands in its text
    loader = Handed(link, {"settings": [], **about}, ready, options.device)
    theirs.train(n_epoch=100, device=options.device, dataloader=loader, n_channels=1)


class Handed:
    """A loader that hands over a batch when one is asked for; until it is asked for the next is one step of theirs."""

    def __init__(
        self, link: Connection, about: dict[str, Any], ready: list[tuple[Tensor, Tensor]], device: str
    ) -> None:
        self.link, self.about, self.ready, self.device = link, about, ready, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.link.send(self.about)
        for batch in itertools.cycle(self.ready):
            if not self.link.recv():
                sys.exit()
            began = time.perf_counter()
            yield batch
            _finish(self.device)
            self.link.send(time.perf_counter() - began)


def train_ours(link: Connection, options: Options, name: str) -> None:
    """Run our loop."""
    config = config_of(options, *OURS[name])
    data = load_data(config, options.data)
    run = Run(config, Path("unused"), accelerator_of(config), len(data), data.classes)
    sys.path.insert(0, str(options.reference))
    images = to_unit_range(data.__getitems__(list(range(COMPARED)))[0])
    link.send(
        {
            "settings": list(OURS[name]),
            **about_network(build_network(run.context.network), torch.ones(COMPARED)),
            "difference": compare(run, images.to(run.context.accelerator.device), options, name),
        }
    )
    stream = steps(run, data)
    while link.recv():
        began = time.perf_counter()
        next(stream)
        _finish(options.device)
        link.send(time.perf_counter() - began)


def about_network(network: torch.nn.Module, sigma: Tensor) -> dict[str, int]:
    """Return its size, the multiplications of one image in one evaluation, and the threads that it runs with."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(COMPARED, 1, 32, 32), sigma)
    return {
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "multiplications": counter.get_total_flops() // 2 // COMPARED,
        "threads": torch.get_num_threads(),
    }


def config_of(options: Options, *settings: str) -> TrainConfig:
    """Return the run that does what their main.py does."""
    shape = ["network=cloneofsimo", "conditional=false", f"model_channels={options.width}", f"batch={options.batch}"]
    conventions = ["scaling=cloneofsimo", "c_noise=raw", f"device={options.device}"]
    method = [f"phases=ct:{options.batch * 100_000}", "ct.lr=1e-4", f"ct.s0={LEVELS}", f"ct.s1={LEVELS}"]
    # Without the clip RAdam, whose first steps do not divide by the size of the gradient, diverges in this scaling.
    target = ["ct.mu=fixed", f"ct.mu0={math.exp(2 * math.log(0.95) / LEVELS)}", "ct.clip_norm=1"]
    return override(PRESETS["mnist-large"], [*shape, *conventions, *method, *target, *settings])


def compare(run: Run, x0: Tensor, options: Options, name: str) -> dict[str, float]:
    """Return the relative differences of loss and gradient from what their code computes; CheckFailed if too large."""
    from consistency_models import ConsistencyModel, kerras_boundaries  # type: ignore[import-not-found]

    generator = torch.Generator(x0.device).manual_seed(0)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    uniform = torch.rand(len(x0), 4, generator=generator, device=x0.device)
    with run.context.accelerator.autocast():
        losses, sigma = run.phase.row.function()(
            Step(
                hyper=run.phase.hyper,
                spec=run.context.spec,
                networks=run.state.networks,
                distance=run.state.distance,
                constants=run.phase.constants(0, run.state.total),
                x0=x0,
                noise=noise,
                uniform=uniform,
                conditions={},
            )
        )
        loss = losses.mean() / math.prod(run.context.spec.image)  # theirs is a mean over pixels
        run.context.accelerator.backward(loss)
    ours = torch.cat([weight.grad.flatten() for weight in run.state.weights.values()])
    run.state.optimizer.zero_grad(set_to_none=True)

    theirs, target = (ConsistencyModel(1, D=options.width).to(x0.device) for _ in range(2))
    for model in (theirs, target):
        model.load_state_dict(run.state.weights)
    if (count := len(torch.nn.utils.parameters_to_vector(theirs.parameters()))) != len(ours):
        raise CheckFailed(f"{name}: {len(ours):,} weights, theirs has {count:,}")
    grid = kerras_boundaries(7.0, 0.002, LEVELS, 80.0).to(x0.device)
    i = (grid - sigma[:, None]).abs().argmin(dim=1, keepdim=True)  # [B, 1]
    torch.testing.assert_close(grid[i[:, 0]], sigma)
    wanted = theirs.loss(x0, noise, grid[i - 1], grid[i], ema_model=target)
    wanted.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in theirs.parameters()])
    found = {
        "loss": float((loss - wanted).detach().abs() / wanted.detach()),
        "gradient": float((ours - gradient).norm() / gradient.norm()),
    }
    for (what, difference), room in zip(found.items(), ROOM[name.partition(",")[0]], strict=True):
        if not difference <= room:
            raise CheckFailed(f"{name}: the {what} differs by {difference:.2g} from theirs, more than {room:g}")
    return found


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_command(command)
