# SPDX-License-Identifier: MIT
"""Features that Frechet distances are taken in: pixels, or the penultimate layer of a small classifier.

`train_classifier.py` makes the classifier's file, `frechet.py` reads it. Inception features, which published FIDs
use, mean little on 28-pixel digits; these do not compare with published numbers, only with each other.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmfast.artifact import check_file
from cmfast.errors import ArtifactError
from cmfast.files import atomic_file

FORMAT = "cmfast-features/1"


class Pixels(nn.Module):
    """The image itself: [B, C, H, W] in [-1, 1] -> [B, C H W]."""

    def __init__(self, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.image = image
        self.num_features = image[0] * image[1] * image[2]

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The shape of a classifier, and what it was trained on."""

    data_set: str  # mnist or cifar10
    image: tuple[int, int, int]  # channels, height, width; the sides are multiples of 8
    classes: int
    width: int = 16  # channels of the first convolution
    features: int = 64  # of the penultimate layer
    test_accuracy: float = 0.0  # fraction


class Classifier(nn.Module):
    """A small convolutional classifier: [B, C, H, W] in [-1, 1] -> features [B, 64] -> logits [B, classes]."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config, self.image, self.num_features = config, config.image, config.features
        channels, height, width = config.image
        self.body = nn.Sequential(
            *_halve(channels, config.width), *_halve(config.width, 2 * config.width), *_halve(2 * config.width, 64)
        )
        self.penultimate = nn.Linear(64 * (height // 8) * (width // 8), config.features)
        self.head = nn.Linear(config.features, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, which is what a metric calls."""
        return self.penultimate(self.body(images).flatten(1)).relu()

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self(images))


def save_classifier(model: Classifier, config: ClassifierConfig, path: Path) -> None:
    """Write the weights as safetensors, the configuration in their metadata."""
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    head = {"format": FORMAT, **dataclasses.asdict(config)}
    with atomic_file(path) as temporary:
        save_file(weights, temporary, metadata={"cmfast": json.dumps(head)})


def load_features(name: str, image: tuple[int, int, int]) -> Pixels | Classifier:
    """Return the features called `name`: "pixels", or a file of `save_classifier` for images of that shape."""
    if name == "pixels":
        return Pixels(image)
    file = check_file(name)
    head, weights = _read(file)
    try:
        names = {field.name for field in dataclasses.fields(ClassifierConfig)}
        values = {key: tuple(value) if key == "image" else value for key, value in head.items() if key in names}
        config = ClassifierConfig(**values)
        model = Classifier(config)
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as err:
        raise ArtifactError(f"{file}: a damaged classifier: {' '.join(str(err).split())[:200]}") from None
    if config.image != image:
        raise ArtifactError(f"{file}: its features are of images {list(config.image)}, the model draws {list(image)}")
    return model.eval().requires_grad_(False)


def _halve(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            head = json.loads((opened.metadata() or {}).get("cmfast", "{}"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
    except (SafetensorError, ValueError) as err:
        raise ArtifactError(f"{file}: not a whole safetensors file: {err}") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ArtifactError(f"{file}: not features; make them: python benchmarks/train_classifier.py mnist --data DIR")
    return head, weights
