# SPDX-License-Identifier: MIT
"""The contenders of the CPU suite: a row for each way to run a model. What a row means is in `opening`."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "int8")
# What a way opens: the checkpoint, the .onnx denoisers exported from it, the folder for ncnn.
CHECKPOINT, FLOAT, INT8, NCNN = "checkpoint", "float", "int8", "ncnn"
# PSNR from the reference below which it would be another network that is timed, dB.
LEAST_DB = {"fp32": 80.0, "fp16": 40.0, "bf16": 40.0, "int8": 35.0}
LEAST_PLAIN_DB = 15.0  # of a library that chose a low precision itself, also for c_skip x: what a user gets


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run a model."""

    name: str
    file: str  # CHECKPOINT, FLOAT, INT8 or NCNN
    variant: str = ""  # as `cmfast.load` takes it, or the name of a library that is called without cmfast
    precision: str = "fp32"  # of what is not int8
    tolerance_db: float | None = None  # of the variant "auto"
    plain: bool = False  # the library as a user would call it, with its default settings

    @property
    def type(self) -> str:
        """The lowest precision in it, one of PRECISIONS."""
        return "int8" if self.file == INT8 else self.precision

    @property
    def types(self) -> str:
        """What it computes in, in words."""
        return f"int8, {self.precision}" if self.file == INT8 else self.precision

    @property
    def least_db(self) -> float:
        """The PSNR from the reference that it must keep, dB."""
        if self.plain and self.type != "fp32":
            return LEAST_PLAIN_DB
        return self.tolerance_db or LEAST_DB[self.type]


DIFFUSERS = Way(name="diffusers", file=CHECKPOINT, variant="diffusers")
WAYS = (
    Way(name="PyTorch", file=CHECKPOINT),
    Way(name="PyTorch channels_last", file=CHECKPOINT, variant="channels_last"),
    Way(name="PyTorch bf16", file=CHECKPOINT, precision="bf16"),
    Way(name="torch.compile", file=CHECKPOINT, variant="compiled"),
    Way(name="torch.compile bf16", file=CHECKPOINT, variant="compiled", precision="bf16"),
    Way(name="plain ONNX Runtime", file=FLOAT, variant="onnxruntime", plain=True),
    Way(name="plain OpenVINO", file=FLOAT, variant="openvino", plain=True),
    Way(name="ONNX Runtime", file=FLOAT),
    Way(name="OpenVINO", file=FLOAT, variant="openvino"),
    Way(name="ncnn", file=NCNN),
    Way(name="OpenVINO bf16", file=FLOAT, variant="openvino", precision="bf16"),
    Way(name="ONNX Runtime int8", file=INT8),
    Way(name="OpenVINO int8", file=INT8, variant="openvino"),
    Way(name="OpenVINO int8, bf16", file=INT8, variant="openvino", precision="bf16"),  # bf16 around int8 products
    Way(name="OpenVINO throughput", file=FLOAT, variant="openvino throughput"),
    Way(name="OpenVINO throughput bf16", file=FLOAT, variant="openvino throughput", precision="bf16"),
    Way(name="auto", file=FLOAT, variant="auto"),
    Way(name="auto, 50 dB", file=FLOAT, variant="auto", tolerance_db=50.0),
    DIFFUSERS,
)


def chosen(*, precision: tuple[str, ...], compiled: bool, diffusers: bool, files: frozenset[str]) -> list[Way]:
    """Return the ways of a request whose files there are, the reference first: PyTorch in float32, if it is there.

    Args:
        precision: only ways of these types, and the reference.
        compiled: with torch.compile.
        diffusers: with diffusers' pipeline.
        files: kinds of files that there are.
    """
    found: list[Way] = []
    for way in WAYS:
        wanted = way.type in precision and (way.tolerance_db is None or "bf16" in precision)
        wanted &= (way.variant != "compiled" or compiled) and (way is not DIFFUSERS or diffusers)
        if way.file in files and (wanted or (not found and way.precision == "fp32" and way.file != INT8)):
            found.append(way)
    return found
