# SPDX-License-Identifier: MIT
"""Train the small classifier whose penultimate layer `cmfast-eval` takes as features.

    python benchmarks/train_classifier.py cifar10 --data DIR

leaves train/cmfast_train/evaluation/features_data/cifar10.safetensors, which the package ships, and
benchmarks/results/features_cifar10.json: some minutes on one core.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click
import torch
from torch import Tensor

from cmfast.bench.timing import provenance
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError
from cmfast.files import check_outputs, check_target, write_text
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.images import MNIST_KINDS, FolderImages, Images, load_data, to_unit_range
from cmfast_train.evaluation.features import Classifier, ClassifierConfig, save_classifier, shipped
from cmfast_train.torchvision_cpu import torchvision_datasets

HERE = Path(__file__).resolve().parent
DATA_SETS = {  # epochs, width, learning rate
    "mnist": (3, 16, 2e-3),
    "fashion-mnist": (6, 16, 2e-3),
    "cifar10": (8, 24, 3e-3),
    "flowers32": (20, 16, 2e-3),
}
MOST_BYTES = 1_000_000  # of a file that is shipped
HELD_OUT = 5  # flowers32 has no test set: one image of so many is held out, by a permutation of seed 0


@click.command("train_classifier.py")
@click.argument("data_set", type=click.Choice(list(DATA_SETS)))
@click.option("--data", type=click.Path(path_type=Path), envvar="CMFAST_DATA", required=True, help="Folder of images.")
@click.option("--epochs", type=int, help="Passes over the data; default: by DATA_SET, 3 to 20.")
@click.option("--width", type=int, help="Channels of the first convolution; default: 16, 24 for cifar10.")
@click.option("--batch", type=int, default=128, show_default=True, help="Images an optimiser step.")
@click.option("--lr", type=float, help="Largest of Adam; default: 0.002, 0.003 for cifar10.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Default: where the package ships it.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Default: results/features_DATA_SET.json.")
def command(
    data_set: str,
    data: Path,
    epochs: int | None,
    width: int | None,
    batch: int,
    lr: float | None,
    seed: int,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Train a classifier of DATA_SET and write it with its test accuracy."""
    of_set = DATA_SETS[data_set]
    epochs, width, lr = (
        given if given is not None else own for given, own in zip((epochs, width, lr), of_set, strict=True)
    )
    if epochs < 1 or width < 1 or batch < 1 or not lr > 0:
        raise CmfastError("--epochs, --width, --batch and --lr must be greater than 0")
    out = check_target(out or shipped(data_set))
    json_file = check_target(json_file or HERE / "results" / f"features_{data_set}.json")
    check_outputs({"-o": out, "--json": json_file})  # different files
    images, (test_images, test_labels) = data_of(data_set, data)
    image = tuple(images.images.shape[1:])
    config = ClassifierConfig(data_set=data_set, image=image, classes=images.classes, width=width)
    mirror = PRESETS[data_set].flip
    start = time.perf_counter()
    model = train(config, images, epochs, batch, lr, seed, mirror)
    seconds = time.perf_counter() - start
    config = dataclasses.replace(config, test_accuracy=accuracy(model, test_images, test_labels))
    run_on = provenance()  # before the file is there: the working tree is still clean
    save_classifier(model, config, out)
    size = out.stat().st_size
    record = {
        "what": "classifier",
        **run_on,
        "options": {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed, "mirror": mirror},
        **dataclasses.asdict(config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "file": out.name,
        "file_bytes": size,
        "train_images": len(images),
        "test_images": len(test_images),
        "train_s": round(seconds, 1),
    }
    write_text(json_file, json.dumps(record, indent=1) + "\n")
    click.echo(f"{out}: {config.test_accuracy:.2%} of {len(test_images):,} test images, trained in {seconds:.0f} s")
    if size >= MOST_BYTES:
        click.echo(f"{size:,} bytes are too many to ship; the limit is {MOST_BYTES:,}", err=True)
    click.echo(f"next: cmfast-eval MODEL --data-set {data_set} --data {data} --features {out}")


def train(
    config: ClassifierConfig, data: Images, epochs: int, batch: int, lr: float, seed: int, mirror: bool
) -> Classifier:
    """Return the classifier after `epochs` passes over the data: Adam, cross entropy, one cycle of learning rates."""
    torch.manual_seed(seed)
    model = Classifier(config).train().to(memory_format=torch.channels_last)  # half as fast again on a CPU
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(data))
        losses = []
        for indices in order[: len(data) // batch * batch].split(batch):
            images, labels = to_unit_range(data.images[indices]), data.labels[indices]
            if mirror:
                images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
            logits = model.logits(images.contiguous(memory_format=torch.channels_last))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        click.echo(f"epoch {epoch + 1} of {epochs}: loss {torch.stack(losses).mean():.4f}", err=True)
    return model.eval().to(memory_format=torch.contiguous_format)


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of uint8 images [N, C, H, W] whose label [N] the model gives."""
    with torch.inference_mode():
        parts = [model.logits(to_unit_range(part)).argmax(1) for part in images.split(500)]
    return float((torch.cat(parts) == labels).double().mean())


def data_of(data_set: str, root: Path) -> tuple[Images, tuple[Tensor, Tensor]]:
    """Return the images to train on, and those to test on, uint8 [N, C, 32, 32], with their labels [N]."""
    preset = PRESETS[data_set]
    images = load_data(dataclasses.replace(preset, image_size=32) if data_set in MNIST_KINDS else preset, root)
    if isinstance(images, Images):
        return images, test_set(data_set, root)
    return held_out(images)


def held_out(images: FolderImages) -> tuple[Images, tuple[Tensor, Tensor]]:
    """Return four fifths of the images to train on, and a fifth, always the same, to test on."""
    got = images.__getitems__(list(range(len(images))))
    if isinstance(got, str):
        raise CmfastError(got)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, training = order[: len(images) // HELD_OUT], order[len(images) // HELD_OUT :]
    return Images(got[0][training], got[1][training], images.classes), (got[0][test], got[1][test])


def test_set(data_set: str, root: Path) -> tuple[Tensor, Tensor]:
    """Return the test images, uint8 [N, C, 32, 32], and labels [N]; padded as cmfast_train.data.images pads them."""
    datasets = torchvision_datasets()
    kinds = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    try:
        raw = kinds[data_set](str(root), train=False)
    except (RuntimeError, OSError, EOFError) as err:
        raise CmfastError(f"the test images of {data_set} were not found in {root}: {err}") from None
    if data_set == "cifar10":
        images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
    else:
        images = torch.nn.functional.pad(raw.data, (2, 2, 2, 2))[:, None]
    return images, torch.as_tensor(raw.targets).long()


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
