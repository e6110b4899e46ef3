# SPDX-License-Identifier: MIT
"""How far samples are from data, on features [N, D] of both: what `cmfast-eval` prints.

    frechet_distance   of two Gaussians fitted to the features (FID where they are Inception's): arXiv:1706.08500
    kernel_distance    squared maximum mean discrepancy, unbiased (KID): arXiv:1801.01401
    inception_score    exp of the mean information that an image gives about its class: arXiv:1606.03498
    precision_recall   samples near some data, data near some sample: arXiv:1904.06991

The first three are torchmetrics', in float64, given features instead of images. It has no precision and recall of this
kind. All depend on the number of samples, the Frechet distance most: fewer samples mean a larger distance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.errors import CmfastError
from cmfast_train.torchvision_cpu import torchvision_datasets

KID_SUBSETS, KID_SUBSET = 100, 1000  # as published
NEIGHBOUR = 3  # precision and recall: which neighbour's distance is the radius; as published
PR_IMAGES = 10_000  # precision and recall: at most so many of each, for all pairs are compared
IS_SPLITS = 10  # as published
LEAST = {"fd": 2, "kid": 4, "pr": NEIGHBOUR + 1, "is": IS_SPLITS}  # images that a metric needs, of either side
ROWS = 500  # of a matrix of distances, at a time


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features [N, D] and [M, D]."""
    metric = frechet_metric(real.shape[1])
    metric.update(real.double(), real=True)
    return add_fake(metric, fake)


def frechet_metric(num_features: int) -> Any:
    """Return torchmetrics' metric on features: `update(.., real=True)` adds data, `add_fake` gives a distance."""
    torchvision_datasets()  # torchmetrics.image imports torchvision, which needs this beside a CPU build of torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(_given(num_features), reset_real_features=False, normalize=True).set_dtype(
        torch.float64
    )


def add_fake(metric: Any, fake: Tensor) -> float:
    """Return the distance of features [M, D] to what the metric has of the data, which it keeps."""
    metric.reset()  # of the samples only
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def all_are_data(metric: Any) -> None:
    """Count what was given as samples as data too: the sums over both halves of the data are those over the whole."""
    for name in ("features_sum", "features_cov_sum", "features_num_samples"):
        setattr(metric, f"real_{name}", getattr(metric, f"real_{name}") + getattr(metric, f"fake_{name}"))
    metric.reset()


def kernel_distance(real: Tensor, fake: Tensor, seed: int) -> tuple[float, float]:
    """Return mean and standard deviation over random subsets, which the seed draws; the kernel is (x y / D + 1)^3."""
    torchvision_datasets()
    from torchmetrics.image.kid import KernelInceptionDistance

    with _memory_is_known():
        metric = KernelInceptionDistance(_given(real.shape[1]), subsets=KID_SUBSETS, subset_size=kid_subset(real, fake))
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return _seeded(metric.compute, seed)


def kid_subset(real: Tensor, fake: Tensor) -> int:
    """Return the size of a subset: 1,000, or half of the smaller set, or the subsets would all be alike."""
    return min(KID_SUBSET, min(len(real), len(fake)) // 2)


def inception_score(logits: Tensor, seed: int) -> tuple[float, float]:
    """Return mean and standard deviation over ten random splits of logits [N, classes]."""
    torchvision_datasets()
    from torchmetrics.image.inception import InceptionScore

    with _memory_is_known():
        metric = InceptionScore(_given(logits.shape[1]), splits=IS_SPLITS)
    metric.set_dtype(torch.float64)
    metric.update(logits.double())
    return _seeded(metric.compute, seed)


def precision_recall(real: Tensor, fake: Tensor, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """Return the fractions of samples in the manifold of the data, and of data in that of the samples.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour.
    How large they are depends on how many points there are, so as many of each count (arXiv:1904.06991, eq. 1 and 2).
    """
    n = min(len(real), len(fake), PR_IMAGES)
    centre = real[:n].double().mean(0)  # nearer the origin distances are rounded less
    real, fake = real[:n].double() - centre, fake[:n].double() - centre
    # Distances come from a product of matrices: where one should be 0, it is a rounding of the lengths.
    zero = 1e-6 * float(max(real.norm(dim=1).max(), fake.norm(dim=1).max()))
    real_radii, fake_radii = (_radii(points, neighbour) + zero for points in (real, fake))
    in_real = [(part <= real_radii).any(1) for part in _distances(fake, real)]
    in_fake = [(part <= fake_radii).any(1) for part in _distances(real, fake)]
    return float(torch.cat(in_real).double().mean()), float(torch.cat(in_fake).double().mean())


def check_numbers(metrics: tuple[str, ...], real: int, fake: int) -> None:
    """Raise unless there are as many images as the metrics need."""
    for name in metrics:
        if min(real, fake) < LEAST[name]:
            raise CmfastError(
                f"the metric {name} needs at least {LEAST[name]} images of the data and {LEAST[name]} samples, "
                f"there are {real} and {fake}"
            )


def _radii(points: Tensor, neighbour: int) -> Tensor:
    """Return each point's distance to its k-th nearest neighbour, [N]; the nearest of all is the point itself."""
    return torch.cat([part.kthvalue(neighbour + 1, dim=1).values for part in _distances(points, points)])


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield the Euclidean distances [<= ROWS, M] of the points to the others."""
    for rows in points.split(ROWS):
        yield torch.cdist(rows, others)


def _given(num_features: int) -> nn.Module:
    """Return the module that takes features for the features of an image."""
    module = nn.Identity()
    module.num_features = num_features  # type: ignore[assignment]
    return module


@contextmanager
def _memory_is_known() -> Iterator[None]:
    """Leave out torchmetrics' warning that features are kept in memory, where they are already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        yield


def _seeded(compute: Callable[[], tuple[Tensor, Tensor]], seed: int) -> tuple[float, float]:
    """Return mean and standard deviation; torchmetrics draws from torch's own generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = compute()
    return float(mean), float(std)
