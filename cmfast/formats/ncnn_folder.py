# SPDX-License-Identifier: MIT
"""A model for ncnn: the graph in NAME.param, its weights in NAME.bin, the manifest in manifest.json beside them.

Nothing here needs ncnn. The manifest's "graph_sha256" is the SHA-256 of the .param followed by the .bin, so files of
two exports are never taken for one model.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from cmfast.errors import ArtifactError
from cmfast.formats.manifest import Manifest, check_file, external_file

MANIFEST = "manifest.json"
MAX_BYTES = 2**24  # of the manifest and of the graph, both text; the ImageNet-64 network has 0.2 MB
_BLOCK = 2**20
_AGAIN = "export it again: cmfast-export model.pt --format ncnn"


class NcnnFiles:
    """The three files of a model, opened once: what was checked is what ncnn gets. Close it, or use it in a `with`.

    Attributes:
        path: The .param.
        manifest: Checked.
        graph: The text of the .param.

    Raises:
        ArtifactError: The files are not whole or not of one export.
    """

    def __init__(self, path: Path) -> None:
        """Open and check NAME.param, NAME.bin and manifest.json."""
        self.path = check_file(path)
        self._weights: BinaryIO | None = None
        about = _text(external_file(path, MANIFEST))
        self.manifest = Manifest.from_json(about, str(path.parent / MANIFEST))
        self.graph = _text(path)
        self._weights = external_file(path, f"{path.stem}.bin", hard_links=True).open("rb")
        self._before = self._state()
        if self._sha256() != self.manifest.graph_sha256:
            self.close()
            raise ArtifactError(
                f"{path}: its graph or the weights in {path.stem}.bin are not those that were verified: one of the "
                f"files is of another export, or damaged; {_AGAIN}"
            )

    def __enter__(self) -> NcnnFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def descriptor(self) -> int:
        """File descriptor of the weights."""
        assert self._weights
        return self._weights.fileno()

    @property
    def changed(self) -> bool:
        """Whether the weights were written to since they were opened."""
        return self._state() != self._before

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def _sha256(self) -> str:
        assert self._weights
        sha256 = hashlib.sha256(self.graph.encode())
        while block := self._weights.read(_BLOCK):
            sha256.update(block)
        return sha256.hexdigest()

    def close(self) -> None:
        """Close the weights."""
        if self._weights:
            self._weights.close()


def read_ncnn(path: Path) -> Manifest:
    """Return the manifest of a model for ncnn that is whole and as it was written, else raise ArtifactError."""
    with NcnnFiles(path) as files:
        return files.manifest


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        return content.decode("utf-8")
    except ValueError as err:
        raise ArtifactError(f"{file}: no text of a model for ncnn ({err}); {_AGAIN}") from None
