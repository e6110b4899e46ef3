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
from cmfast_train.importers.facts import Fact, Facts, shown
from cmfast_train.importers.policies.workspace import numbers

BUFFERS = ("normalize_inputs.", "unnormalize_outputs.", "normalize_targets.")  # of the names of tensors
PROCESSORS = {  # files: the step that holds the statistics, and of which features
    "policy_postprocessor.json": ("unnormalizer_processor", "action"),
    "policy_preprocessor.json": ("normalizer_processor", "observation."),
}
AS_IT_IS = "IDENTITY"  # not normalised; also what no mode is given for
MODES: Mapping[str, tuple[str, ...]] = {  # the numbers that each takes; formulas: docs/importing.md
    "MIN_MAX": ("min", "max"),
    "MEAN_STD": ("mean", "std"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    AS_IT_IS: (),
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
            _add(found, feature, mode or AS_IT_IS, weights, prefix)
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
                mode = str(modes.get(str(object_or_empty(what).get("type")), AS_IT_IS))
                if feature.startswith(start) and (images or "image" not in feature):
                    _add(found, feature, mode, folder / state, feature)
    if found:
        return found, "policy_preprocessor, policy_postprocessor"
    said = {name: mode for name, mode in _modes_of_config(fields) if images or "image" not in name}
    return {name: {"mode": mode} for name, mode in said.items() if mode == AS_IT_IS}, "config.json"


def note(facts: Facts, found: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Record statistics, and return those for the manifest that it has room for, the actions' first."""
    noted: dict[str, Any] = {}
    for name in sorted(found, key=lambda name: name != "action"):
        values = found[name]
        if len(str({**noted, name: values})) <= MOST_NOTED:
            noted[name] = values
        as_it_is = "not normalised" if values["mode"] == AS_IT_IS else "normalised"
        lines: dict[str, Any] = {"": f"{as_it_is}, {values['mode']}"}
        lines |= {f" {kind}": tuple(value) for kind, value in values.items() if kind != "mode"}
        # Not `facts.fixed`: a feature may have the name of an option.
        facts.known += [Fact(name=f"{shown(name)}{end}", value=value, where=where) for end, value in lines.items()]
    if left := [shown(name) for name in found if name not in noted]:
        facts.fixed("too long", f"for a manifest: the statistics of {', '.join(left)}; exports do not keep them", where)
    return {"normalised": noted} if noted else {}


def _modes_of_config(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the features, and how each is normalised, "" if nothing says it: by its type, in old files by its name."""
    by_type = object_or_empty(fields.get("normalization_mapping"))
    for side in ("output", "input"):
        by_name = object_or_empty(fields.get(f"{side}_normalization_modes"))
        features = object_or_empty(fields.get(f"{side}_features")) or {name: {} for name in by_name}
        for name, what in features.items():
            kind = str(object_or_empty(what).get("type"))
            yield name, str(by_type.get(kind) or by_name.get(name, "")).upper()


def object_or_empty(value: Any) -> dict[str, Any]:
    """Return a JSON object; of anything else {}."""
    return value if isinstance(value, dict) else {}


def _steps(file: Path, registered: str) -> list[dict[str, Any]]:
    values = read_json(file, MAX_CONFIG)
    steps = values.get("steps") if isinstance(values, dict) else None
    if not isinstance(steps, list):
        raise ArtifactError(f"{file}: not a pipeline of lerobot: it has no steps")
    return [step for step in steps if isinstance(step, dict) and step.get("registry_name") == registered]


def _add(found: Statistics, feature: str, mode: str, file: Path, prefix: str) -> None:
    """Add how a feature is normalised, by numbers whose names in a file begin with `prefix`, if they are there."""
    if mode not in MODES:
        raise ArtifactError(f"{file}: {shown(feature)} is normalised by {shown(mode)}; supported: {', '.join(MODES)}")
    if mode == AS_IT_IS:
        found[feature] = {"mode": mode}
        return
    names = {f"{prefix}.{kind}": kind for kind in MODES[mode]}
    described = describe(file)
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
