# SPDX-License-Identifier: MIT
"""Features that distances between images are taken in: pixels, a small classifier's, or Inception's.

    load_features("cifar10", (3, 32, 32))          a classifier that is shipped: SHIPPED
    load_features("own.safetensors", (3, 32, 32))  one that benchmarks/train_classifier.py trained
    load_features("pt_inception-2015-12-05-6726825d.pth", (3, 64, 64))

Only Inception's distances compare with published FIDs, and its weights are the user's file: nothing is downloaded. On
digits they mean little; the others compare with each other only. `cmfast_train.evaluation.metrics` computes with what
comes out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cmfast.errors import ArtifactError, CmfastError, MissingDependency, one_line
from cmfast.files import atomic_file
from cmfast.formats.manifest import check_file
from cmfast_train.backends.torch_cuda import arithmetic
from cmfast_train.border import reading
from cmfast_train.checkpoint import safe_load
from cmfast_train.data.images import MNIST_KINDS, MNIST_SIDES, to_unit_range
from cmfast_train.torchvision_cpu import torchvision_datasets

FORMAT = "cmfast-features/1"
FOLDER = Path(__file__).resolve().parent / "features_data"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))  # cifar10, fashion-mnist, ...
INCEPTION_SUFFIXES = (".pth", ".pt")
CHUNK = 500  # images at a time; of Inception, which enlarges them, INCEPTION_CHUNK
INCEPTION_CHUNK = 50


class Features(Protocol):
    """What all features have. They are modules: [B, C, H, W] float32 in [-1, 1] -> [B, num_features]."""

    image: tuple[int, int, int]  # channels, height, width of the images that they take
    num_features: int

    @property
    def head(self) -> nn.Module | None:
        """Features -> logits; None: they are no classifier's."""

    def __call__(self, images: Tensor) -> Tensor: ...


def load_features(name: str, image: tuple[int, int, int]) -> Pixels | Classifier | Inception:
    """Return the features called `name`, for images [C, H, W]: "pixels", one of SHIPPED, or a file.

    A file is a classifier's (.safetensors of `save_classifier`) or Inception's weights (.pth, see `Inception`).
    """
    if name == "pixels":
        return Pixels(image)
    file = check_file(shipped(name) if name in SHIPPED else name)
    features = Inception(file, image) if file.suffix in INCEPTION_SUFFIXES else _classifier(file, image)
    return features.eval().requires_grad_(False)


def default_features(data_set: str) -> str:
    """Return the name of the features that suit a data set: pixels of digits, else its classifier that is shipped."""
    if data_set == "digits":
        return "pixels"
    if data_set not in SHIPPED:
        raise CmfastError(
            f"no features are shipped for {data_set}; pass --features: pixels, {', '.join(SHIPPED)}, a classifier "
            "of benchmarks/train_classifier.py (.safetensors), or Inception's weights (.pth)"
        )
    return data_set


def shipped(name: str) -> Path:
    """Return where the classifier of a data set is in the package."""
    return FOLDER / f"{name}.safetensors"


def extract(features: Features, images: Iterable[Tensor], device: str = "cpu") -> Iterator[Tensor]:
    """Yield the features, float32 [b, D] on the CPU, of uint8 images [B, C, H, W], a few images at a time."""
    size = INCEPTION_CHUNK if isinstance(features, Inception) else CHUNK
    assert isinstance(features, nn.Module)
    features.to(device)
    with torch.inference_mode():
        for batch in images:
            for part in batch.split(size):
                with arithmetic(tf32=False, benchmark=None):  # a score must not depend on the card
                    found = features(to_unit_range(part.to(device))).float().cpu()
                yield found


def features_record(features: Pixels | Classifier | Inception, name: str) -> dict[str, Any]:
    """Return what a record says about the features."""
    if isinstance(features, Pixels):
        return {"name": "pixels", "dimensions": features.num_features}
    file = shipped(name) if name in SHIPPED else Path(name)
    record: dict[str, Any] = {"name": name if name in SHIPPED else file.name, "dimensions": features.num_features}
    record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    if isinstance(features, Classifier):
        record["test_accuracy"] = features.config.test_accuracy
    return record


class Pixels(nn.Module):
    """The image itself: [B, C, H, W] in [-1, 1] -> [B, C H W]."""

    head = None

    def __init__(self, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.image = image
        self.num_features = image[0] * image[1] * image[2]

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Inception(nn.Module):
    """The Inception network of published FIDs: [B, C, H, W] in [-1, 1] -> [B, 2048]. A grey image is repeated to three.

    torch-fidelity's network, which resizes as the first one did in TensorFlow: 8-bit images to 299 x 299.

    Args:
        file: pt_inception-2015-12-05-6726825d.pth, or torch-fidelity's weights-inception-2015-12-05-6726825d.pth
    """

    num_features = 2048

    def __init__(self, file: Path, image: tuple[int, int, int]) -> None:
        super().__init__()
        torchvision_datasets()  # torch-fidelity imports torchvision, which needs this beside a CPU build of torch
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as err:
            if (err.name or "").split(".")[0] != "torch_fidelity":
                raise
            raise MissingDependency("features of Inception", "torch-fidelity", "fid") from None
        # It would unpickle the file; it gets the tensors that are left of it when nothing is executed.
        tensors = io.BytesIO()
        torch.save(safe_load(file), tensors)
        tensors.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=tensors)
        except (RuntimeError, TypeError, AttributeError) as err:
            raise ArtifactError(f"{file}: not the weights of FID's Inception network: {one_line(err, 150)}") from None
        self.image = image
        self.head = nn.Linear(2048, self.network.fc.out_features, bias=False)  # "unbiased" logits, of the score
        self.head.weight = self.network.fc.weight

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        features: Tensor = self.network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)[0]
        return features


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The shape of a classifier, and what it was trained on."""

    data_set: str  # one of SHIPPED
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
        self.border = 0  # pixels of black to add around the images
        channels, height, width = config.image
        self.body = nn.Sequential(
            *_halve(channels, config.width), *_halve(config.width, 2 * config.width), *_halve(2 * config.width, 64)
        )
        self.penultimate = nn.Linear(64 * (height // 8) * (width // 8), config.features)
        self.head = nn.Linear(config.features, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        if self.border:
            images = nn.functional.pad(images, (self.border,) * 4, value=-1.0)
        features: Tensor = self.penultimate(self.body(images).flatten(1)).relu()
        return features

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self(images))
        return logits


def save_classifier(model: Classifier, config: ClassifierConfig, path: Path) -> None:
    """Write the weights as safetensors, the configuration in their metadata."""
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    head = {"format": FORMAT, **dataclasses.asdict(config)}
    with atomic_file(path) as temporary:
        save_file(weights, temporary, metadata={"cmfast": json.dumps(head)})


def _classifier(file: Path, image: tuple[int, int, int]) -> Classifier:
    head, weights = _read(file)
    with reading(file, "a damaged classifier"):
        names = {field.name for field in dataclasses.fields(ClassifierConfig)}
        values: dict[str, Any] = {
            key: tuple(value) if key == "image" else value for key, value in head.items() if key in names
        }
        config = ClassifierConfig(**values)
        with torch.device("meta"):  # no memory for what the head announces: the weights bring theirs
            model = Classifier(config)
        model.load_state_dict(weights, assign=True)
        if any(value.is_floating_point() and value.dtype != torch.float32 for value in weights.values()):
            raise ValueError("its weights are not float32")
    plain, bordered = ((config.image[0], *size) for size in MNIST_SIDES)
    without = config.data_set in MNIST_KINDS and (config.image, image) == (bordered, plain)
    if config.image != image and not without:
        raise CmfastError(f"{file}: its features are of images {list(config.image)}, these are {list(image)}")
    model.image, model.border = image, (config.image[1] - image[1]) // 2
    return model


def _halve(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import safe_open

    with reading(file, "not a whole safetensors file"), safe_open(file, framework="pt") as opened:
        head = json.loads((opened.metadata() or {}).get("cmfast", "{}"))
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ArtifactError(f"{file}: not features; make them: python benchmarks/train_classifier.py mnist --data DIR")
    return head, weights
