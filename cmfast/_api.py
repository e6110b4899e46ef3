# SPDX-License-Identifier: MIT
"""The public names of cmfast, imported; the package itself does that when one of them is used for the first time."""

from cmfast.errors import ArtifactError, CheckFailed, CmfastError, EngineError, MissingDependency
from cmfast.formats.manifest import Manifest, read_manifest
from cmfast.images import save_images
from cmfast.model import Model, load
from cmfast.noise import gaussian
from cmfast.sampling import sample
from cmfast.schedule import karras_sigmas
from cmfast.spec import ModelSpec

__all__ = [
    "ArtifactError",
    "CheckFailed",
    "CmfastError",
    "EngineError",
    "Manifest",
    "MissingDependency",
    "Model",
    "ModelSpec",
    "gaussian",
    "karras_sigmas",
    "load",
    "read_manifest",
    "sample",
    "save_images",
]
