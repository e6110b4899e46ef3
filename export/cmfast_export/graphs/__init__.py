# SPDX-License-Identifier: MIT
"""ONNX graphs: the denoiser, the sampler around it, the server."""
