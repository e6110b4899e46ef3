# SPDX-License-Identifier: MIT
"""Compile the kernels of `cmfast/backends/cuda/sampling.cu` to PTX, without a GPU: python benchmarks/make_ptx.py

The compiler is NVRTC of CUDA 12.0, so that drivers from 525 on take the PTX, and the target compute capability 7.5, so
that every card that TensorRT supports does: pip install nvidia-cuda-nvrtc-cu12==12.0.140
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

import click

from cmfast.files import atomic_file

PACKAGE, VERSION = "nvidia-cuda-nvrtc-cu12", "12.0.140"
FOLDER = Path(__file__).parents[1] / "cmfast" / "backends" / "cuda"
OPTIONS = (b"--gpu-architecture=compute_75", b"--fmad=false", b"--std=c++17")


def library() -> ctypes.CDLL:
    """Return NVRTC of that version, or exit with the line that installs it."""
    try:
        found = version(PACKAGE)
        paths = [file for file in files(PACKAGE) or () if file.name in ("libnvrtc.so.12", "nvrtc64_120_0.dll")]
    except PackageNotFoundError:
        found, paths = "", []
    if found != VERSION or not paths:
        sys.exit(f"{PACKAGE} {VERSION} is not installed: pip install {PACKAGE}=={VERSION}")
    return ctypes.CDLL(str(paths[0].locate()))


def compiled(source: bytes) -> str:
    """Return the PTX of a source, or exit with the compiler's words."""
    nvrtc, program = library(), ctypes.c_void_p()

    def text_of(kind: str) -> str:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer.value.decode()

    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"sampling.cu", 0, None, None)
    if nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)):
        sys.exit(text_of("ProgramLog"))
    # Tables of its own header, which nothing here uses.
    lines = [line.rstrip() for line in text_of("PTX").splitlines() if "nv6target" not in line]
    return "\n".join(lines) + "\n"


@click.command()
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), default=FOLDER / "sampling.ptx", help="The PTX."
)
def command(out: Path) -> None:
    """Compile the kernels to PTX."""
    source = (FOLDER / "sampling.cu").read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    ptx = f"// Of sampling.cu, SHA-256 {digest}, by benchmarks/make_ptx.py\n{compiled(source)}"
    with atomic_file(out) as file:
        file.write_text(ptx)
    print(f"{out}: {len(ptx):,} bytes")


if __name__ == "__main__":
    command()
