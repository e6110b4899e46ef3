# SPDX-License-Identifier: MIT
"""OpenVINO's IR: the graph in NAME.xml, its weights in NAME.bin beside it, the manifest in the graph's rt_info.

    <net ...> <layers>...</layers> <edges>...</edges> <rt_info> <cmfast value="{...}" /> </rt_info> </net>

Nothing here needs OpenVINO. The manifest's "graph_sha256" is the SHA-256 of the .xml up to its <rt_info> and of the
.bin, so weights of another export are never taken for these. The XML is read by expat, bounded in size and depth, and
a document type, without which there are no entities, is refused.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from cmfast.errors import ArtifactError, one_line
from cmfast.formats.manifest import Manifest, check_file, compare_sha256, external_file
from cmfast.formats.recognise import HEAD, what_it_is_instead

MAX_BYTES = 2**28  # of XML; a sampler of the ImageNet-64 network has about 4 MB a step
MAX_DEPTH = 64  # of its elements; the bodies of loops add four each
_PLACE = ["net", "rt_info", "cmfast"]
_AGAIN = "export it again: cmfast-export model.pt --format openvino"

Data = bytes | mmap.mmap


@dataclass
class _Found:
    """What a walk over the XML finds."""

    path: list[str] = field(default_factory=list)  # names of the open elements
    manifests: list[str] = field(default_factory=list)
    head: int | None = None  # bytes before <rt_info>
    elsewhere: bool = False  # OpenVINO's converter keeps an ONNX file's manifest under rt_info/framework


class IrFile:
    """An IR, both files opened once: what was checked is what OpenVINO gets. Close it, or use it in a `with`.

    Raises:
        ArtifactError: The files are not whole, not one export, or have no manifest.
    """

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        """Open and check NAME.xml and NAME.bin; sha256: what the .xml must hash to, whose digest holds the .bin."""
        self.path = check_file(path)
        self._handles: list[BinaryIO] = []
        try:
            self.graph = self._open(self.path)
            if sha256 is not None:
                compare_sha256(self.path, hashlib.sha256(self.graph).hexdigest(), sha256)
            self.manifest, head = parse_ir(self.graph, self.path)
            self.weights = self._open(weights_of(self.path))
            if ir_sha256(self.graph, head, self.weights) != self.manifest.graph_sha256:
                raise ArtifactError(
                    f"{self.path}: its graph or the weights in {self.path.with_suffix('.bin').name} are not those that "
                    f"were verified: one of the two files is of another export, or damaged; {_AGAIN}"
                )
        except BaseException:
            self.close()
            raise
        self._before = self._state()

    def __enter__(self) -> IrFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def descriptors(self) -> tuple[int, int]:
        """File descriptors of the graph and the weights."""
        graph, weights = (handle.fileno() for handle in self._handles)
        return graph, weights

    @property
    def changed(self) -> bool:
        """Whether the files were written to since they were opened."""
        return self._state() != self._before

    def close(self) -> None:
        """Close the files; their mappings end with the last reference."""
        for handle in self._handles:
            handle.close()

    def _open(self, file: Path) -> Data:
        self._handles.append(file.open("rb"))
        size = os.fstat(self._handles[-1].fileno()).st_size
        return mmap.mmap(self._handles[-1].fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def _state(self) -> list[tuple[int, int]]:
        found = [os.fstat(handle.fileno()) for handle in self._handles]
        return [(each.st_size, each.st_mtime_ns) for each in found]


def read_ir(path: Path) -> Manifest:
    """Return the manifest of an IR that is whole and as it was written, else raise ArtifactError."""
    with IrFile(path) as file:
        return file.manifest


def weights_of(file: Path) -> Path:
    """Return the .bin of an .xml: a file of the same name beside it, no link to another folder."""
    return external_file(file, f"{file.stem}.bin", hard_links=True)


def parse_ir(data: Data, file: Path) -> tuple[Manifest, int]:
    """Return the manifest in the bytes of an .xml, and how many bytes stand before its <rt_info>.

    Raises:
        ArtifactError: It is no IR, or has no manifest; `file` is named.
    """
    found = _walk(data, file)
    if len(found.manifests) != 1 or found.head is None:
        why = "two manifests" if found.manifests else "no cmfast manifest, so its conventions are unknown"
        also = ": another tool converted it; convert the .onnx file" if found.elsewhere and not found.manifests else ""
        raise ArtifactError(f"{file}: OpenVINO's IR with {why}{also}; {_AGAIN}")
    manifest = Manifest.from_json(found.manifests[0], str(file))
    if not manifest.graph_sha256:
        raise ArtifactError(f"{file}: its manifest has no graph_sha256, which binds its weights to it; {_AGAIN}")
    return manifest, found.head


def with_manifest(graph: bytes, manifest: Manifest, file: Path) -> bytes:
    """Return the bytes of an .xml with this manifest, which needs its graph_sha256, as its only rt_info."""
    text = f"<rt_info>\n\t\t<cmfast value={quoteattr(manifest.to_json())} />\n\t</rt_info>\n</net>\n"
    return graph[: head_of(graph, file)] + text.encode()


def head_of(graph: bytes, file: Path) -> int:
    """Return how many bytes of an .xml stand before its <rt_info>; without one, before its end."""
    head = _walk(graph, file).head
    return graph.rindex(b"</net>") if head is None else head


def ir_sha256(graph: Data, head: int, weights: Data) -> str:
    """Return the digest of what an IR computes, hex digits: the .xml up to its <rt_info>, and the .bin."""
    sha256 = hashlib.sha256()
    for data, end in ((graph, head), (weights, len(weights))):
        with memoryview(data) as view, view[:end] as part:
            sha256.update(part)
    return sha256.hexdigest()


def _walk(data: Data, file: Path) -> _Found:
    if len(data) > MAX_BYTES:
        raise ArtifactError(f"{file}: {len(data) / 2**20:,.0f} MiB of XML; at most {MAX_BYTES >> 20} are read")
    found = _Found()
    parser = expat.ParserCreate()

    def doctype(*_: object) -> None:
        raise ArtifactError(f"{file}: XML with a document type, which OpenVINO never writes; refused")

    def start(name: str, attributes: dict[str, str]) -> None:
        path = found.path
        path.append(name)
        if len(path) == 1 and name != "net":
            raise ArtifactError(f"{file}: XML, and not OpenVINO's IR: it begins with <{name[:40]}>; {_AGAIN}")
        if len(path) > MAX_DEPTH:
            raise ArtifactError(f"{file}: XML of more than {MAX_DEPTH} levels; {_AGAIN}")
        if path == _PLACE[:2] and found.head is None:
            found.head = parser.CurrentByteIndex
        if path == _PLACE:
            found.manifests.append(attributes.get("value", ""))
        found.elsewhere |= path == [*_PLACE[:2], "framework", _PLACE[2]]

    def end(_: str) -> None:
        found.path.pop()

    parser.StartDoctypeDeclHandler = doctype
    parser.StartElementHandler, parser.EndElementHandler = start, end
    try:
        parser.Parse(data[:], True)
    except expat.ExpatError as err:
        raise _not_whole(data, file, err) from None
    return found


def _not_whole(data: Data, file: Path, err: Any) -> ArtifactError:
    instead = what_it_is_instead(bytes(data[:HEAD]))
    if instead and not bytes(data[:HEAD]).lstrip().startswith(b"<"):
        return ArtifactError(f"{file}: not OpenVINO's IR: it is {instead}")
    return ArtifactError(f"{file}: not whole XML ({one_line(err)}); copy it again, or {_AGAIN}")
