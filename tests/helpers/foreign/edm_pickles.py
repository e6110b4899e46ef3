# SPDX-License-Identifier: MIT
"""A stand-in for EDM's torch_utils.persistence: objects travel with the source code of their class."""

from __future__ import annotations

import pickle
import sys
from typing import Any

from torch import nn


def reconstruct(meta: dict[str, Any]) -> Any:
    """Do what the original does when it is unpickled: run the code that is in the file."""
    space: dict[str, Any] = {}
    exec(meta["module_src"], space)
    made = object.__new__(space[meta["class_name"]])
    made.__dict__.update(meta["state"])
    return made


class PersistentPickler(pickle.Pickler):
    """Pickle every module, but torch's containers, as EDM's persistent classes pickle themselves."""

    source = "import torch\nclass {name}(torch.nn.Module): pass\n"

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Module) or isinstance(obj, (nn.ModuleDict, nn.ModuleList)):
            return NotImplemented
        name = type(obj).__name__
        source = self.source.format(name=name)
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": obj.__dict__}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)
