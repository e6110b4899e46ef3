# SPDX-License-Identifier: MIT
"""A custom network in a checkpoint: cmfast holds its weights and the name of what makes it, not its shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn

from cmfast.errors import CmfastError, one_line, shown


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """A network that its user's code makes.

    Attributes:
        factory: package.module:factory, what --network was given; "" where a module was passed in Python.
        module: the network, of which `build_network` returns copies; None: it is known by its weights only.
    """

    factory: str = ""
    module: nn.Module | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str):
            raise CmfastError(f"the factory of a network must be a text, got {shown(self.factory)}")

    @property
    def dropout(self) -> float:
        """More than 0: whether a custom network draws random numbers cannot be seen."""
        return 1.0

    def build(self) -> nn.Module:
        """Return a copy of the module.

        Raises:
            CmfastError: there is no module, or it cannot be copied.
        """
        if self.module is None:
            raise CmfastError(
                f"a model with a network of your own{f', {self.factory}' if self.factory else ''}: its code is not in "
                f"the file. Python: load_model(FILE).denoiser(net); command: cmfast-export FILE{network_option(self)}"
            )
        try:
            return copy.deepcopy(self.module)
        except Exception as err:  # whatever an attribute of it raises
            raise CmfastError(
                f"{type(self.module).__name__} cannot be copied, which training needs: {one_line(err, 200)}"
            ) from None


def network_option(config: object) -> str:
    """Return what a command that exports a model with this network needs beside its name."""
    if not isinstance(config, OwnConfig):
        return ""
    return f" --network {config.factory or 'package.module:factory'}"


def tied(module: nn.Module) -> dict[str, str]:
    """Return the further names of parameters that have several, by the name that `named_parameters` gives them."""
    first: dict[int, str] = {}
    found = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(weight), name) != name:
            found[name] = first[id(weight)]
    return found


def live_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return what the state dict of a module holds beside its parameters, by name: the tensors themselves."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in module.state_dict().items() if name not in parameters}
