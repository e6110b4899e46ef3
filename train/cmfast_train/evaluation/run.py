# SPDX-License-Identifier: MIT
"""One run of cmfast-eval: what is compared with what, the table, the record. The work is in `evaluate` and `search`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import click
import torch

import cmfast
from cmfast.bench.timing import provenance
from cmfast.errors import CmfastError
from cmfast.files import write_text
from cmfast.model import Model
from cmfast.sampling import heun_calls
from cmfast.shards.drawing import ShardRequest
from cmfast.shards.on_ray import OnRay
from cmfast.shards.sent import Files, How, described, read_model
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.config.presets import PRESETS
from cmfast_train.evaluation.config import METRICS, MOST, EvalConfig
from cmfast_train.evaluation.evaluate import (
    Bytes,
    Reference,
    cluster_steps,
    data_images,
    few_steps,
    heun_steps,
    is_samples,
    read_samples,
    training_of,
)
from cmfast_train.evaluation.features import default_features, features_record, load_features
from cmfast_train.evaluation.metrics import check_numbers
from cmfast_train.evaluation.report import draw, heading, line
from cmfast_train.evaluation.search import (
    bounds,
    check_writable,
    exported_with_others,
    own_checkpoint,
    search_level,
    write_sigmas,
)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Print the metrics of a model's samples, or search a noise level; return the record, which is also written."""
    training = training_of(config.train_log, config.data_set) if config.train_log is not None else None
    feature_name = config.features or default_features(config.data_set)
    subject = _samples(config) if is_samples(config.model) else _model(config)
    features = load_features(feature_name, subject.image)
    images = data_images(config.data_set, config.data, subject.image)
    metrics = config.metrics or tuple(name for name in METRICS if name != "is" or features.head is not None)
    reference = Reference(
        features,
        images,
        ("fd",) if config.search else metrics,
        seed=config.seed,
        device="cuda" if config.device == "cuda" and torch.cuda.is_available() else "cpu",
        progress=sys.stderr.isatty(),
    )
    record = {
        "what": "evaluation",
        **provenance(),
        "torchmetrics": version("torchmetrics"),
        **subject.source,
        "data_set": config.data_set,
        "data_images": len(images),
        "features": features_record(features, feature_name),
        "metrics": list(reference.metrics),
        "seed": config.seed,
        "batch": config.batch,
        "rows": [],
        "halves": reference.halves,
        "training": training,
    }
    number = len(subject.samples) if subject.samples is not None else config.number or min(MOST, len(images))
    check_numbers(reference.metrics, len(images), number)
    by = record["features"]["name"]
    of = f"{number:,} samples against {len(images):,} images of {config.data_set}, features: {by}"
    if subject.checkpoint is not None:
        record |= {"what": "search", "search": _search(config, subject, reference, number, record["rows"])}
    else:
        click.echo(heading(reference.metrics))
        for row in _rows(config, subject, number):
            row |= reference.measure(row.pop("images"))
            record["rows"].append(row)
            click.echo(line(row))
    click.echo(line({"name": "one half of the data", **reference.halves}))
    click.echo(of)
    if config.json_file is not None:
        write_text(config.json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {config.json_file}")
    if config.plot is not None:
        draw(record, config.plot)
        click.echo(f"the chart is in {config.plot}")
    return record


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is evaluated: samples, or a model that draws them."""

    image: tuple[int, int, int]  # channels, height, width
    source: dict[str, Any]  # for the record
    samples: Bytes | None = None  # uint8 [N, H, W, C]
    model: Model | None = None
    files: Files | None = None  # of the model, for workers of a cluster
    sigmas: tuple[tuple[float, ...], ...] = ()  # of each number of few steps, checked
    checkpoint: Checkpoint | None = None  # whose second level is searched


def _samples(config: EvalConfig) -> _Subject:
    if config.steps or config.heun or config.search or config.plot or config.address:
        raise CmfastError(
            f"{config.model}: these samples are drawn already; --steps, --heun, --search, --plot and --ray are for a "
            "model"
        )
    channels = None if config.data_set == "folder" else PRESETS[config.data_set].channels
    samples = read_samples(config.model, config.number, channels)
    image = (samples.shape[3], samples.shape[1], samples.shape[2])
    source = {"samples": {"file": config.model.name, "images": len(samples)}}
    return _Subject(image=image, source=source, samples=samples)


def _model(config: EvalConfig) -> _Subject:
    checkpoint = own_checkpoint(config.model) if config.search else None
    files: Files | None = None
    if checkpoint is not None:
        bounds(checkpoint.spec, config.search_bounds)
        if config.write:
            check_writable(config.model)
        model = Model(TorchBackend(checkpoint, config.device or "cpu"))
    elif config.address is not None:
        files = read_model(config.model)
        model = described(files, config.model)
    else:
        model = cmfast.load(config.model, config.device)
    steps = config.steps
    if steps is None:
        steps = () if config.heun or checkpoint is not None else tuple(sorted(model.spec.sigmas))
    if config.heun and model.manifest.kind != "denoiser":
        raise CmfastError(
            f"{config.model}: a {model.manifest.kind} has its noise levels inside; --heun needs a denoiser"
        )
    for count in config.heun:
        heun_calls(count)  # at least one step
    weights = dict(model.manifest.source)
    engine = model.backend.name if config.address is None else "Ray workers"
    return _Subject(
        image=model.spec.image,
        source={"model": {"file": config.model.name, "engine": engine, "source": weights}},
        model=model,
        files=files,
        sigmas=tuple(model.sigmas_for(k) for k in steps),
        checkpoint=checkpoint,
    )


def _rows(config: EvalConfig, subject: _Subject, number: int) -> Iterator[dict[str, Any]]:
    """Yield what is evaluated, {calls, sigmas, n, images, ...}."""
    if subject.model is None:
        yield {"name": config.model.name[:22], "n": number, "images": subject.samples}
        return
    show = sys.stderr.isatty()
    if config.address is not None:
        assert subject.files is not None
        opened = How.of(config.model, config.device, None, "", "", None)
        drawer = OnRay(config.address, subject.files, opened)
        requests = [
            ShardRequest(n=number, sigmas=sigmas, seed=config.seed, batch=config.batch) for sigmas in subject.sigmas
        ]
        requests += [ShardRequest(n=number, heun=steps, seed=config.seed, batch=config.batch) for steps in config.heun]
        for request in requests:
            yield cluster_steps(subject.model, request, drawer, progress=show)
        return
    for sigmas in subject.sigmas:
        yield few_steps(subject.model, sigmas, number, seed=config.seed, batch=config.batch, progress=show)
    for steps in config.heun:
        yield heun_steps(subject.model, steps, number, seed=config.seed, batch=config.batch, progress=show)


def _search(
    config: EvalConfig, subject: _Subject, reference: Reference, number: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Print each level tried, write the best if requested; return {before, best, fd, written}."""
    assert subject.model is not None
    assert subject.checkpoint is not None
    model, spec = subject.model, subject.checkpoint.spec
    first, before = spec.sigmas.get(2, (spec.sigma_max, None))

    def distance(level: float) -> float:
        show = sys.stderr.isatty()
        row = few_steps(model, (first, level), number, seed=config.seed, batch=config.batch, progress=show)
        row |= reference.measure(row.pop("images"))
        rows.append(row)
        mark = "   the level so far" if level == before else ""
        click.echo(f"sigma {level:<10g}  {row['fd']:.6g}{mark}")
        return float(row["fd"])

    tried = [] if before is None else [(before, distance(before))]
    tried += search_level(distance, spec, *bounds(spec, config.search_bounds), config.search_calls)
    best, least = min(tried, key=lambda pair: pair[1])
    written = config.write and best != before
    found = {"before": before, "best": best, "fd": least, "written": written}
    if best == before:
        click.echo(f"best: {before:g}, the level that {config.model} has")
    elif not written:
        click.echo(f"best: {best:g}, with fd {least:.6g}; add --write to make it the default for 2 steps")
    else:
        write_sigmas(config.model, (first, best), subject.checkpoint.sha256())
        click.echo(f"{config.model}: 2 steps are now at {first:g}, {best:g}, with fd {least:.6g}")
        others = exported_with_others(config.model, subject.checkpoint.sha256(), (first, best))
        names = ", ".join(map(str, others)) or "files exported from it elsewhere"
        click.echo(f"with the level before, to be made anew: {names}")
        click.echo(f"next: cmfast-export {config.model}")
    return found
