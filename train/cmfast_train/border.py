# SPDX-License-Identifier: MIT
"""Where foreign files enter: what is wrong with one is one line with its name, and a bug of ours keeps its traceback.

with reading(file, "not a whole .npy file"):  # around what parses foreign bytes, and nothing else
with naming(file):  # around the whole work with a file, our own code in it
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cmfast.errors import ArtifactError, CmfastError, one_line, printable

LONGEST = 2000  # characters of an error


@contextmanager
def reading(name: object, what: str) -> Iterator[None]:
    """Turn whatever parsing raises in the block into one line: "NAME: what: why".

    What damaged files make libraries raise is not documented and changes, so nothing is left out.
    """
    with naming(name):
        try:
            yield
        except (CmfastError, MemoryError):
            raise
        except Exception as err:
            if isinstance(err, OSError) and err.filename is not None:
                raise  # the system's word about a file; without one a damaged file made a library seek or read wrongly
            why = (err.strerror if isinstance(err, OSError) else None) or one_line(err, 200) or type(err).__name__
            raise ArtifactError(f"{name}: {what}: {why}") from None


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Turn what the system says in the block into one line with the name; errors of ours get no control characters."""
    try:
        yield
    except CmfastError as err:
        err.args = (printable(str(err)[:LONGEST]),)
        raise
    except MemoryError:
        raise ArtifactError(printable(f"{name}: there is too little memory to read it")) from None
    except OSError as err:
        why = err.strerror or one_line(err, 200) or type(err).__name__
        if isinstance(err.filename, (str, bytes)) and os.fsdecode(err.filename) != str(name):
            why = f"{why}: {os.fsdecode(err.filename)}"
        raise ArtifactError(printable(f"{name}: cannot be read: {why}"[:LONGEST])) from None
