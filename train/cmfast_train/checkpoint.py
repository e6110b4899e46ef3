# SPDX-License-Identifier: MIT
"""model.pt: one trained model, as plain containers and tensors.

    {"format": "cmfast/1", "spec": {...}, "network": {"type": "adm", ...}, "weights": {name: tensor}}

A model that was imported also has "source". Read with `weights_only=True`, so a pickle with code in it is refused
before it runs. The same content as .safetensors has the rest as JSON in its metadata under "cmfast". Training state
is another file (`loop`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.artifact import check_file
from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import atomic_file
from cmfast.spec import ModelSpec
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.build import NetworkConfig, build_network, check_weights, network_from_dict, network_to_dict

FORMAT = "cmfast/1"
OWN = {"format": "cmfast"}  # the source of weights that were trained here


class HoldsObjectsError(ArtifactError):
    """A PyTorch file with more in it than tensors and plain containers."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model: its conventions, the shape of its network, its weights (float32, on the CPU)."""

    spec: ModelSpec
    network: NetworkConfig
    weights: Mapping[str, Tensor]
    source: Mapping[str, Any] = field(default_factory=lambda: OWN)  # of the weights: format, ...

    def denoiser(self) -> Denoiser:
        """Return the model, ready to evaluate on the CPU."""
        with torch.device("meta"):
            network = build_network(self.network)
        try:
            network.load_state_dict(dict(self.weights), strict=True, assign=True)
        except RuntimeError as err:
            raise ArtifactError(f"the weights do not fit the network: {' '.join(str(err).split())[:300]}") from None
        return Denoiser(network, self.spec).eval().requires_grad_(False)

    def sha256(self) -> str:
        """Return the SHA-256 of the weights: names, shapes and bytes in the order of the names."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            tensor = self.weights[name].detach().contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write model.pt, or .safetensors by its suffix, atomically."""
    head = {
        "format": FORMAT,
        "spec": checkpoint.spec.to_dict(),
        "network": network_to_dict(checkpoint.network),
    }
    if checkpoint.source != OWN:
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


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a cmfast checkpoint, .pt or .safetensors. Nothing in it is executed."""
    file = check_file(path)
    content = read_tensors(file)
    if not is_own(content):
        kind = "safetensors" if file.suffix == ".safetensors" else "PyTorch"
        raise ArtifactError(f"{file}: a {kind} file, but not a cmfast checkpoint; cmfast-train writes DIR/model.pt")
    return checkpoint_of(content, file)


def is_own(content: Any) -> bool:
    """Whether what a file holds is a cmfast checkpoint, of this version or another."""
    return (
        isinstance(content, dict)
        and str(content.get("format")).startswith("cmfast/")
        and isinstance(content.get("weights"), dict)
    )


def checkpoint_of(content: Mapping[str, Any], file: Path) -> Checkpoint:
    """Return the checkpoint in what `read_tensors` returned, or ArtifactError; `file` is named in it."""
    if content["format"] != FORMAT:
        raise ArtifactError(
            f"{file}: a checkpoint of format {content['format']!r}, this version reads {FORMAT!r}; update cmfast"
        )
    weights = content["weights"]
    try:
        spec = ModelSpec.from_dict(content["spec"])
        network = network_from_dict(content["network"])
        source = dict(content.get("source", OWN))
    except (CmfastError, TypeError, KeyError, ValueError, AttributeError) as err:
        raise ArtifactError(f"{file}: the checkpoint's description is malformed: {err}") from None
    if network.image_shape != spec.image or network.classes != spec.classes:
        raise ArtifactError(f"{file}: its network and its spec disagree about the images or the classes")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ArtifactError(f"{file}: its weights are not named tensors")
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            raise ArtifactError(f"{file}: the weight {name} is {tensor.dtype}; a checkpoint's weights are float32")
    try:
        check_weights(network, weights)
    except CmfastError as err:
        raise ArtifactError(f"{file}: {err}") from None
    return Checkpoint(spec=spec, network=network, weights=weights, source=source)


def read_tensors(file: Path) -> dict[str, Any]:
    """Return what a file of weights holds, plain containers and tensors on the CPU. Nothing in it is executed.

    A cmfast checkpoint gives {"format", "spec", "network", "source", "weights"}, any other what its author put there.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    content = safe_load(file)
    if not isinstance(content, dict):
        raise ArtifactError(f"{file}: a PyTorch file, but it holds a {type(content).__name__}, no named weights")
    return content


def safe_load(file: Path) -> Any:
    """Return torch.load(file) restricted to tensors and plain containers, on the CPU; errors in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error
            return torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except pickle.UnpicklingError as err:
        text = str(err)
        if (
            "unsupported GLOBAL" in text
            or "Unsupported global" in text
            or "Unsupported class" in text
            or "Unsupported operand" in text
        ):
            what = text.split("GLOBAL ")[-1].split()[0] if "GLOBAL " in text else "unknown objects"
            raise HoldsObjectsError(
                f"{file}: it holds code or objects ({what}), not only tensors; refused, nothing in it was run"
            ) from None
        raise ArtifactError(f"{file}: not a readable PyTorch file: {text.splitlines()[0][:200]}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
            OverflowError, MemoryError, NotImplementedError, struct.error, zipfile.BadZipFile) as err:  # fmt: skip
        raise ArtifactError(f"{file}: not a whole PyTorch file: {(str(err).splitlines() or ['?'])[0][:200]}") from None


def _can_be_mapped(file: Path) -> bool:
    """Whether torch can map the file instead of copying it: a model of 2 GB opens in a second.

    It maps the bytes as they are, so a file that somebody has zipped again, compressed, would be read as nonsense.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError):
        return False  # another format, or damaged: torch says so


def _read_safetensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as err:
        raise ArtifactError(f"{file}: not a whole safetensors file: {err}") from None
    try:
        head = json.loads(metadata.get("cmfast", "null"))
    except (ValueError, RecursionError):
        head = None
    return {**head, "weights": weights} if isinstance(head, dict) else weights
