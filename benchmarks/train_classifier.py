# SPDX-License-Identifier: MIT
"""Train the small classifier whose penultimate layer `frechet.py` takes as features.

    python benchmarks/train_classifier.py mnist --data DIR

leaves benchmarks/features_mnist.safetensors and benchmarks/results/features_mnist.json: a minute or two on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click
import torch
from torch import Tensor

from cmfast.cli._run import run_command
from cmfast.errors import CmfastError
from cmfast.files import check_target, write_text
from cmfast.timing import provenance
from cmfast_train.data import Images, load_data, to_unit_range
from cmfast_train.presets import PRESETS
from cmfast_train.torchvision_cpu import torchvision_datasets
from features import Classifier, ClassifierConfig, save_classifier

HERE = Path(__file__).resolve().parent


@click.command("train_classifier.py")
@click.argument("data_set", type=click.Choice(["mnist", "cifar10"]))
@click.option("--data", type=click.Path(path_type=Path), envvar="CMFAST_DATA", required=True, help="Folder of images.")
@click.option("--epochs", type=int, default=3, show_default=True)
@click.option("--batch", type=int, default=128, show_default=True, help="Images an optimiser step.")
@click.option("--lr", type=float, default=2e-3, show_default=True, help="Of Adam at the start; it falls to 0.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Default: features_DATA_SET.safetensors here.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Default: results/features_DATA_SET.json.")
def command(
    data_set: str,
    data: Path,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Train a classifier of DATA_SET and write it with its test accuracy."""
    if epochs < 1 or batch < 1 or not lr > 0:
        raise CmfastError("--epochs, --batch and --lr must be greater than 0")
    out = check_target(out or HERE / f"features_{data_set}.safetensors")
    json_file = check_target(json_file or HERE / "results" / f"features_{data_set}.json")
    images = load_data(PRESETS[data_set], data)
    test_images, test_labels = test_set(data_set, data)
    assert isinstance(images, Images)
    config = ClassifierConfig(data_set=data_set, image=tuple(images.images.shape[1:]), classes=images.classes)
    start = time.perf_counter()
    model = train(config, images, epochs, batch, lr, seed)
    seconds = time.perf_counter() - start
    config = dataclasses.replace(config, test_accuracy=accuracy(model, test_images, test_labels))
    save_classifier(model, config, out)
    record = {
        "what": "classifier",
        **provenance(),
        "options": {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed},
        **dataclasses.asdict(config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "file": out.name,
        "file_bytes": out.stat().st_size,
        "train_images": len(images),
        "test_images": len(test_images),
        "train_s": round(seconds, 1),
    }
    write_text(json_file, json.dumps(record, indent=1) + "\n")
    click.echo(f"{out}: {config.test_accuracy:.2%} of {len(test_images):,} test images, trained in {seconds:.0f} s")
    click.echo(f"next: python benchmarks/frechet.py MODEL --data-set {data_set} --data {data} --features {out}")


def train(config: ClassifierConfig, data: Images, epochs: int, batch: int, lr: float, seed: int) -> Classifier:
    """Return the classifier after `epochs` passes over the data: Adam, cross entropy, learning rate falling to 0."""
    torch.manual_seed(seed)
    model = Classifier(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(data))
        losses = []
        for indices in order[: len(data) // batch * batch].split(batch):
            images, labels = to_unit_range(data.images[indices]), data.labels[indices]
            loss = torch.nn.functional.cross_entropy(model.logits(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        click.echo(f"epoch {epoch + 1} of {epochs}: loss {torch.stack(losses).mean():.4f}", err=True)
    return model.eval()


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of uint8 images [N, C, H, W] whose label [N] the model gives."""
    with torch.inference_mode():
        parts = [model.logits(to_unit_range(part)).argmax(1) for part in images.split(500)]
    return float((torch.cat(parts) == labels).double().mean())


def test_set(data_set: str, root: Path) -> tuple[Tensor, Tensor]:
    """Return the test images, uint8 [N, C, 32, 32], and labels [N]; padded as cmfast_train.data pads them."""
    datasets = torchvision_datasets()
    try:
        if data_set == "mnist":
            raw = datasets.MNIST(str(root), train=False)
            images = torch.nn.functional.pad(raw.data, (2, 2, 2, 2))[:, None]
        else:
            raw = datasets.CIFAR10(str(root), train=False)
            images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
    except (RuntimeError, OSError, EOFError) as err:
        raise CmfastError(f"the test images of {data_set} were not found in {root}: {err}") from None
    return images, torch.as_tensor(raw.targets).long()


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
