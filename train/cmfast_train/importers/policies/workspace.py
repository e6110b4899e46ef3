# SPDX-License-Identifier: MIT
"""The configuration and the normalizer in a `.ckpt` of Diffusion Policy or Consistency Policy, read as data.

A workspace saves {"cfg": hydra's configuration, "state_dicts": {policy: tensors}, ..}. The configuration's objects are
there by name only (`pickle_opcodes.Foreign`): their values are read, nothing is made of them and nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmfast.errors import ArtifactError
from cmfast_train.importers.facts import shown
from cmfast_train.importers.pickle_opcodes import Foreign

STUDENT, STUDENTS_TEACHER, DIFFUSION = "consistency_policy", "consistency_policy_teacher", "diffusion_policy"
POLICIES = {  # how the policy's class begins: its source
    "diffusion_policy.policy.diffusion_unet_": DIFFUSION,
    "consistency_policy.student.": STUDENT,
    "consistency_policy.teacher.": STUDENTS_TEACHER,
}
NORMALIZER = "normalizer.params_dict."
MOST_NODES, DEPTH, MOST_HOPS = 20_000, 60, 8  # of a configuration; from one reference to the next
MOST = 1024  # numbers of a feature
MOST_FEATURES = 64  # of a normalizer: actions, states, cameras
_REFERENCE = re.compile(r"\$\{([\w.]{1,200})\}")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What a checkpoint says beside its weights.

    Attributes:
        source: which of POLICIES its policy is; "": none of them.
        config: the configuration in plain containers; what is computed while it is used is None.
        normalised: a feature: {"mode": "LINEAR", "scale": [..], "offset": [..]}; x is normalised as x * scale + offset.
    """

    source: str
    config: Mapping[str, Any]
    normalised: Mapping[str, Mapping[str, Any]]

    def value(self, *path: str) -> Any:
        """Return a value of the configuration, its references to others followed; None: there is none."""
        found = self._followed(_at(self.config, path))
        return None if isinstance(found, str) and "${" in found else found

    def section(self, *path: str) -> Any:
        """Return a section of the configuration, its references followed; what is computed stays as it is written."""
        found = self.value(*path)
        return {name: self._followed(each) for name, each in found.items()} if isinstance(found, Mapping) else found

    def _followed(self, found: Any) -> Any:
        """Return what a value refers to; itself if it is no reference."""
        for _ in range(MOST_HOPS):
            reference = _REFERENCE.fullmatch(found) if isinstance(found, str) else None
            if reference is None:
                break
            found = _at(self.config, reference[1].split("."))
        return found


def workspace(content: Any, chosen: str, file: Path) -> Workspace | None:
    """Return what a checkpoint says beside its weights, None if it is of no workspace.

    Args:
        content: what the file holds.
        chosen: the set of weights that is read, for example state_dicts.ema_model.model.
        file: named in errors.

    Raises:
        ArtifactError: its normalizer is damaged.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dicts"), Mapping):
        return None
    config = _plain(content.get("cfg"), [MOST_NODES])
    found = Workspace(source="", config=config if isinstance(config, dict) else {}, normalised={})
    target = str(found.value("policy", "_target_"))
    source = next((source for start, source in POLICIES.items() if target.startswith(start)), "")
    if source == STUDENT and chosen.rpartition(".")[2] == "teacher":
        source = STUDENTS_TEACHER
    return Workspace(source=source, config=found.config, normalised=_normalised(content["state_dicts"], chosen, file))


def _plain(node: Any, left: list[int], depth: int = 0) -> Any:
    """Return a configuration in plain containers; of other objects and of too much of it None."""
    left[0] -= 1
    if left[0] < 0 or depth > DEPTH:
        return None
    if isinstance(node, Foreign):
        if not node.name.startswith("omegaconf."):
            return None
        return _plain(node.state.get("_content", node.state.get("_val")), left, depth + 1)
    if isinstance(node, Mapping):
        return {key: _plain(value, left, depth + 1) for key, value in node.items() if isinstance(key, str)}
    if isinstance(node, (list, tuple)):
        return [_plain(value, left, depth + 1) for value in node]
    return node if isinstance(node, (str, int, float, bool)) else None


def _at(config: Any, path: Iterable[str]) -> Any:
    found: Any = config
    for name in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def _normalised(policies: Mapping[Any, Any], chosen: str, file: Path) -> dict[str, dict[str, Any]]:
    """Return what the policy of the chosen weights normalises with: actions, states, images, each by its name."""
    named = [part for part in chosen.split(".") if part in policies]
    one = named[0] if named else next(iter(policies)) if len(policies) == 1 else None
    tensors = policies.get(one)
    if not isinstance(tensors, Mapping):
        return {}
    ends = (".scale", ".offset")
    stored = [name for name in tensors if isinstance(name, str) and name.startswith(NORMALIZER) and name.endswith(ends)]
    features = sorted({name.removeprefix(NORMALIZER).rpartition(".")[0] for name in stored})
    if len(features) > MOST_FEATURES:
        raise ArtifactError(f"{file}: its normalizer has {len(features)} features; at most {MOST_FEATURES} are read")
    found: dict[str, dict[str, Any]] = {}
    for feature in features:
        found[feature] = {"mode": "LINEAR"}
        for kind in ("scale", "offset"):
            value = tensors.get(name := f"{NORMALIZER}{feature}.{kind}")
            if not _is_vector(value):
                raise ArtifactError(f"{file}: {shown(name)} is not a vector of at most {MOST} finite numbers")
            found[feature][kind] = numbers(value)
    return found


def _is_vector(value: Any) -> bool:
    whole = isinstance(value, Tensor) and value.ndim == 1 and value.numel() <= MOST and value.is_floating_point()
    return whole and bool(value.isfinite().all())


def numbers(values: Any) -> list[float]:
    """Return float32 numbers as short as they can be written: a manifest has 4,000 characters."""
    return [float(str(value)) for value in values.float().numpy()]
