# SPDX-License-Identifier: MIT
"""Export few-step models, verified against PyTorch.

    import cmfast_export, cmfast_train

    denoiser = cmfast_train.wrap(net, shape=(16, 7), conditions={"state": (14,)}, scaling="edm", c_noise="ln/4")
    cmfast_export.export_onnx(denoiser, "policy.onnx", kind="sampler", steps=1)

The names in `__all__` are the public interface; each is imported when it is first used. `graphs.denoiser` traces the
denoiser, `graphs.sampler` builds the sampler from it, `verify` compares, and `pipeline` puts it together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmfast import lazily

if TYPE_CHECKING:
    from cmfast_export.engine import export_engine
    from cmfast_export.int8.options import Calibration
    from cmfast_export.pipeline import Exported, export_onnx
    from cmfast_export.targets.openvino_ir import Converted, export_openvino
    from cmfast_export.targets.table import Target
    from cmfast_export.targets.tensorrt_engine import Built

OPSETS = range(18, 24)
DEFAULT_OPSET = 18  # the oldest that has all we need, so the one that most tools read
FLAVOURS = ("", "ort-cuda")  # which runtime a graph is for; "": any, ort-cuda: ONNX Runtime's CUDA provider
STORED = ("", "fp16")  # what weights may be stored as; "": as they are computed with
AUTO = "auto"  # the precision that is searched for
INT8 = "int8"  # the precision that is made on a float32 graph, for CPUs: `cmfast_export.int8`
BF16_OPSET = 22  # the oldest whose convolutions may be bfloat16

_HOMES = {  # the modules of the names below
    "Built": "targets.tensorrt_engine",
    "Calibration": "int8.options",
    "Converted": "targets.openvino_ir",
    "Exported": "pipeline",
    "Target": "targets.table",
    "export_engine": "engine",
    "export_onnx": "pipeline",
    "export_openvino": "targets.openvino_ir",
}
__all__ = ["Built", "Calibration", "Converted", "Exported", "Target", "export_engine", "export_onnx", "export_openvino"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
