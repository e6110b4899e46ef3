# SPDX-License-Identifier: MIT
"""What a policy of lerobot normalises actions and states with: buffers of its network, or files beside it (newer).

Images are normalised before their encoder, so theirs are read with it only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmfast.errors import ArtifactError
from cmfast_train.border import reading
from cmfast_train.importers.diffusers_json import MAX_CONFIG
from cmfast_train.importers.diffusers_tensors import Described, describe, read_json
from cmfast_train.importers.facts import Facts
from cmfast_train.importers.policies.workspace import numbers

BUFFERS = ("normalize_inputs.", "unnormalize_outputs.", "normalize_targets.")  # of the names of tensors
PROCESSORS = {  # files: the step that holds the statistics, and of which features
    "policy_postprocessor.json": ("unnormalizer_processor", "action"),
    "policy_preprocessor.json": ("normalizer_processor", "observation."),
}
MODES = {  # the numbers that each takes; formulas: docs/importing.md
    "MIN_MAX": ("min", "max"),
    "MEAN_STD": ("mean", "std"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
MOST_NOTED = 700  # characters in a manifest, which holds 4,000 in all
MOST = 1024  # numbers of a feature
Statistics = dict[str, dict[str, Any]]  # feature: {"mode": .., "min": [..], "max": [..]}


def statistics(
    folder: Path, weights: Path, described: Described, fields: Mapping[str, Any], *, images: bool
) -> tuple[Statistics, str]:
    """Return the statistics of actions and states by feature, and what says so; {}: the folder has none.

    Args:
        folder: of the policy.
        weights: its model.safetensors.
        described: what that file holds.
        fields: the configuration.
        images: those of images too.

    Raises:
        ArtifactError: a file of statistics is missing or broken.
    """
    found: Statistics = {}
    buffers = {name: shape for name, (shape, _) in described.items() if name.startswith(BUFFERS)}
    if buffers:
        for feature, mode in _modes_of_config(fields):
            if "image" in feature and not images:
                continue
            side = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
            prefix = f"{side}.buffer_{feature.replace('.', '_')}"
            _add(found, feature, mode, weights, {f"{prefix}.{kind}": kind for kind in MODES.get(mode, ())})
        return found, weights.name
    for name, (registered, start) in PROCESSORS.items():
        if not (folder / name).is_file():
            continue
        for step in _steps(folder / name, registered):
            config = object_or_empty(step.get("config"))
            state = step.get("state_file")
            if not isinstance(state, str) or state != Path(state).name:
                raise ArtifactError(f"{folder / name}: {registered} names no file of statistics beside it")
            modes = object_or_empty(config.get("norm_map"))
            for feature, what in object_or_empty(config.get("features")).items():
                mode = str(modes.get(str(object_or_empty(what).get("type")), "IDENTITY"))
                if feature.startswith(start) and (images or "image" not in feature):
                    names = {f"{feature}.{kind}": kind for kind in MODES.get(mode, ())}
                    _add(found, feature, mode, folder / state, names)
    return found, "policy_preprocessor, policy_postprocessor"


def note(facts: Facts, found: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Record statistics, and return them for the manifest, {} if they are too long for it."""
    for name, values in found.items():
        facts.fixed(name, f"normalised, {values['mode']}", where)
        for kind, value in values.items():
            if kind != "mode":
                facts.fixed(f"{name} {kind}", tuple(value), where)
    return {"normalised": found} if found and len(str(found)) <= MOST_NOTED else {}


def _modes_of_config(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the features, and how each is normalised: by its type, in old files by its name."""
    by_type = object_or_empty(fields.get("normalization_mapping"))
    for side in ("output", "input"):
        by_name = object_or_empty(fields.get(f"{side}_normalization_modes"))
        features = object_or_empty(fields.get(f"{side}_features")) or {name: {} for name in by_name}
        for name, what in features.items():
            kind = str(object_or_empty(what).get("type"))
            yield name, str(by_type.get(kind) or by_name.get(name, "IDENTITY")).upper()


def object_or_empty(value: Any) -> dict[str, Any]:
    """Return a JSON object; of anything else {}."""
    return value if isinstance(value, dict) else {}


def _steps(file: Path, registered: str) -> list[dict[str, Any]]:
    values = read_json(file, MAX_CONFIG)
    steps = values.get("steps") if isinstance(values, dict) else None
    if not isinstance(steps, list):
        raise ArtifactError(f"{file}: not a pipeline of lerobot: it has no steps")
    return [step for step in steps if isinstance(step, dict) and step.get("registry_name") == registered]


def _add(found: Statistics, feature: str, mode: str, file: Path, names: Mapping[str, str]) -> None:
    """Add the numbers of a feature, which have these names in a file; without any, lerobot leaves it as it is."""
    described = describe(file) if names else {}
    if not names.keys() & described.keys():
        return
    from safetensors import safe_open

    for name in names:
        shape = described.get(name, ((0,), ""))[0]
        if len(shape) not in (1, 3) or shape[1:] not in ((), (1, 1)) or not 0 < shape[0] <= MOST:
            raise ArtifactError(f"{file}: {name} is {list(shape)}; the statistics of {feature}, {mode}, need a vector")
    with reading(file, "not a whole safetensors file"), safe_open(file, framework="pt") as opened:
        values = {kind: numbers(opened.get_tensor(name).flatten()) for name, kind in names.items()}
    if not all(math.isfinite(number) for each in values.values() for number in each):
        raise ArtifactError(f"{file}: the statistics of {feature} are not finite: they were never set")
    found[feature] = {"mode": mode, **values}
