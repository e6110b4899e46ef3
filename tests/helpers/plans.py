# SPDX-License-Identifier: MIT
"""Files that begin as TensorRT's plans do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmfast.formats.manifest import Manifest
from cmfast.formats.tensorrt_plan import NOT_RUN, UNSEALED, seal
from helpers.specs import image_spec


def plan(path: Path, *, magic: bytes = b"ftrt", source: str = "1" * 64, kind: str = "server", **engine: Any) -> Path:
    """Write a file with a plan's first bytes and a manifest, and no network in it."""
    values = {
        "library": "tensorrt_rtx" if magic == b"vtrt" else "tensorrt",
        "version": "10.13.3.9",
        "compute_capability": ["8.9"],
        "batch": [1, 4, 6],
        "platform": "linux x86_64",
        "version_compatible": False,
        "hardware_compatible": "",
        "onnx_sha256": "2" * 64,
        "max_abs": NOT_RUN,
        "plan_sha256": UNSEALED,
    }
    spec = image_spec(image=(1, 8, 8), classes=10, sigmas={2: (80.0, 0.8)})
    manifest = Manifest(kind=kind, spec=spec, source={"sha256": source}, engine=values | engine)
    data = bytearray(magic + bytes(60) + manifest.to_json().encode() + b"\0not a network")
    data[16:24] = len(data).to_bytes(8, "little")  # where TensorRT-RTX says how long the file is
    seal(data)
    path.write_bytes(data)
    return path
