# SPDX-License-Identifier: MIT
"""Foreign checkpoints in, cmfast's own out: OpenAI's, diffusers', the first public implementation's, EDM's family.

    load_model(path)   any of them, as a Checkpoint, or an error that names what is missing
    identify(path)     what it is and how that is known, for cmfast-info

One module a format: it maps names and layouts, and says what its source is known for (`facts`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError, CmfastWarning
from cmfast.formats.manifest import check_file
from cmfast_train.border import naming
from cmfast_train.checkpoint import Checkpoint, HoldsObjectsError, checkpoint_of, is_cmfast_checkpoint, read_tensors
from cmfast_train.importers import diffusers, edm, pickles
from cmfast_train.importers.facts import OF_POLICIES, Draft, Facts, Given, shown
from cmfast_train.importers.policies import lerobot
from cmfast_train.importers.sets import one_set
from cmfast_train.importers.table import FOLDERS_AND_OWN, sources
from cmfast_train.safe_load import refuse_others


def load_model(
    path: str | os.PathLike[str], source: str = "", given: Given | None = None, opened: BinaryIO | None = None
) -> Checkpoint:
    """Read a model of any known format. Nothing in the file is executed.

    Args:
        path: a cmfast checkpoint, a file of foreign weights (.pt, .pth, .safetensors, EDM's .pkl), a folder of
            diffusers or lerobot.
        source: what it is, where its name and tensors do not say: a name in `table`, or openai:NAME; "": recognise it.
        given: facts that the file does not hold; a value that contradicts the file is an error.
        opened: the content of a file that was opened and checked already; `path` is its name then.

    Returns:
        The model: its conventions, the shape of its network, its weights.

    Raises:
        ArtifactError: the file is missing, damaged, or of no known format.
        CmfastError: a fact is missing or contradicts the file; the error says what to pass.
    """
    found = identify(path, source, given, opened)
    return found if isinstance(found, Checkpoint) else finish(found, path)


def finish(draft: Draft, path: str | os.PathLike[str]) -> Checkpoint:
    """Return the model of a draft; its warnings are given. What is missing is an error."""
    with naming(Path(path)):
        checkpoint = draft.checkpoint(os.fspath(path))
    for text in draft.warnings:
        warnings.warn(f"{path}: {text}", CmfastWarning, stacklevel=3)
    return checkpoint


def identify(
    path: str | os.PathLike[str], source: str = "", given: Given | None = None, opened: BinaryIO | None = None
) -> Checkpoint | Draft:
    """Return cmfast's own checkpoint, or what a foreign file is as far as that can be known."""
    facts = Facts(given or Given())
    with naming(Path(path)):
        found = _identify(Path(path), source, facts, opened)
    known = {fact.name for fact in facts.known} | facts.missing.keys()
    if isinstance(found, Draft) and (unused := [n for n in OF_POLICIES if n not in known and getattr(facts.given, n)]):
        raise CmfastError(f"{path}: --set {unused[0]}: {found.what} has no such fact; leave it out")
    return found


def _identify(file: Path, source: str, facts: Facts, opened: BinaryIO | None) -> Checkpoint | Draft:
    system, colon, _ = source.partition(":")
    rows = sources()
    names = (*FOLDERS_AND_OWN, *(name for row in rows for name in row.names))
    if system not in ("", *names) or (colon and system != "openai"):
        raise CmfastError(f"--source {source}: unknown; there are {', '.join(names)} and openai:NAME")
    if file.is_dir():
        if system in ("", "lerobot") and (system or lerobot.is_policy(file)):
            return lerobot.draft(file, facts)
        if system not in ("", "diffusers"):
            raise CmfastError(
                f"{file}: a folder is read as diffusers or lerobot wrote it; --source {source} is for files"
            )
        return diffusers.draft(file, facts)
    check_file(file)
    if file.suffix == ".pkl":
        if system not in ("", "edm", "ect", "sid", "cmt"):
            raise CmfastError(
                f"{file}: a .pkl is read as EDM, ECT, CMT or SiD wrote it; --source {source} is for others"
            )
        with open(file, "rb") as stream:
            refuse_others(file, stream)
        return edm.draft_pickle(pickles.read_pickle(file), facts, source, file)
    content = _content(file, opened)
    if is_cmfast_checkpoint(content):
        if system not in ("", "cmfast") or facts.given != Given():
            raise CmfastError(
                f"{file}: a cmfast checkpoint, which already holds these facts; remove --source and --set"
            )
        return checkpoint_of(content, file)
    facts.content = content
    name, weights = one_set(content, facts, file)
    if any(key.startswith("time_embed_s.") for key in weights):
        raise ArtifactError(f"{file}: a network of CTM, which takes two times; not supported")
    for row in rows:
        if row.matches(weights):
            if system not in ("", *row.names):
                raise CmfastError(f"{file}: --source {source}, but its tensors are named as in {', '.join(row.names)}")
            draft = row.draft(weights, facts, source, file)
            return replace(draft, source={**draft.source, "weights": name[:80]}) if name else draft
    raise ArtifactError(_unknown(file, weights))


def _content(file: Path, opened: BinaryIO | None) -> Any:
    """Return what a file holds. Objects beside the tensors, such as a trainer's state, are there by name only."""
    try:
        return read_tensors(file, opened)
    except HoldsObjectsError:
        content = pickles.read_torch(file, opened)
        if is_cmfast_checkpoint(content):
            raise  # cmfast writes none
        return content


def _unknown(file: Path, weights: Mapping[str, Tensor]) -> str:
    if "time_embedding.linear_1.weight" in weights or "conv_in.weight" in weights:
        return (
            f"{file}: weights of a diffusers U-Net without its configuration; name the whole folder "
            "(model_index.json, scheduler, unet)"
        )
    if any(name.startswith(lerobot.UNET) for name in weights):
        return (
            f"{file}: weights of a lerobot policy without its configuration; name the whole folder ({lerobot.CONFIG})"
        )
    if any(name.endswith("emb_noise.weight") for name in weights):
        return f"{file}: a network of EDM2, which is not supported yet"
    some = ", ".join(shown(key) for key in sorted(weights)[:3])
    return f"{file}: {len(weights)} tensors of a network that is not known here ({some}, ...)"
