# SPDX-License-Identifier: MIT
"""model.pt: one trained model, as plain containers and tensors.

    {"format": "cmfast/2", "spec": {...}, "network": {"type": "adm", ...}, "weights": {name: tensor}}

A custom network is {"type": "own", "factory": "package.module:factory"}, and its code is the user's. A model that
was imported also has "source". Read by `safe_load`, so a pickle with code in it is refused before it
runs. The same content as .safetensors has the rest as JSON in its metadata under "cmfast". Training state is another
file (`training.trainer`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from cmfast.errors import ArtifactError, CmfastError, one_line, printable
from cmfast.files import atomic_file
from cmfast.formats.manifest import check_file
from cmfast.spec import ModelSpec
from cmfast_train.border import naming
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.build import NetworkConfig, build_network, check_weights, network_from_dict, network_to_dict
from cmfast_train.networks.custom import OwnConfig
from cmfast_train.safe_load import HoldsObjectsError, plain, read_tensors, safe_load

__all__ = [
    "Checkpoint", "HoldsObjectsError", "checkpoint_of", "is_cmfast_checkpoint", "load_checkpoint", "read_tensors",
    "safe_load", "save_checkpoint", "separate",
]  # fmt: skip

FORMAT = "cmfast/2"
FORMATS = ("cmfast/1", FORMAT)  # that are read
TRAINED_HERE = {"format": "cmfast"}  # the source of weights that were trained here


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model: its conventions, the shape of its network, its weights (float32, on the CPU)."""

    spec: ModelSpec
    network: NetworkConfig
    weights: Mapping[str, Tensor]
    source: Mapping[str, Any] = field(default_factory=lambda: TRAINED_HERE)  # of the weights: format, ...

    def denoiser(self, network: nn.Module | None = None) -> Denoiser:
        """Build the model on the CPU.

        Args:
            network: of a model with a custom network: what it was trained as, or its `Denoiser`. It is copied.

        Returns:
            The denoiser, in evaluation mode, without gradients; of a network of ours it shares the weights.

        Raises:
            ArtifactError: the weights do not fit the network.
            CmfastError: a custom network is missing, or the model has one of ours.
        """
        config = self.network
        if network is not None:
            if not isinstance(config, OwnConfig):
                raise CmfastError(
                    "this model's network is one of cmfast's, which is in the file; leave the network out"
                )
            config = replace(config, module=network.network if isinstance(network, Denoiser) else network)
        check_count(config, len(self.weights))
        own = isinstance(config, OwnConfig)
        try:
            with torch.device("cpu" if own else "meta"):
                built = build_network(config)
            # In place where weights may have several names, which `assign` would make weights of their own.
            built.load_state_dict(dict(self.weights), strict=True, assign=not own)
        except (RuntimeError, OverflowError, ZeroDivisionError, TypeError, ValueError) as err:
            raise ArtifactError(f"the weights do not fit the network: {printable(one_line(err))}") from None
        return Denoiser(built.cpu(), self.spec).eval().requires_grad_(False)

    def sha256(self) -> str:
        """Return the SHA-256 of the weights: names, shapes and bytes in the order of the names.

        Returns:
            64 hex digits.
        """
        return weights_sha256(self.weights)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of weights: names, shapes and bytes in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint atomically, as PyTorch or safetensors.

    Args:
        checkpoint: the model.
        path: model.pt, or .safetensors by its suffix.
    """
    head = {
        "format": FORMAT,
        "spec": checkpoint.spec.to_dict(),
        "network": network_to_dict(checkpoint.network),
    }
    if checkpoint.source != TRAINED_HERE:
        head["source"] = dict(checkpoint.source)
    weights = separate(checkpoint.weights)
    with atomic_file(path) as temporary:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(weights, temporary, metadata={"cmfast": json.dumps(head)})
        else:
            torch.save({**head, "weights": weights}, temporary)


def separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights on the CPU, contiguous, none sharing memory with another: safetensors wants them so."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        whole = storage.nbytes() == plain.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        found[name] = plain if whole else plain.clone()
    return found


def load_checkpoint(path: str | os.PathLike[str], opened: BinaryIO | None = None) -> Checkpoint:
    """Read a cmfast checkpoint, .pt or .safetensors. Nothing in it is executed.

    Args:
        opened: the content where it was opened and checked already; `path` is its name then
    """
    with naming(Path(path)):
        file = check_file(path)
        content = read_tensors(file, opened)
        if not is_cmfast_checkpoint(content):
            kind = "safetensors" if file.suffix == ".safetensors" else "PyTorch"
            raise ArtifactError(f"{file}: a {kind} file, but not a cmfast checkpoint; cmfast-train writes DIR/model.pt")
        return checkpoint_of(content, file)


def is_cmfast_checkpoint(content: Any) -> bool:
    """Whether what a file holds is a cmfast checkpoint, of this version or another, whole or damaged."""
    if not isinstance(content, dict):
        return False
    form = content.get("format")
    return (isinstance(form, str) and form.startswith("cmfast/")) or {"spec", "network", "weights"} <= content.keys()


def checkpoint_of(content: Mapping[str, Any], file: Path) -> Checkpoint:
    """Return the checkpoint in what `read_tensors` returned, or ArtifactError; `file` is named in it."""
    form, weights = content.get("format"), content.get("weights")
    if not isinstance(form, str) or not form.startswith("cmfast/"):
        what = repr(form[:40]) if isinstance(form, str) else "missing" if form is None else f"a {type(form).__name__}"
        raise ArtifactError(
            f"{file}: a damaged cmfast checkpoint: its format is {what}, not {FORMAT!r}; copy the file again, or take "
            "another checkpoint of the run"
        )
    if form not in FORMATS:
        raise ArtifactError(
            f"{file}: a checkpoint of format {form[:40]!r}, this version reads {' and '.join(map(repr, FORMATS))}; "
            "update cmfast"
        )
    if not isinstance(weights, dict):
        what = "missing" if weights is None else f"a {type(weights).__name__}"
        raise ArtifactError(
            f"{file}: a damaged cmfast checkpoint: its weights are {what}, not named tensors; copy the file again, or "
            "take another checkpoint of the run"
        )
    try:
        parts = {name: plain(content.get(name), name) for name in ("spec", "network")}
        source = plain(content.get("source", TRAINED_HERE), "source")
        if not isinstance(source, dict):
            raise CmfastError(f"source is a {type(source).__name__}, not a dictionary")
        spec = ModelSpec.from_dict(parts["spec"])
        network = network_from_dict(parts["network"])
    except (CmfastError, TypeError, KeyError, ValueError, AttributeError, OverflowError) as err:
        raise ArtifactError(f"{file}: the checkpoint's description is malformed: {one_line(err)}") from None
    entries = spec.label.entries if spec.label else 0
    own = isinstance(network, OwnConfig)
    if not isinstance(network, OwnConfig) and (network.image_shape != spec.shape or network.classes != entries):
        raise ArtifactError(f"{file}: its network and its spec disagree about the images or the classes")
    if [(c.name, c.shape) for c in getattr(network, "conditions", spec.conditions)] != [
        (c.name, c.shape) for c in spec.conditions
    ]:
        raise ArtifactError(f"{file}: its network and its spec disagree about the conditions")
    _check_weights(weights, file, own=own)
    try:
        check_count(network, len(weights))
        check_weights(network, weights)
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None
    return Checkpoint(spec=spec, network=network, weights=weights, source=source)


def check_count(network: NetworkConfig, tensors: int) -> None:
    """Raise ArtifactError if a network has more blocks than a file has tensors; call it before anything is built."""
    blocks = getattr(network, "res_blocks", 0) * len(getattr(network, "channel_mult", ()))
    if blocks > tensors:
        raise ArtifactError(f"{tensors} weights are too few for a network of {blocks} blocks")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, at the speed of memory: `isfinite` makes copies and takes 12 times as long.

    The extremes of values with a NaN among them are NaN (documented for torch.aminmax).
    """
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _is_sound(tensor: Tensor, *, own: bool) -> bool:
    if not own:
        return is_finite(tensor)
    numbers = tensor.numel() and tensor.is_floating_point()
    return not numbers or not bool(torch.stack(torch.aminmax(tensor.float())).isnan().any())


def _check_weights(weights: Mapping[Any, Any], file: Path, *, own: bool) -> None:
    """Raise ArtifactError unless these are named tensors of plain, finite float32 values.

    own: buffers of other networks may also hold whole numbers, other precisions and infinity, such as masks; no NaN.
    """
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ArtifactError(f"{file}: its weights are not named tensors")
        what = ""
        if tensor.layout != torch.strided or tensor.is_complex() or (tensor.dtype != torch.float32 and not own):
            what = f"{tensor.dtype}, {tensor.layout}"
        elif tensor.device.type != "cpu":
            what = f"on {tensor.device.type}, so it has no values"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            what = "larger than its memory"
        if what:
            raise ArtifactError(
                f"{file}: the weight {name[:100]} is {what.replace(', torch.strided', '')}; "
                "a checkpoint's weights are float32"
            )
        if not _is_sound(tensor, own=own):
            raise ArtifactError(
                f"{file}: the weight {name[:100]} has values that are not finite; its training diverged"
            )
