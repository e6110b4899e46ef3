# SPDX-License-Identifier: MIT
"""Features: pixels, the classifiers that are shipped, and Inception's real network with random weights."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError, MissingDependency
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.images import load_data, to_unit_range
from cmfast_train.evaluation.features import (
    CHUNK,
    SHIPPED,
    Classifier,
    ClassifierConfig,
    Pixels,
    default_features,
    extract,
    features_record,
    load_features,
    save_classifier,
    shipped,
)
from cmfast_train.torchvision_cpu import torchvision_datasets
from helpers import BENCHMARKS

CONFIG = ClassifierConfig(data_set="mnist", image=(1, 16, 16), classes=3, width=4, features=8, test_accuracy=0.75)


def bytes_of(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# Pixels.


def test_pixels_of_digits_are_the_digits() -> None:
    digits = load_data(PRESETS["digits"], None)
    images = digits.__getitems__([0, 5, 1796])[0]
    assert isinstance(images, Tensor)
    features = load_features("pixels", (1, 8, 8))
    assert (features.num_features, features.head) == (64, None)
    (got,) = extract(features, [images])
    assert torch.equal(got, (images.float() / 127.5 - 1).reshape(3, 64))
    assert (got.min(), got.max()) == (-1, 1)


def test_many_images_go_through_in_chunks_and_come_out_in_order() -> None:
    images = bytes_of(2 * CHUNK + 3, 1, 8, 8)
    parts = list(extract(Pixels((1, 8, 8)), images.split(CHUNK + 1)))
    assert max(map(len, parts)) == CHUNK
    assert torch.equal(torch.cat(parts), to_unit_range(images).flatten(1))


# Classifiers.


def test_a_classifier_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    model = Classifier(CONFIG).eval()
    save_classifier(model, CONFIG, tmp_path / "own.safetensors")
    again = load_features(str(tmp_path / "own.safetensors"), (1, 16, 16))
    assert isinstance(again, Classifier)
    assert again.config == CONFIG
    assert not again.training
    images = to_unit_range(bytes_of(5, 1, 16, 16))
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
        assert torch.equal(again.head(again(images)), model.logits(images))
    record = features_record(again, str(tmp_path / "own.safetensors"))
    assert (record["name"], record["dimensions"], record["test_accuracy"]) == ("own.safetensors", 8, 0.75)
    assert len(record["sha256"]) == 64


@pytest.mark.parametrize("name", SHIPPED)
def test_a_classifier_that_is_shipped_is_small_and_of_its_data_set(name: str) -> None:
    config = PRESETS[name]
    features = load_features(name, (config.channels, *config.image_sides))
    assert isinstance(features, Classifier)
    assert features.config.data_set == name
    least = {"mnist": 0.99, "fashion-mnist": 0.91, "cifar10": 0.75, "flowers32": 0.55}
    assert features.config.test_accuracy > least[name]
    assert shipped(name).stat().st_size < 1_000_000
    assert default_features(name) == name
    with pytest.raises(CmfastError, match=r"its features are of images \[\d, 32, 32\], these are \[2, 8, 8\]"):
        load_features(name, (2, 8, 8))


def test_mnist_has_the_same_features_with_and_without_its_black_border() -> None:
    plain, padded = load_features("mnist", (1, 28, 28)), load_features("mnist", (1, 32, 32))
    images = to_unit_range(bytes_of(5, 1, 28, 28))
    found = padded(torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0))
    assert plain.image == (1, 28, 28)
    assert found.abs().max() > 0.1
    assert torch.equal(plain(images), found)
    for name, image in (("mnist", (1, 30, 30)), ("mnist", (3, 28, 28)), ("cifar10", (3, 28, 28))):
        with pytest.raises(CmfastError, match="its features are of images"):
            load_features(name, image)


def test_a_classifier_is_trained_and_tested_on_images_of_one_size(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 2, 28, 28) + bytes(2 * 28 * 28))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 2) + bytes([9, 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from train_classifier import data_of
    training, (test, _) = data_of("mnist", tmp_path)
    assert training.images.shape == test.shape == (2, 1, 32, 32)


def test_the_accuracy_that_is_shipped_is_that_of_its_record() -> None:
    results = BENCHMARKS / "results"
    if not results.exists():
        pytest.skip("needs the repository")
    for name in SHIPPED:
        record = json.loads((results / f"features_{name}.json").read_text())
        features = load_features(name, tuple(record["image"]))
        assert isinstance(features, Classifier)
        own = json.loads(json.dumps(dataclasses.asdict(features.config)))
        assert own == {key: record[key] for key in own}


def test_four_data_sets_have_features_by_default_and_the_others_are_told_what_to_say() -> None:
    assert default_features("digits") == "pixels"
    assert {"mnist", "fashion-mnist", "cifar10", "flowers32"} <= set(SHIPPED)
    with pytest.raises(CmfastError, match=r"no features are shipped for folder; pass --features: pixels, cifar10, "):
        default_features("folder")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", "not a whole safetensors file"),
        ("foreign", "not features; make them: python benchmarks/train_classifier.py mnist --data DIR"),
        ("weights", "a damaged classifier: Error"),
        ("head", "a damaged classifier: "),
        ("none", "no such file"),
    ],
)
def test_a_damaged_file_is_said_in_one_line(damage: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    model = Classifier(CONFIG)
    save_classifier(model, CONFIG, path)
    weights = model.state_dict()
    head = {"format": "cmfast-features/1", **dataclasses.asdict(CONFIG)}
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "foreign":
            save_file(weights, path)
        case "weights":
            del weights["head.bias"]
            save_file(weights, path, metadata={"cmfast": json.dumps(head)})
        case "head":
            save_file(weights, path, metadata={"cmfast": json.dumps(head | {"image": 3})})
        case "none":
            path.unlink()
    with pytest.raises(ArtifactError, match=words) as caught:
        load_features(str(path), (1, 16, 16))
    assert "\n" not in str(caught.value)


# Inception: torch-fidelity's network.


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of random weights of the network, as the published file has the trained ones."""
    torchvision_datasets()
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Fresh(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined, misc]
        """The network as it is initialised; the base reads weights in its constructor."""

        def load_state_dict(self, *_: Any, **__: Any) -> None:
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Fresh("fresh", ["2048"], feature_extractor_weights_path=empty)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_gives_what_torch_fidelity_gives_and_its_head_the_logits_of_the_score(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    features = load_features(str(inception_file), (3, 32, 32))
    images = bytes_of(2, 3, 32, 32)
    (got,) = extract(features, [images])
    reference = FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], str(inception_file))
    with torch.inference_mode():
        want, logits = reference(images)
        assert torch.equal(got, want)
        assert features.head is not None
        torch.testing.assert_close(features.head(got), logits, rtol=1e-5, atol=1e-6)  # a product, summed otherwise
    assert got.shape == (2, 2048)
    assert got.std() > 0
    assert not torch.equal(got[0], got[1])
    record = features_record(features, str(inception_file))
    assert (record["name"], record["dimensions"]) == ("pt_inception-2015-12-05-6726825d.pth", 2048)
    assert "test_accuracy" not in record


def test_a_grey_image_is_seen_as_a_colour_image_without_colour(inception_file: Path) -> None:
    grey = bytes_of(1, 1, 16, 16)
    (got,) = extract(load_features(str(inception_file), (1, 16, 16)), [grey])
    (want,) = extract(load_features(str(inception_file), (3, 16, 16)), [grey.repeat(1, 3, 1, 1)])
    assert torch.equal(got, want)


def test_weights_of_another_network_or_with_code_in_them_are_refused(inception_file: Path, tmp_path: Path) -> None:
    weights = torch.load(inception_file, weights_only=True)
    del weights["Mixed_5b.branch1x1.conv.weight"]
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match="not the weights of FID's Inception network: ") as caught:
        load_features(str(tmp_path / "other.pth"), (3, 32, 32))
    assert "\n" not in str(caught.value)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ArtifactError, match="refused, nothing in it was run"):
        load_features(str(tmp_path / "evil.pth"), (3, 32, 32))
    assert not (tmp_path / "executed").exists()


def test_without_torch_fidelity_the_line_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "inception.pth").write_bytes(b"never opened")
    with pytest.raises(
        MissingDependency, match=r"needs torch-fidelity, which is not installed: pip install 'cmfast\[f"
    ):
        load_features(str(tmp_path / "inception.pth"), (3, 32, 32))
