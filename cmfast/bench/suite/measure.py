# SPDX-License-Identifier: MIT
"""Compares opened contenders, then times them in turns: one network call, whole images, what is beside the network."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast import sampling
from cmfast.bench import timing
from cmfast.bench.failures import LeftOut, Say, reason
from cmfast.bench.suite.opening import Opened
from cmfast.bench.suite.record import BesideRow, ImageRow, Wall
from cmfast.bench.suite.ways import Way
from cmfast.checks import psnr_db
from cmfast.conditions import some_values
from cmfast.errors import BackendError, CheckFailed, CmfastError, one_line
from cmfast.schedule import karras_sigmas
from cmfast.spec import ModelSpec

Floats = npt.NDArray[np.float32]
LEVELS = 8  # noise levels at which contenders are compared
HEUN = 18  # steps of a teacher: 35 network calls
MOST = 3  # times --seconds after which few calls are enough


@dataclass(frozen=True)
class Setting:
    """Where a contender is measured."""

    batch: int  # images a call
    threads: int  # CPU threads of each contender

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.threads} thread(s)"


class _CallFailed(Exception):
    """A call failed while it was timed."""

    def __init__(self, name: str, why: Exception) -> None:
        super().__init__(name)
        self.name, self.why = name, why


@dataclass
class Measured:
    """What came of it so far."""

    seconds: float
    keep_going: bool
    say: Say
    every_ms: dict[str, list[float]] = field(default_factory=dict)  # of every counted call, for the warning
    left_out: list[LeftOut] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # whose folders a record does not say
    failed: LeftOut | None = None  # the first failure that was kept for the end

    def fails(
        self, name: str, what: str, err: Exception, where: Setting | None = None, steps: int | None = None
    ) -> None:
        """Raise the error of a contender, unless keep_going; what has been timed is not thrown away with it.

        Once something has been timed, the failure is noted, the rest is measured, and the run ends with it.
        """
        left = LeftOut(contender=name, what=what, why=reason(err), steps=steps, **(vars(where) if where else {}))
        if not self.goes_on:
            if isinstance(err, CmfastError) and name in str(err):
                raise err
            raise (CheckFailed if isinstance(err, CheckFailed) else BackendError)(str(left)) from err
        self.note(left)
        if not self.keep_going:
            self.failed = self.failed or self.left_out[-1]

    @property
    def goes_on(self) -> bool:
        """Whether a failure leaves something to measure: as requested, or because something was timed."""
        return self.keep_going or bool(self.every_ms)

    def note(self, left: LeftOut) -> None:
        """Keep and report what is left out."""
        why = left.why
        for file in self.files:
            why = why.replace(str(file), file.name)
        self.left_out.append(replace(left, why=one_line(why, 500)))
        self.say(f"left out: {self.left_out[-1]}")


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """A contender that computes what the reference computes."""

    opened: Opened
    decibels: dict[str, float]  # by noise level
    wall: Wall


def network_calls(contenders: Sequence[Opened], where: Setting, measured: Measured) -> list[Agreed]:
    """Return the contenders that agree with the first that runs, with the times of a network call at sigma_max.

    Args:
        contenders: the reference first; where it fails, the next one of its precision is compared with.
        where: images a call, and threads.
        measured: says how long, and gets what is left out and all times.

    Raises:
        CheckFailed: one is further from the reference than its precision explains, unless keep_going.
        BackendError: one fails, unless keep_going. Neither once something has been timed (`fails`).
    """
    running = [each for each in contenders if each.denoise]
    if not running:
        return []
    spec, precise = running[0].manifest.spec, running[0].as_run.type
    conditions = some_values(spec.conditions, where.batch)
    inputs = noisy(spec, where.batch)
    agreed: list[tuple[Opened, dict[str, float]]] = []
    expected: list[Floats] = []
    for each in running:
        name = each.way.name
        assert each.denoise
        try:
            # Copies: an output may be a buffer of the library, which the next call overwrites.
            got = [np.array(each.denoise(x, sigma, conditions)) for x, sigma in inputs]
            if not expected and each.as_run.type != precise:
                raise CheckFailed(f"there is nothing in {precise} to compare it with, for that has failed")
            expected = expected or got
            image = spec.data == "image"
            found = [psnr_db([a], [b], image=image) for a, b in zip(got, expected, strict=True)]
            if min(found) < each.way.least_db:
                raise _differs(min(found), agreed[0][0].way, each.way)
        except Exception as err:  # whatever a library raises
            measured.fails(name, "images" if isinstance(err, CheckFailed) else "run", err, where)
            continue
        agreed.append((each, {f"{s:.4g}": round(db, 1) for (_, s), db in zip(inputs, found, strict=True)}))
    if not agreed:
        return []
    x, sigma = inputs[-1]
    # Checked above: a call without a denoiser is not among them.
    calls = {each.way.name: functools.partial(each.denoise, x, sigma, conditions) for each, _ in agreed if each.denoise}
    measured.say(f"timing a network call, {where}: {len(calls)} contender(s)")
    walls = timed(calls, where, measured)
    return [
        Agreed(opened=each, decibels=db, wall=walls[each.way.name]) for each, db in agreed if each.way.name in walls
    ]


def _differs(decibels: float, reference: Way, way: Way) -> CheckFailed:
    return CheckFailed(
        f"it is {decibels:.1f} dB from {reference.name} and needs {way.least_db:g} dB; export it again, or leave it "
        "out by --keep-going"
    )


def noisy(spec: ModelSpec, batch: int) -> list[tuple[Floats, float]]:
    """Return inputs (x, sigma) at LEVELS noise levels from sigma_min to sigma_max, the same for everyone."""
    levels = np.geomspace(spec.sigma_min, spec.sigma_max, LEVELS).astype(np.float32)
    rng = np.random.default_rng(0)
    clean = rng.uniform(-1, 1, (batch, *spec.shape)).astype(np.float32)
    return [(clean + s * rng.standard_normal(clean.shape, dtype=np.float32), float(s)) for s in levels]


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Samples of a contender, and the call that draws them."""

    opened: Opened
    sigmas: tuple[float, ...]
    heun: int | None
    call: Callable[[], Floats]

    @property
    def name(self) -> str:
        return f"{self.opened.way.name}, {f'Heun {self.heun}' if self.heun else f'{len(self.sigmas)} step(s)'}"


def whole_images(
    contenders: Sequence[Opened], steps: Sequence[int], where: Setting, measured: Measured
) -> list[ImageRow]:
    """Return the times of whole images: each contender at each number of steps, the reference also by Heun's method.

    Args:
        contenders: that agree with the reference, which is the first.
        steps: network calls an image.
        where: images a call, and threads.
        measured: as for `network_calls`.
    """
    spec, batch = contenders[0].manifest.spec, where.batch
    conditions = some_values(spec.conditions, batch)
    noise = portable.slices(0, range(batch), max(steps), spec.shape)
    drawings, decibels = list[_Drawing](), dict[str, float]()
    expected: dict[int, tuple[Way, Floats]] = {}
    for each in contenders:
        for k in steps:
            levels = spec.sigmas_for(k)
            call = functools.partial(each.draw, noise[:k], levels, conditions)
            drawing = _Drawing(opened=each, sigmas=levels, heun=None, call=call)
            try:
                got = np.array(call())
            except Exception as err:  # whatever a library raises
                measured.fails(each.way.name, "run", err, where, k)
                break
            reference, samples = expected.setdefault(k, (each.way, got))
            found = psnr_db([got], [samples], image=spec.data == "image")
            if not each.denoise and found < each.way.least_db:  # else its network was compared
                measured.fails(each.way.name, "images", _differs(found, reference, each.way), where, k)
                break
            decibels[drawing.name] = round(found, 1)
            drawings.append(drawing)
    if not spec.second_time and contenders[0].denoise:
        drawings.append(_by_heun(contenders[0], noise, conditions))
    measured.say(f"timing whole images, {where}: {len(drawings)} call(s)")
    named = {each.name: (each.opened.way.name, None if each.heun else len(each.sigmas)) for each in drawings}
    walls = timed({each.name: each.call for each in drawings}, where, measured, named)
    drawings = [each for each in drawings if each.name in walls]
    first = {each.sigmas: each for each in reversed(drawings) if not each.heun}  # whose samples were `expected`
    rows = []
    for drawn in drawings:
        wall, heun = walls[drawn.name], drawn.heun
        compared = None if heun else first[drawn.sigmas]
        rows.append(
            ImageRow(
                **vars(wall),
                contender=drawn.opened.way.name,
                precision=drawn.opened.as_run.types,
                reference=compared.opened.way.name if compared else None,
                **vars(where),
                steps=None if heun else len(drawn.sigmas),
                heun=heun,
                network_calls=sampling.heun_calls(heun) if heun else len(drawn.sigmas),
                decibels=decibels.get(drawn.name),
                times_as_fast=walls[compared.name].wall_median_ms / wall.wall_median_ms if compared else None,
            )
        )
    return rows


def _by_heun(reference: Opened, noise: Floats, conditions: Mapping[str, npt.NDArray[Any]]) -> _Drawing:
    denoise, spec = reference.denoise, reference.manifest.spec
    assert denoise
    sigmas = karras_sigmas(HEUN, spec.sigma_min, spec.sigma_max)

    def call() -> Floats:
        return np.asarray(sampling.heun(lambda x, s: denoise(x, s, conditions), noise[:1], sigmas))

    return _Drawing(opened=reference, sigmas=tuple(sigmas), heun=HEUN, call=call)


def beside_the_network(spec: ModelSpec, where: Setting, fastest_ms: float, measured: Measured) -> list[BesideRow]:
    """Return what sampling a batch costs beside the network.

    Args:
        spec: of the model.
        where: the setting; only the images count.
        fastest_ms: of the fastest contender's network call of that batch.
        measured: as for `network_calls`.
    """
    batch = where.batch
    samples = portable.slices(0, range(batch), 1, spec.shape)[0] / 4
    calls: dict[str, Callable[[], object]] = {
        "noise of one step": lambda: portable.slices(0, range(batch), 1, spec.shape)
    }
    if spec.data == "image":
        calls["samples to uint8"] = lambda: sampling.to_uint8(samples)
    walls = timed(calls, where, measured)
    return [
        BesideRow(**vars(wall), what=what, batch=batch, of_fastest=wall.wall_median_ms / fastest_ms)
        for what, wall in walls.items()
    ]


def timed(
    calls: Mapping[str, Callable[[], object]],
    where: Setting,
    measured: Measured,
    named: Mapping[str, tuple[str, int | None]] | None = None,
) -> dict[str, Wall]:
    """Return the times of calls, interleaved. What fails meanwhile is left out, and the rest is timed again.

    Args:
        calls: by name.
        where: the setting, for what is said of a failure.
        measured: as for `network_calls`.
        named: contender and steps by the names of calls; None: the names are those of contenders.
    """
    left = {name: functools.partial(_named, name, call) for name, call in calls.items()}
    while left:
        cpu_ms: dict[str, list[float]] = {}
        try:
            times = timing.interleave(left, seconds=measured.seconds, most_s=MOST * measured.seconds, cpu_ms=cpu_ms)
        except _CallFailed as failed:
            contender, steps = (named or {}).get(failed.name, (failed.name, None))
            measured.fails(contender, "run", failed.why, where, steps)
            del left[failed.name]
            continue
        measured.every_ms |= {f"{name}, {where}": each for name, each in times.items()}
        return {name: _wall(each, cpu_ms[name]) for name, each in times.items()}
    return {}


def _named(name: str, call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as err:  # whatever a library raises
        raise _CallFailed(name, err) from err


def _wall(times_ms: Sequence[float], cpu_ms: Sequence[float]) -> Wall:
    found = timing.summarise(times_ms)
    return Wall(
        wall_median_ms=found.median_ms,
        wall_p10_ms=found.p10_ms,
        wall_p90_ms=found.p90_ms,
        wall_max_ms=found.max_ms,
        wall_calls=found.calls,
        cpu_median_ms=statistics.median(cpu_ms),
    )
