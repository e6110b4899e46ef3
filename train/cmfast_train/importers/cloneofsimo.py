# SPDX-License-Identifier: MIT
"""Files of the first public implementation (cloneofsimo/consistency_models): ct_mnist.pth, ct_cifar10.pth, its kin.

The 70 names say which network it is, and the tensors how wide. They do not say the image size (the network is
convolutional throughout), nor whether it was trained with the original's halved output scaling or with a fork's that
was put right: that is known of files named as the original names them, and required from the user otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.importers.facts import Draft, Facts, difference, spec_of
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig, CloneofsimoUnet

FILES = {"ct_mnist.pth": (1, 32), "ct_cifar10.pth": (3, 32)}  # what its main.py writes: channels, image size (pixels)
IMAGE_SIZE = 32  # pixels, of both
CONVENTIONS: dict[str, Any] = {  # of its unet.py and main.py, apart from what forks put right
    "renoise": "sqrt",
    "clip": False,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "grid": 150,  # it grows by epoch; this is the last one's
}
LEVELS = {2: (80.0, 2.0), 5: (80.0, 40.0, 20.0, 10.0, 5.0)}  # what main.py samples with, data units


def matches(weights: Mapping[str, Tensor]) -> bool:
    """Whether most of the tensors that the network has are there, by name."""
    names = _shapes(CloneofsimoConfig(image_size=IMAGE_SIZE)).keys()
    return len(names & weights.keys()) > len(names) / 2


def draft(weights: Mapping[str, Tensor], facts: Facts, source: str, file: Path) -> Draft:
    """Read what the tensors say, and take the rest from the file's name, `source` or what was given."""
    for name in ("qkv", "head_channels"):
        if (said := getattr(facts.given, name)) is not None:
            raise CmfastError(f"--set {name}={said}: {file} holds a network without attention; leave it out")
    width, channels = _size(weights, file)
    facts.fixed("network", f"the first public implementation's U-Net, width {width}, image channels {channels}")
    facts.fixed("parameters", sum(w.numel() for w in weights.values()))
    facts.fixed("classes", 0)

    named = FILES.get(file.name, (None,))[0] == channels
    if named:
        size = facts.usual("image_size", FILES[file.name][1], "the file's name")
    else:
        size = facts.required("image_size", IMAGE_SIZE)
    usual = CONVENTIONS | ({"scaling": "cloneofsimo", "c_noise": "raw"} if source or named else {})
    by = f", by {'--source cloneofsimo' if source else 'the name of the file'}" if source or named else ""
    network = None if size is None else CloneofsimoConfig(image_size=size, channels=channels, width=width)
    image = None if network is None else network.image_shape
    spec = spec_of(facts, image, 0, usual, f"the first public implementation{by}", LEVELS)
    by_source = {"scaling", "c_noise"}  # what --source cloneofsimo says
    rest = [f"--set {name}={example}" for name, example in facts.missing.items() if name not in by_source]
    return Draft(
        format="cloneofsimo",
        what="the network of the first public implementation (cloneofsimo/consistency_models)",
        facts=facts,
        network=network,
        spec=spec,
        source={"format": "cloneofsimo"},
        weights=lambda: {name: tensor.float().contiguous() for name, tensor in weights.items()},
        hint=" ".join(["--source cloneofsimo", *rest]) if by_source & facts.missing.keys() else "",
    )


def _size(weights: Mapping[str, Tensor], file: Path) -> tuple[int, int]:
    """Return (width, channels), from the first tensor; ArtifactError unless every name and shape then fits."""
    first = weights.get("down.0.weight")
    if first is None or first.ndim != 4:
        raise ArtifactError(f"{file}: named as the first public implementation's network, but without a down.0.weight")
    width, channels = first.shape[:2]
    try:
        need = _shapes(CloneofsimoConfig(image_size=IMAGE_SIZE, channels=channels, width=width))
    except CmfastError as err:
        raise ArtifactError(f"{file}: its down.0.weight is {list(first.shape)}: {err}") from None
    if wrong := difference(need, {name: tensor.shape for name, tensor in weights.items()}):
        raise ArtifactError(
            f"{file}: not the first public implementation's network: {wrong} for down.0.weight {list(first.shape)}"
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ArtifactError(f"{file}: {name} is {tensor.dtype}, expected floating-point numbers")
    return width, channels


def _shapes(config: CloneofsimoConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in CloneofsimoUnet(config).state_dict().items()}
