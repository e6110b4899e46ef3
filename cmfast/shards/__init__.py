# SPDX-License-Identifier: MIT
"""Many samples as a folder of shards: .npz files, each of a range of samples, drawn here or on a Ray cluster.

    from pathlib import Path
    from cmfast.shards import OnRay, How, ShardRequest, described, draw_shards, files_sha256, read_model, read_shards

    path = Path("model.onnx")
    files = read_model(path)
    model, drawer = described(files, path), OnRay("local", files, How.of(path))      # or cmfast.load(path), Here(model)
    draw_shards(model, files_sha256(files), ShardRequest(n=50_000, sigmas=(80.0, 0.8)), Path("samples"), drawer)
    images, labels = read_shards(Path("samples"))

    samples_00000000_00001024.npz    arr_0 images or samples, arr_1 labels, settings (JSON): what they were drawn with

A shard is written atomically, so the same command continues where another was stopped. `files` knows what a shard is,
`drawing` which ones are missing, `on_ray` how workers of a cluster draw them, `sent` how a model gets there. The names
below are public; each is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmfast import lazily

if TYPE_CHECKING:
    from cmfast.shards.drawing import Drawer, Here, ShardRequest, draw_shards, draw_together
    from cmfast.shards.files import read_shards
    from cmfast.shards.on_ray import OnRay
    from cmfast.shards.sent import How, described, files_sha256, read_model

_HOMES = {  # the modules of the names below
    "Drawer": "drawing",
    "Here": "drawing",
    "How": "sent",
    "OnRay": "on_ray",
    "ShardRequest": "drawing",
    "described": "sent",
    "draw_shards": "drawing",
    "draw_together": "drawing",
    "files_sha256": "sent",
    "read_model": "sent",
    "read_shards": "files",
}
__all__ = [
    "Drawer",
    "Here",
    "How",
    "OnRay",
    "ShardRequest",
    "described",
    "draw_shards",
    "draw_together",
    "files_sha256",
    "read_model",
    "read_shards",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
