# SPDX-License-Identifier: MIT
"""Export of consistency models, and the proof that the file computes what PyTorch computed.

`to_onnx` traces the denoiser, `compose` builds the sampler from it, `verify` compares, `export` puts it together.
"""
