# SPDX-License-Identifier: MIT
"""Export of consistency models, and the proof that the file computes what PyTorch computed.

`graphs.denoiser` traces the denoiser, `graphs.sampler` builds the sampler from it, `verify` compares, and `pipeline`
puts it together.
"""

OPSETS = range(18, 24)
DEFAULT_OPSET = 18  # the oldest that has all we need, so the one that most tools read
FLAVOURS = ("", "ort-cuda")  # which runtime a graph is for; "": any, ort-cuda: ONNX Runtime's CUDA provider
BF16_OPSET = 22  # the oldest whose convolutions may be bfloat16
