# SPDX-License-Identifier: MIT
"""What a graph takes and gives, compared with what its manifest says: one check for every library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cmfast.checks import MAX_BATCH
from cmfast.errors import ArtifactError
from cmfast.formats.manifest import Manifest


class Port(NamedTuple):
    """An input or output of a graph, as a library sees it."""

    name: str
    type: str  # as the library calls it
    shape: tuple[int | str | None, ...]  # a number is fixed, anything else free; (): unknown


def check_ports(
    path: Path, manifest: Manifest, inputs: Sequence[Port], outputs: Sequence[Port], types: tuple[str, str]
) -> int | None:
    """Return the fixed batch size of a graph, None where it is free.

    Args:
        path: Its file, for errors.
        manifest: What the file says of itself.
        inputs: Of the graph, in its order.
        outputs: Of the graph.
        types: What the library calls float32 and int64.

    Raises:
        ArtifactError: The graph takes or gives something else than its manifest says.
    """
    shape, wanted = manifest.returns, manifest.inputs
    names = [each.name for each in wanted]
    if [port.name for port in inputs] != names:
        raise ArtifactError(
            f"{path}: the graph's inputs are {', '.join(port.name for port in inputs)}; its manifest needs "
            f"{', '.join(names)}"
        )
    for port, each in zip(inputs, wanted, strict=True):
        _check_type(path, port, types[each.dtype == "int64"])
        if not fits(port.shape, each.shape):
            raise ArtifactError(
                f"{path}: the graph's {each.name} is {list(port.shape)}, its manifest says {list(each.shape)}; export "
                "it again"
            )
    if len(outputs) != 1:
        raise ArtifactError(f"{path}: the graph has {len(outputs)} outputs; its manifest needs one")
    _check_type(path, outputs[0], types[0])
    given = outputs[0].shape  # empty: the file does not say; the backend looks at each
    if given and not fits(given[1:], shape):
        raise ArtifactError(
            f"{path}: the graph returns {list(given)}, its manifest says [batch, {str(list(shape))[1:]}"
        )
    batch = inputs[0].shape[manifest.batch_axis]
    if not isinstance(batch, int):
        return None
    if not 0 < batch <= MAX_BATCH:
        raise ArtifactError(
            f"{path}: the graph's batch size is fixed at {batch}; at most {MAX_BATCH:,} are run: export it again"
        )
    return batch


def fits(sizes: Sequence[object], wanted: Sequence[int | str]) -> bool:
    """Whether sizes are those of a manifest; what is no number, on either side, is a size that is not known."""
    pairs = zip(sizes, wanted, strict=False)
    return len(sizes) == len(wanted) and all(
        isinstance(want, str) or not isinstance(size, int) or size == want for size, want in pairs
    )


def _check_type(path: Path, port: Port, wanted: str) -> None:
    if port.type != wanted:
        raise ArtifactError(f"{path}: the graph's {port.name} is {port.type}, and needs {wanted}")
