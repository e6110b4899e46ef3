# SPDX-License-Identifier: MIT
"""model.pt: one trained model, as plain containers and tensors.

    {"format": "cmfast/1", "spec": {...}, "network": {"type": "adm", ...}, "weights": {name: tensor}}

Read with `weights_only=True`, so a pickle with code in it is refused before it runs. The same content as
.safetensors has the rest as JSON in its metadata under "cmfast". Training state is another file (`loop`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.artifact import check_file
from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import atomic_file
from cmfast.spec import ModelSpec
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.adm import AdmConfig, AdmUnet

FORMAT = "cmfast/1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model: its conventions, the shape of its network, its weights (float32, on the CPU)."""

    spec: ModelSpec
    network: AdmConfig
    weights: Mapping[str, Tensor]

    def denoiser(self) -> Denoiser:
        """Return the model, ready to evaluate on the CPU."""
        with torch.device("meta"):
            network = AdmUnet(self.network)
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
    head = {"format": FORMAT, "spec": checkpoint.spec.to_dict(), "network": _network_dict(checkpoint.network)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
    with atomic_file(path) as temporary:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(weights, temporary, metadata={"cmfast": json.dumps(head)})
        else:
            torch.save({**head, "weights": weights}, temporary)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a cmfast checkpoint, .pt or .safetensors. Nothing in it is executed."""
    file = check_file(path)
    head, weights = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pt(file)
    if head.get("format") != FORMAT:
        raise ArtifactError(
            f"{file}: not a cmfast checkpoint (format {head.get('format')!r}, need {FORMAT!r}); "
            "cmfast-train writes them as DIR/model.pt"
        )
    try:
        spec = ModelSpec.from_dict(head["spec"])
        network = _network_config(head["network"])
    except (CmfastError, TypeError, KeyError, ValueError, AttributeError) as err:
        raise ArtifactError(f"{file}: the checkpoint's description is malformed: {err}") from None
    if (network.channels, network.image_size, network.image_size) != spec.image or network.classes != spec.classes:
        raise ArtifactError(f"{file}: its network and its spec disagree about the images or the classes")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ArtifactError(f"{file}: its weights are not named tensors")
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            raise ArtifactError(f"{file}: the weight {name} is {tensor.dtype}; a checkpoint's weights are float32")
    return Checkpoint(spec=spec, network=network, weights=weights)


def safe_load(file: Path) -> Any:
    """Return torch.load(file) restricted to tensors and plain containers, on the CPU; errors in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        text = str(err)
        if (
            "unsupported GLOBAL" in text
            or "Unsupported global" in text
            or "Unsupported class" in text
            or "Unsupported operand" in text
        ):
            what = text.split("GLOBAL ")[-1].split()[0] if "GLOBAL " in text else "unknown objects"
            raise ArtifactError(
                f"{file}: it holds code or objects ({what}), not only tensors; refused, nothing in it was run"
            ) from None
        raise ArtifactError(f"{file}: not a readable PyTorch file: {text.splitlines()[0][:200]}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError) as err:
        raise ArtifactError(f"{file}: not a whole PyTorch file: {(str(err).splitlines() or ['?'])[0][:200]}") from None


def _read_pt(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = safe_load(file)
    if not isinstance(content, dict) or not isinstance(content.get("weights"), dict):
        raise ArtifactError(f"{file}: a PyTorch file, but not a cmfast checkpoint; cmfast-train writes DIR/model.pt")
    return {k: v for k, v in content.items() if k != "weights"}, content["weights"]


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as err:
        raise ArtifactError(f"{file}: not a whole safetensors file: {err}") from None
    try:
        head = json.loads(metadata.get("cmfast", "{}"))
    except (ValueError, RecursionError):
        head = {}
    return (head if isinstance(head, dict) else {}), weights


def _network_dict(config: AdmConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {"type": "adm", **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def _network_config(values: Mapping[str, Any]) -> AdmConfig:
    values = dict(values)
    if (kind := values.pop("type", None)) != "adm":
        raise CmfastError(f"unknown network type {kind!r}; this version knows adm")
    return AdmConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
