# SPDX-License-Identifier: MIT
"""LPIPS (Zhang et al. 2018, arXiv:1801.03924) as a training loss, by torchmetrics, which has the small linear heads.

The network below them is torchvision's, from a file of the user: nothing is downloaded. Images narrower than 256
pixels are enlarged to 224, as in OpenAI's consistency models (their networks also use average pooling, torchmetrics'
max pooling as in the LPIPS paper).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError, MissingDependency
from cmfast.formats.manifest import check_file
from cmfast_train.checkpoint import read_tensors

# LPIPS network: torchvision's name of it, the file that torchvision publishes
NETS = {
    "vgg": ("vgg16", "vgg16-397923af.pth"),
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}
NARROW, ENLARGED = 256, 224  # pixels

Distance = Callable[[Tensor, Tensor], Tensor]


def load_lpips(net: str, weights: Path) -> Distance:
    """Return LPIPS as a function of two batches of images, [B, C, H, W] in [-1, 1], C 1 or 3, that gives float32 [B].

    The network follows the images to their device. Gradients flow to the images, never to the network. It always
    computes in float32: its 1e-8 under a root is zero in half precision, where the gradient of equal features is not
    finite.

    Args:
        net: vgg, alex or squeeze.
        weights: torchvision's state dict of that network (NETS), with or without the classifier.

    Raises:
        CmfastError: there is no such network, or, in a call, the images have another shape.
        ArtifactError: the file does not hold the weights of that network.
        MissingDependency: torchmetrics or torchvision is not installed.
    """
    if net not in NETS:
        raise CmfastError(f"the network of LPIPS must be one of {', '.join(NETS)}, got {net!r}")
    network = _network(net, weights)

    def lpips(a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3):
            raise CmfastError(f"LPIPS compares images [B, 1 or 3, H, W], got {list(a.shape)} and {list(b.shape)}")
        with torch.autocast(a.device.type, enabled=False):
            distance: Tensor = network.to(a.device)(_prepare(a), _prepare(b))
        return distance.flatten()

    return lpips


def _prepare(images: Tensor) -> Tensor:
    """Return images as the network takes them: float32 [B, 3, H, W], not narrower than 224 pixels."""
    images = images.float().expand(-1, 3, -1, -1)
    if images.shape[3] < NARROW:
        images = torch.nn.functional.interpolate(images, (ENLARGED, ENLARGED), mode="bilinear", align_corners=False)
    return images


def _network(net: str, file: Path) -> torch.nn.Module:
    """Return torchmetrics' LPIPS above the weights in `file`, frozen."""
    from cmfast_train.torchvision_cpu import torchvision_datasets

    try:
        torchvision_datasets()  # for its side effect: torchvision can be imported
        from torchmetrics.functional.image import lpips
    except (MissingDependency, ModuleNotFoundError):
        raise MissingDependency("LPIPS", "torchmetrics and torchvision", "train") from None
    # torchmetrics' public class lets torchvision download. `pnet_rand` does not, and on meta it draws no weights.
    # No dropout before the heads: the loss would depend on training mode.
    with torch.device("meta"):
        network = lpips._LPIPS(net=net, pretrained=False, pnet_rand=True, use_dropout=False)  # type: ignore[arg-type]
    network.scaling_layer = lpips.ScalingLayer()
    network.net.load_state_dict(_features(file, net, network.net.state_dict()), assign=True)
    heads = read_tensors(Path(lpips.__file__).parent / "lpips_models" / f"{net}.pth")
    for i, head in enumerate(network.lins):
        head.load_state_dict({"model.0.weight": heads[f"lin{i}.model.1.weight"].clone()}, assign=True)
    network.eval().requires_grad_(False)
    return network


def _features(file: Path, net: str, need: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of torchvision's weights in `file` that LPIPS's network needs, under its own names, float32.

    torchvision's features.5.bias is slice2.5.bias there, features.3.squeeze.bias is slices.1.3.squeeze.bias.
    """
    found = read_tensors(check_file(file))
    title, published = NETS[net]
    taken = {}
    for name, like in need.items():
        source = re.sub(r"^slices?\.?\d+\.", "features.", name)
        tensor = found.get(source)
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape or not tensor.is_floating_point():
            got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else "missing"
            raise ArtifactError(
                f"{file} does not hold the weights of torchvision's {title} ({published}): {source} is {got}, "
                f"expected float {list(like.shape)}"
            )
        if not tensor.isfinite().all():
            raise ArtifactError(f"{file}: {source} is not finite")
        taken[name] = tensor.to(torch.float32, copy=True)  # a copy, for the file may be mapped
    return taken
