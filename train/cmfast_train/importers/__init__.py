# SPDX-License-Identifier: MIT
"""Foreign checkpoints in, cmfast's own out: OpenAI's, diffusers', the first public implementation's, EDM's family.

    load_model(path)   any of them, as a Checkpoint, or an error that says what has to be told
    identify(path)     what it is and how that is known, for cmfast-info

One module a format: it maps names and layouts, and says what its source is known for (`facts`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cmfast.artifact import check_file
from cmfast.errors import ArtifactError, CmfastError, CmfastWarning
from cmfast_train.checkpoint import Checkpoint, checkpoint_of, is_own, read_tensors
from cmfast_train.importers import diffusers, edm, openai, pickles, seed
from cmfast_train.importers.facts import Draft, Facts, Told

SOURCES = ("cmfast", "openai", "diffusers", "seed", "edm", "ect", "fastgen")
_READERS: tuple[tuple[Any, tuple[str, ...]], ...] = (  # module: matches(weights), draft(weights, facts, source, file)
    (openai, ("openai",)),
    (seed, ("seed",)),
    (edm, ("edm", "ect", "fastgen")),
)


def load_model(path: str | os.PathLike[str], source: str = "", told: Told | None = None) -> Checkpoint:
    """Read a model of any format that is known.

    path    a cmfast checkpoint, a file of foreign weights (.pt, .pth, .safetensors, EDM's .pkl), a diffusers folder
    source  what it is, where its name and tensors do not say: one of SOURCES, or openai:NAME; "": recognise it
    told    what else has to be known; a value that contradicts the file is an error
    """
    found = identify(path, source, told)
    if isinstance(found, Checkpoint):
        return found
    checkpoint = found.checkpoint(os.fspath(path))
    for text in found.warnings:
        warnings.warn(f"{path}: {text}", CmfastWarning, stacklevel=2)
    return checkpoint


def identify(path: str | os.PathLike[str], source: str = "", told: Told | None = None) -> Checkpoint | Draft:
    """Return cmfast's own checkpoint, or what a foreign file is as far as that can be known."""
    facts, file = Facts(told or Told()), Path(path)
    system = source.partition(":")[0]
    if system not in ("", *SOURCES):
        raise CmfastError(f"--source {source}: unknown; there are {', '.join(SOURCES)} and openai:NAME")
    if file.is_dir():
        if system not in ("", "diffusers"):
            raise CmfastError(f"{file}: a folder is read as diffusers wrote it; --source {source} is for files")
        return diffusers.draft(file, facts)
    check_file(file)
    if file.suffix == ".pkl":
        if system not in ("", "edm", "ect"):
            raise CmfastError(f"{file}: a .pkl is read as EDM or ECT wrote it; --source {source} is for others")
        return edm.draft_pickle(pickles.read_pickle(file), facts, source, file)
    content = read_tensors(file)
    if is_own(content):
        if system not in ("", "cmfast") or facts.told != Told():
            raise CmfastError(
                f"{file}: a cmfast checkpoint, which says everything itself; leave --source and --set out"
            )
        return checkpoint_of(content, file)
    weights = _one_set(content, facts, file)
    for reader, systems in _READERS:
        if reader.matches(weights):
            if system not in ("", *systems):
                raise CmfastError(f"{file}: --source {source}, but its tensors are named as in {', '.join(systems)}")
            return reader.draft(weights, facts, source, file)
    raise ArtifactError(_unknown(file, weights))


def _one_set(content: Mapping[str, Any], facts: Facts, file: Path) -> dict[str, Tensor]:
    """Return the one flat set of named tensors in a file; where there are several, the one that was told.

    Wrappers are looked through: {"model": ...}, {"state_dict": ...}, FastGen's {"model": {"net": ..., "ema": ...}}.
    """
    sets = dict(_sets(content))
    if not sets:
        raise ArtifactError(f"{file}: a PyTorch file without named weights, so no model")
    if len(sets) == 1 and facts.told.weights is None:
        (weights,) = sets.values()
    else:
        name = facts.told.weights
        if name not in sets:
            said = f"--set weights={name} is none of them" if name else "say which, for example --set weights=ema"
            raise CmfastError(f"{file}: it holds several sets of weights ({', '.join(map(repr, sets))}); {said}")
        facts.usual("weights", name, "--set")
        weights = sets[name]
    for prefix in ("module.", "_orig_mod."):  # left by DistributedDataParallel and torch.compile
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _sets(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every flat dictionary of tensors in nested containers, with the keys that lead to it joined by dots."""
    if not isinstance(content, dict) or len(path) > 3 or "optimizer" in path:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if any(v.ndim > 1 for v in tensors.values()):
        yield ".".join(path), tensors
        return
    for key, value in content.items():
        yield from _sets(value, (*path, str(key)))


def _unknown(file: Path, weights: Mapping[str, Tensor]) -> str:
    if "time_embedding.linear_1.weight" in weights or "conv_in.weight" in weights:
        return (
            f"{file}: weights of a diffusers U-Net without its configuration; name the whole folder "
            "(model_index.json, scheduler, unet)"
        )
    if any(name.endswith("emb_noise.weight") for name in weights):
        return f"{file}: a network of EDM2, which is not supported yet"
    some = ", ".join(sorted(weights)[:3])
    return f"{file}: {len(weights)} tensors of a network that is not known here ({some}, ...)"
