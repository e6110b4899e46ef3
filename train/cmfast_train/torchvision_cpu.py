# SPDX-License-Identifier: MIT
"""Import torchvision beside a CPU build of torch.

Only CUDA builds of torchvision are published on the default index. Beside a CPU torch its native library cannot
load, and the import fails on operators that cmfast does not call ("operator torchvision::nms does not exist").
Declaring their names first makes datasets and transforms work. Remove this when `import torchvision` works there.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from cmfast.errors import MissingDependency

_declared: list[torch.library.Library] = []  # keeps the declaration alive


def torchvision_datasets() -> ModuleType:
    """Return torchvision.datasets."""
    try:
        import torchvision.datasets
    except ModuleNotFoundError:
        raise MissingDependency("this data set", "torchvision", "train") from None
    except RuntimeError as err:
        if torch.version.cuda is not None or "torchvision::nms" not in str(err):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision.datasets
    datasets: ModuleType = torchvision.datasets
    return datasets
