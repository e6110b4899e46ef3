# SPDX-License-Identifier: MIT
"""A folder of shards: which ranges are missing, and what a shard must have been drawn with to be kept.

    request = ShardRequest(n=1_000_000, sigmas=(80.0, 0.8))
    draw_shards(model, sha256, request, Path("samples"), Here(model))     # or on a cluster: `cmfast.shards.on_ray`

Ranges end at multiples of `shard`, so a shard is the same whoever draws it. Where `shard` and `first` are multiples of
`batch`, batches begin where they would if all samples were drawn at once, and the rounding is the same, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cmfast import noise
from cmfast.checks import check_range, whole_number
from cmfast.conditions import LABEL, condition_values
from cmfast.drawing import check_number
from cmfast.files.locks import exclusive, lock_beside
from cmfast.model import Model
from cmfast.progress import progress_bar
from cmfast.sampling import Churn
from cmfast.shards.files import Array, check_shard, check_shard_folder, shards_in, write_shard
from cmfast.spec import ModelSpec

SHARD = 1024  # samples: 16 batches of 64


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """What is drawn, and in which parts."""

    n: int  # samples
    first: int = 0  # index of the first one
    shard: int = SHARD  # samples of a file
    sigmas: tuple[float, ...] = ()  # noise levels, data units, of few steps; () with `heun`
    heun: int | None = None  # steps of Heun's method instead
    churn: Churn = field(default_factory=Churn)  # of `heun`
    seed: int = 0
    batch: int = 64  # samples at a time
    precision: str = ""  # of the backend; "": the file's
    conditions: Mapping[str, Any] = field(default_factory=dict)  # as `Model.sample` takes them, the label among them

    def __post_init__(self) -> None:
        whole_number("number of samples", self.n, 1)
        whole_number("number of samples of a shard (--shard)", self.shard, 1)
        whole_number("batch", self.batch, 1)
        check_range(self.first, self.n)
        noise.check_seed(self.seed)

    @property
    def samples(self) -> range:
        """The indices of what is drawn."""
        return range(self.first, self.first + self.n)

    def draw(self, model: Model, samples: range, conditions: Mapping[str, Any]) -> Array:
        """Return the samples of these indices.

        Args:
            model: What draws them.
            samples: Their indices.
            conditions: Theirs alone, by name.

        Returns:
            Samples as `Model.sample` returns them: uint8 [n, H, W, C] or float32 [n, *shape].
        """
        n, first = len(samples), samples.start
        if self.heun is not None:
            return model.sample_heun(
                n, steps=self.heun, churn=self.churn, seed=self.seed, conditions=conditions, batch=self.batch,
                first=first,
            )  # fmt: skip
        return model.sample(
            n, sigmas=self.sigmas, seed=self.seed, conditions=conditions, batch=self.batch, first=first
        )  # fmt: skip


Part = tuple[range, Mapping[str, Any]]  # indices of samples, and their conditions


class Drawer(Protocol):
    """What draws shards."""

    @property
    def name(self) -> str:
        """What draws, in words."""
        ...

    def draw(self, request: ShardRequest, parts: Sequence[Part]) -> Generator[tuple[range, Array]]:
        """Yield the samples of each part, in any order.

        Args:
            request: What is drawn, without its conditions.
            parts: Indices of samples, and the conditions of these.

        Yields:
            The indices of a part, and its samples: uint8 [n, H, W, C] or float32 [n, *shape].
        """
        ...


@dataclass(frozen=True)
class Here:
    """This process draws, one shard after the other."""

    model: Model

    @property
    def name(self) -> str:
        """What draws, in words."""
        return self.model.backend.name

    def draw(self, request: ShardRequest, parts: Sequence[Part]) -> Generator[tuple[range, Array]]:
        """Yield the samples of each part.

        Args:
            request: What is drawn, without its conditions.
            parts: Indices of samples, and the conditions of these.

        Yields:
            The indices of a part, and its samples: uint8 [n, H, W, C] or float32 [n, *shape].
        """
        for samples, conditions in parts:
            yield samples, request.draw(self.model, samples, conditions)


def draw_shards(
    model: Model, model_sha256: str, request: ShardRequest, folder: Path, drawer: Drawer, *, show: bool = False
) -> tuple[int, int]:
    """Draw the samples that a folder of shards lacks, and write each shard when it is drawn.

    Args:
        model: Says what its samples are; `drawer` draws them.
        model_sha256: Of the model's files: shards of another one are refused.
        request: What is drawn.
        folder: Where shards are written; it is made where there is none.
        drawer: What draws.
        show: Whether there is a bar on stderr.

    Returns:
        How many shards were drawn, and how many were there before.

    Raises:
        CmfastError: a shard in the folder is damaged or was drawn with other settings, a condition does not fit, or
            another process writes to the folder.
    """
    check_shard_folder(folder)
    conditions_of, digest_of = _conditions(model, request)
    with exclusive(lock_beside(folder), f"another command draws shards into {folder}"):
        there = shards_in(folder)
        same, shape = settings_of(request, model_sha256), _sample_shape(model.spec)
        for samples, path in there:
            inside = samples.start >= request.samples.start and samples.stop <= request.samples.stop
            digest = {"conditions": digest_of(samples)} if inside else {}
            check_shard(path, samples, *shape, {**same, **digest})
        parts = missing(request.samples, [samples for samples, _ in there], request.shard)
        left = sum(map(len, parts))
        lacking = [(samples, _one_for_all(conditions_of(samples))) for samples in parts]
        if not lacking:
            return 0, len(there)
        bar = progress_bar("sampling", request.n, model.noun, start=request.n - left, show=show)
        with bar as advance, closing(drawer.draw(request, lacking)) as results:
            for samples, drawn in results:
                label = conditions_of(samples).get(LABEL)
                write_shard(folder, samples, drawn, label, {**same, "conditions": digest_of(samples)})
                advance(len(samples), "")
    return len(parts), len(there)


def draw_together(model: Model, request: ShardRequest, drawer: Drawer, *, show: bool = False) -> Array:
    """Draw samples in the parts that shards have, and return them as one array, written nowhere.

    Args:
        model: Says what its samples are; `drawer` draws them.
        request: What is drawn.
        drawer: What draws.
        show: Whether there is a bar on stderr.

    Returns:
        Images uint8 [n, H, W, C] or samples float32 [n, *shape].

    Raises:
        CmfastError: a condition does not fit, or there is too little memory.
    """
    shape, dtype = _sample_shape(model.spec)
    check_number(request.n, model.spec, model.noun, pixels=model.spec.data == "image")
    conditions_of, _ = _conditions(model, request)
    together: Array = np.empty((request.n, *shape), dtype)
    parts = [(samples, _one_for_all(conditions_of(samples))) for samples in missing(request.samples, (), request.shard)]
    bar = progress_bar("sampling", request.n, model.noun, show=show)
    with bar as advance, closing(drawer.draw(request, parts)) as results:
        for samples, drawn in results:
            together[samples.start - request.first : samples.stop - request.first] = drawn
            advance(len(samples), "")
    return together


def missing(wanted: range, have: Iterable[range], shard: int) -> list[range]:
    """Return what is wanted and not there, in ranges that end at multiples of `shard`."""
    parts, at = [], wanted.start
    for each in [*sorted(have, key=lambda one: one.start), range(wanted.stop, wanted.stop + 1)]:
        stop = min(each.start, wanted.stop)
        while at < stop:
            parts.append(range(at, min((at // shard + 1) * shard, stop)))
            at = parts[-1].stop
        at = max(at, each.stop)
    return parts


def settings_of(request: ShardRequest, model_sha256: str) -> dict[str, Any]:
    """Return what all shards of a folder must share, as JSON has it: what samples depend on, but for the conditions.

    Batch, threads and device change nothing but the rounding, as anywhere in cmfast, and so are not among it.
    """
    churn = request.churn
    how: dict[str, Any] = {"sigmas": list(request.sigmas)}
    if request.heun is not None:
        how = {"heun": request.heun, "churn": [churn.s_churn, churn.s_tmin, churn.s_tmax, churn.s_noise]}
    return {"model_sha256": model_sha256, **how, "seed": request.seed, "precision": request.precision}


def conditions_digest(conditions: Mapping[str, Array]) -> str:
    """Return a SHA-256 of the conditions of a range of samples; a value for all samples is hashed once."""
    sha256 = hashlib.sha256()
    for name, value in conditions.items():
        rows = np.ascontiguousarray(value[:1] if _is_one(value) else value)
        sha256.update(f"{name} {rows.dtype.str} {list(rows.shape)}\n".encode())
        sha256.update(rows.data)
    return sha256.hexdigest()


def _conditions(
    model: Model, request: ShardRequest
) -> tuple[Callable[[range], dict[str, Array]], Callable[[range], str]]:
    """Return two functions of a range of samples: their conditions, checked, and what tells these from others.

    Labels are drawn here, and conditions encoded. Those are told by their values before, for an encoder's rounding
    depends on the machine; which encoder it is says the model's file.
    """
    given, first = dict(request.conditions), request.first
    if (classes := model.labels(request.n, seed=request.seed, label=given.get(LABEL), first=first)) is not None:
        given[LABEL] = classes
    every = model.values(request.n, conditions=given)
    passed = [each for each in model.conditions if given.get(each.name) is not None]
    plain = condition_values(passed, {each.name: given[each.name] for each in passed}, request.n)

    def part(values: Mapping[str, Array], samples: range) -> dict[str, Array]:
        return {name: value[samples.start - first : samples.stop - first] for name, value in values.items()}

    return lambda samples: part(every, samples), lambda samples: conditions_digest(part(plain, samples))


def _one_for_all(conditions: Mapping[str, Array]) -> dict[str, Array]:
    """Return conditions as they travel: a value for all samples once, and not as many times as there are samples."""
    return {name: value[0] if _is_one(value) else value for name, value in conditions.items()}


def _is_one(value: Array) -> bool:
    return value.strides[0] == 0 and value.ndim > 1


def _sample_shape(spec: ModelSpec) -> tuple[tuple[int, ...], type]:
    """Return shape and type of a sample as `Model.sample` returns it."""
    if spec.data == "image":
        return (*spec.shape[1:], spec.shape[0]), np.uint8
    return spec.shape, np.float32
